"""The Triton row kernels run one program per row of a chunk of logits. Host side and sizes: rows.py.

    row_stats:  m = max z, Σ e^(z−m) but one column at m, Σ e^(z−m)(z−m), z_y            one read of each logit
    row_grad:   dx_j = [g_lp (1[j=y] − π_j) − g_H π_j (log π_j + H)] · (1 − (z_j/cap)²)  one read, one write
    row_fused:  both, with the slopes of the objective's terms between them              two reads, one write

Bytes: itemsize per read or write of a logit; per row a dozen numbers more. The second read of row_fused follows the
first within one program, so it is served by L2 as long as the rows in flight fit there (the arithmetic is with the
table of sizes). FLOPs: about 8 + 6 per logit, one exp per pass (with a soft-cap two) and one exp per K logits for the
running maximum.

A block is [R, K]: K neighbouring logits are one 16-byte access and belong to one thread, so the running state [R]
(maximum, sum, dot product of each lane) is folded without any exchange between threads; lanes meet once, at the end of
the row, in a fixed order. There are no atomics. Whole blocks are read without a mask (a ragged V would break the
16-byte accesses), the rest with one, in narrower blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["row_fused", "row_grad", "row_stats", "target_logits"]


# e^-1e4 is 0 in fp64 too, so raising z − m to this changes nothing but 0 · −inf, which becomes 0.
_FLOOR = tl.constexpr(-1e4)
# Columns per lane of a block with a mask: few, since a mask per element takes registers.
_REST = tl.constexpr(2)
_NOTHING = tl.constexpr(float("-inf"))
# e^80 is a number in fp32.
_FURTHEST = tl.constexpr(80.0)


@triton.jit
def expm1(x):
    """Returns e^x − 1 without its cancellation: the power series where |x| < 1/2 (to x^15: 1e-18)."""
    series = 1.0 + x / 15
    for i in tl.static_range(13):
        series = 1.0 + x / (14 - i) * series
    return tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def _zero_like(x):
    """Returns 0, where x is infinite too."""
    return tl.minimum(tl.abs(x), 0.0)


@triton.jit
def log1p(x):
    """Returns log(1 + x), x ≥ 0, with the digits of a small x: 2 artanh(x / (2 + x)) where x < 1/2 (to s^25: 1e-17)."""
    s = x / (2.0 + x)
    square = s * s
    series = square * 0.0 + 1.0 / 25
    for i in tl.static_range(12):
        series = 1.0 / (23 - 2 * i) + square * series
    return tl.where(x < 0.5, 2.0 * s * series, tl.log(1.0 + x))


@triton.jit
def soft_cap(x, cap):
    """Returns z = cap · tanh(x / cap), with t = e^(−2|x|/cap): |z| = cap (1 − t) / (1 + t)."""
    t = tl.exp(tl.abs(x) * (-2.0 / cap))
    size = cap * (1.0 - t) / (1.0 + t)
    return tl.where(x < 0, -size, size)


@triton.jit
def soft_cap_and_slope(x, cap):
    """Returns (z, dz/dx = 1 − tanh²(x / cap) = 4t / (1 + t)²)."""
    t = tl.exp(tl.abs(x) * (-2.0 / cap))
    inverse = 1.0 / (1.0 + t)
    size = cap * (1.0 - t) * inverse
    return tl.where(x < 0, -size, size), 4.0 * t * inverse * inverse


@triton.jit
def fold(z, m, s, d):
    """Returns the state of each lane [R] after logits z [R, K]: maximum, Σ e^(z−m) of all columns but one that has it
    (beside whose 1 they would lose their digits), Σ e^(z−m)(z−m)."""
    top = tl.maximum(m, tl.max(z, 1))
    base = tl.where(top == _NOTHING, 0.0, top)
    # Equal, not a difference of 0: whether a product is rounded before the difference is up to the compiler.
    at_top = z == base[:, None]
    below = z - base[:, None]
    e = tl.where(at_top, 0.0, tl.exp(below))
    s, d, held = moved(m, s, d, top)
    found = tl.sum(at_top.to(tl.int32), 1) + held
    s = s + tl.sum(e, 1) + tl.maximum(found - 1, 0).to(s.dtype)
    return top, s, d + tl.sum(e * tl.maximum(below, _FLOOR), 1)


@triton.jit
def moved(m, s, d, top):
    """Returns (Σ e^(z−top) of a state's columns, but one if the state has the maximum; Σ e^(z−top)(z−top); 1 if it has
    it, else 0)."""
    nothing = m == _NOTHING
    held = (m == top) & ~nothing
    step = tl.where(nothing | held, 0.0, m - top)
    keep = tl.where(nothing, 0.0, tl.exp(step))
    d = keep * (d + (1.0 + s) * step)
    return tl.where(held, s, keep * (1.0 + s)), d, held.to(tl.int32)


@triton.jit
def meet(m, s, d):
    """Returns one state from those of all lanes [R]."""
    top = tl.max(m, 0)
    s, d, held = moved(m, s, d, top)
    return top, tl.sum(s, 0) + tl.maximum(tl.sum(held, 0) - 1, 0).to(s.dtype), tl.sum(d, 0)


@triton.jit
def with_target(m, s, d, rounded, z):
    """Returns (m, s, d, z_y) of a row whose z_y is `z` and not the rounded logit that was read: see row_math.h."""
    below = tl.maximum(rounded - m, _FLOOR)
    share = tl.exp(rounded - m)
    held = (rounded >= m) | (s < share * 0.5)
    least = m - _FURTHEST
    z = tl.where(held & (z < least), least, z)
    by = tl.where(held, m - z, 0.0)
    factor = tl.exp(by)
    now = tl.where(held, 0.0, z - m)
    new = tl.where(held, 0.0, tl.exp(now))
    rest = s - share
    others = tl.where(held, s, tl.where(rest < 0, 0.0, rest))
    dot = tl.where(held, d + by * s, d - share * below + new * tl.maximum(now, _FLOOR))
    return tl.where(held, z, m), factor * others + new, factor * dot, z


@triton.jit
def _block(R: tl.constexpr, K: tl.constexpr):
    return tl.arange(0, R)[:, None] * K + tl.arange(0, K)[None, :]


@triton.jit
def _state(row, V, cap: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
    """Returns the state of a whole row."""
    at = _block(R, K)
    m = tl.full([R], float("-inf"), WIDE)
    s = tl.zeros([R], WIDE)
    d = tl.zeros([R], WIDE)
    whole = V // (R * K) * (R * K)
    for start in range(0, whole, R * K):
        z = tl.load(row + start + at, eviction_policy="evict_last").to(WIDE)
        if cap is not None:
            z = soft_cap(z, cap)
        m, s, d = fold(z, m, s, d)
    rest = _block(R, _REST)
    for start in range(whole, V, R * _REST):
        inside = start + rest < V
        z = tl.load(row + start + rest, mask=inside, other=0.0).to(WIDE)
        if cap is not None:
            z = soft_cap(z, cap)
        m, s, d = fold(tl.where(inside, z, float("-inf")), m, s, d)
    return meet(m, s, d)


@triton.jit
def _target(row, y, V, cap: tl.constexpr, WIDE: tl.constexpr):
    """Returns z_y; NaN for a target outside the vocabulary: its value is on the device, where nothing can be raised."""
    known = (y >= 0) & (y < V)
    z = tl.load(row + y, mask=known, other=0.0).to(WIDE)
    if cap is not None:
        z = soft_cap(z, cap)
    return tl.where(known, z, float("nan"))


@triton.jit
def _gradient_of(x, j, y, m, constant, slope, at_target, cap: tl.constexpr, ENTROPY: tl.constexpr):
    """Returns dx of logits x at columns j: with d = z − m, e^d (slope · d + constant), and `at_target` at column y."""
    below = x - m
    slope_of_cap = x
    if cap is not None:
        z, slope_of_cap = soft_cap_and_slope(x, cap)
        below = z - m
    factor = slope * tl.maximum(below, _FLOOR) + constant if ENTROPY else constant
    dz = tl.where(j == y, at_target, tl.exp(below) * factor)
    if cap is not None:
        dz = dz * slope_of_cap
    return dz


@triton.jit
def _write_gradient(
    row, V, y, logp, m, log_sum, H, g_lp, g_H,
    cap: tl.constexpr, ENTROPY: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Turns the logits of a row into their gradient."""
    inverse = tl.exp(-log_sum)
    constant = -g_lp
    slope = g_lp * 0.0
    at_target = -g_lp * expm1(logp)
    if ENTROPY:
        constant -= g_H * (H - log_sum)
        slope = -g_H * inverse
        log_p = tl.maximum(logp, _FLOOR)
        at_target -= g_H * tl.exp(log_p) * (log_p + H)
    constant = constant * inverse
    at = _block(R, K)
    whole = V // (R * K) * (R * K)
    for start in range(0, whole, R * K):
        x = tl.load(row + start + at, eviction_policy="evict_first").to(WIDE)
        dx = _gradient_of(x, start + at, y, m, constant, slope, at_target, cap, ENTROPY)
        tl.store(row + start + at, dx.to(row.dtype.element_ty))
    rest = _block(R, _REST)
    for start in range(whole, V, R * _REST):
        inside = start + rest < V
        x = tl.load(row + start + rest, mask=inside, other=0.0).to(WIDE)
        dx = _gradient_of(x, start + rest, y, m, constant, slope, at_target, cap, ENTROPY)
        tl.store(row + start + rest, dx.to(row.dtype.element_ty), mask=inside)


@triton.jit
def row_stats(
    logits, targets, max_, rest_, dot, target, V, stride,
    cap: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    row = logits + i * stride
    m, s, d = _state(row, V, cap, WIDE, R, K)
    tl.store(max_ + i, m)
    tl.store(rest_ + i, s)
    tl.store(dot + i, d)
    tl.store(target + i, _target(row, tl.load(targets + i), V, cap, WIDE))


@triton.jit
def row_grad(
    logits, targets, logprobs, max_, log_sum, entropy, g_logprobs, g_entropy, V, stride,
    cap: tl.constexpr, ENTROPY: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    H = tl.full([], 0.0, WIDE)
    g_H = tl.full([], 0.0, WIDE)
    if ENTROPY:
        H = tl.load(entropy + i)
        g_H = tl.load(g_entropy + i)
    _write_gradient(
        logits + i * stride, V, tl.load(targets + i), tl.load(logprobs + i), tl.load(max_ + i), tl.load(log_sum + i),
        H, tl.load(g_logprobs + i), g_H, cap, ENTROPY, WIDE, R, K,
    )  # fmt: skip


@triton.jit
def target_logits(
    hidden, weight, bias, targets, out, V, D, hidden_row, hidden_column, weight_row, weight_column, scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Computes scale · (h · W[y] + b[y]) of a row, in fp32; NaN for a target outside the vocabulary."""
    i = tl.program_id(0).to(tl.int64)
    y = tl.load(targets + i)
    known = (y >= 0) & (y < V)
    y = tl.where(known, y, 0)
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        k = start + tl.arange(0, BLOCK)
        h = tl.load(hidden + i * hidden_row + k * hidden_column, mask=k < D, other=0.0).to(tl.float32)
        acc += h * tl.load(weight + y * weight_row + k * weight_column, mask=k < D, other=0.0).to(tl.float32)
    z = tl.sum(acc, 0)
    if bias is not None:
        z += tl.load(bias + y).to(tl.float32)
    tl.store(out + i, tl.where(known, z * scale, float("nan")))


@triton.jit
def _expert_slope(logp, A, alpha, gamma, TERM: tl.constexpr):
    """Returns ∂E/∂logp of the expert term with this number in EXPERT_TERMS."""
    p = tl.exp(logp)
    slope = p * 0.0
    if TERM == 1:
        slope = slope - 1.0
    elif TERM == 2:
        slope = -tl.where(p > alpha, 1.0, p / alpha)
    elif TERM == 3:
        slope = -p
    elif TERM == 4:
        slope = -A * gamma * p / ((p + gamma) * (p + gamma))
    return slope


@triton.jit
def _policy_slope(
    logp, A, old, rollout, low, high, dual, cap,
    TERM: tl.constexpr, OLD: tl.constexpr, TIS: tl.constexpr,
):  # fmt: skip
    """Returns ∂P/∂logp of the policy term, its truncated importance weight included."""
    slope = _zero_like(logp)
    if TERM == 1:
        before = logp
        if OLD:
            before = old
        # A token of probability zero has the ratio 0 whatever the old probability.
        r = tl.where(logp == _NOTHING, 0.0, tl.exp(logp - before))
        stopped = ((A < 0) & (r < low)) | ((A > 0) & (r > high)) | ((A < 0) & (r > dual))
        # A ratio may be infinite where the advantage is 0.
        slope = tl.where(stopped | (A == 0), 0.0, -r * A)
        if TIS:
            # 0 where the old probability is, whatever the sampler's.
            weight = tl.where(before == _NOTHING, 0.0, tl.exp(before - rollout))
            slope = slope * tl.where(weight > cap, cap, weight)
    return slope


@triton.jit
def row_fused(
    logits, targets, expert, advantages, old, ref, rollout, weights, exact, logprobs, max_, log_sum, entropy, V, stride,
    scale, expert_coef, alpha, gamma, low, high, dual, entropy_coef, kl_coef, tis_cap,
    EXPERT: tl.constexpr, POLICY: tl.constexpr, ADVANTAGES: tl.constexpr, OLD: tl.constexpr, TIS: tl.constexpr,
    KL: tl.constexpr, ENTROPY: tl.constexpr, EXACT: tl.constexpr, cap: tl.constexpr, WIDE: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    row = logits + i * stride
    y = tl.load(targets + i)
    z_y = _target(row, y, V, cap, WIDE)
    m, s, d = _state(row, V, cap, WIDE, R, K)
    if EXACT:
        m, s, d, z_y = with_target(m, s, d, z_y, tl.load(exact + i))
    s = s + (m - m)  # NaN where the maximum is no number
    log_s = log1p(s)
    logp = (z_y - m) - log_s
    mean = log_s - d / (1.0 + s)
    H = tl.where(mean < 0, 0.0, mean)
    tl.store(logprobs + i, logp)
    tl.store(max_ + i, m)
    tl.store(log_sum + i, log_s)
    tl.store(entropy + i, H)
    A = _zero_like(logp)
    before = _zero_like(logp)
    sampled = _zero_like(logp)
    if ADVANTAGES:
        A = tl.load(advantages + i)
    if OLD:
        before = tl.load(old + i)
    if TIS:
        sampled = tl.load(rollout + i)
    own = _policy_slope(logp, A, before, sampled, low, high, dual, tis_cap, POLICY, OLD, TIS)
    if KL:
        anchor = tl.load(ref + i)
        # 0 where both are −inf.
        own = own - kl_coef * expm1(tl.where(anchor == logp, 0.0, anchor - logp))
    taught = expert_coef * _expert_slope(logp, A, alpha, gamma, EXPERT)
    w = tl.load(weights + i)
    # A row that does not count may hold anything.
    g_lp = scale * tl.where(w == 0, 0.0, w * tl.where(tl.load(expert + i) != 0, taught, own))
    g_H = -scale * entropy_coef * w
    # The row has been read by every thread before any of it is overwritten: `_target` is not read again.
    tl.debug_barrier()
    _write_gradient(row, V, y, logp, m, log_s, H, g_lp, g_H, cap, ENTROPY, WIDE, R, K)
