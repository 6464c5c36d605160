"""Targets that lead by 10 to 60 nats: what is left of 1 − p keeps its digits, in values and gradients.

Hidden states are the rows of an identity, so that a row's logits are a column of the weight, exact in any dtype, and
the gradient of the weight is that of the logits.
"""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import BACKENDS, DTYPES, EVERYTHING, affordable, slow

import trapo_kernels as tk

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

VOCAB = 150
KINDS = ("one competitor", "many", "behind", "beside -inf", "tied for the maximum")
# Relative, of log p and entropy, which are fp32 for 16-bit heads too; and of gradients, which are rounded to the dtype.
OF_VALUES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
OF_GRADIENTS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# What is smaller than this is no normal number of the dtype, or the product of an exponential that is none.
SMALLEST = {torch.float64: 1e-60, torch.float32: 1e-37, torch.bfloat16: 1e-37, torch.float16: 2e-4}


def few(backend):
    """Whether a row takes this one 10 ms."""
    return slow(backend) or backend == "cuda-on-cpu"


def margins(dtype, backend):
    """(logits [n, V] that `dtype` holds, targets [n])."""
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(VOCAB, generator=g, dtype=torch.float64)
    rows, targets = [], []
    for margin in (16, 24, 60) if few(backend) else (10, 14, 16, 17, 20, 24, 32, 40, 50, 60):
        for kind in KINDS:
            target, other = (int(torch.randint(0, VOCAB, (), generator=g)) for _ in range(2))
            other = other if other != target else (target + 1) % VOCAB
            z = 0.7 * normal if kind in ("many", "behind") else torch.full((VOCAB,), -70.0, dtype=torch.float64)
            if kind == "beside -inf":
                z = torch.full((VOCAB,), -torch.inf, dtype=torch.float64)
            z[other] = 0
            z[target] = margin
            if kind == "tied for the maximum":
                z[0] = z[VOCAB - 1] = z[target]
            if kind == "behind":
                z[target], z[other] = 0, margin
            rows.append(z), targets.append(target)
    return torch.stack(rows).to(dtype).double(), torch.tensor(targets)


def both_ways(logits, dtype):
    """(hidden, weight) that give these logits, and the logits; 0 · −inf is none, so the weight's lowest are −300."""
    weight = logits.t().clamp(min=-300).to(dtype).contiguous()
    return torch.eye(len(logits), dtype=dtype), weight.requires_grad_(), logits.to(dtype).requires_grad_()


def truth(logits, targets):
    """(log p, H, d log p / dz, dH / dz) in float64, from what the other classes have beside each."""
    d = logits[:, :, None] - logits[:, None, :]  # z_j − z_k [n, j, k]
    others = torch.where(torch.eye(VOCAB, dtype=torch.bool), -torch.inf, -d).nan_to_num(nan=-torch.inf).exp().sum(2)
    log_p = torch.where(logits == -torch.inf, -torch.inf, -others.log1p())
    p, finite = log_p.exp(), log_p.masked_fill(log_p == -torch.inf, 0)
    entropy = -(p * finite).sum(1)
    target = torch.nn.functional.one_hot(targets, VOCAB).bool()
    return (
        log_p.gather(1, targets[:, None]).squeeze(1),
        entropy,
        torch.where(target, -torch.expm1(log_p), -p),
        -p * (finite + entropy[:, None]),
    )


def assert_relative(actual, expected, tolerance, smallest, what):
    error = (actual.double() - expected).abs()
    allowed = tolerance * expected.abs() + smallest
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), (
        f"{what}: {actual.flatten()[worst]:.9g} instead of {expected.flatten()[worst]:.9g} at {int(worst)}"
    )


@dtypes
def test_log_p_entropy_and_their_gradients_keep_their_digits(backend, dtype):
    logits, targets = margins(dtype, backend)
    logprobs, entropy, d_logp, d_entropy = truth(logits, targets)
    hidden, weight, given = both_ways(logits, dtype)
    linear = tk.linear_logprobs(hidden, weight, targets, entropy=True, backend=backend)
    direct = tk.logprobs_from_logits(given, targets, entropy=True, backend=backend)
    for out, of in ((linear, weight), (direct, given)):
        assert_relative(out.logprobs, logprobs, OF_VALUES[dtype], SMALLEST[torch.float32], "log p")
        assert_relative(out.entropy, entropy, OF_VALUES[dtype], SMALLEST[torch.float32], "entropy")
        for value, expected, what in ((out.logprobs, d_logp, "d log p"), (out.entropy, d_entropy, "d entropy")):
            (grad,) = torch.autograd.grad(value.sum(), of, retain_graph=True)
            grad = grad.t() if of is weight else grad
            if what == "d entropy":  # of equals it is the difference of their entropy and their log p, which are O(1)
                grad, expected = (t.view(-1, len(KINDS), VOCAB)[:, :-1] for t in (grad, expected))
            assert_relative(grad, expected, OF_GRADIENTS[dtype], SMALLEST[dtype], what)


@dtypes
def test_a_loss_pushes_its_target_as_much_as_all_others_together(backend, dtype):
    logits, targets = margins(dtype, backend)
    logprobs, _, d_logp, _ = truth(logits, targets)
    rows = torch.arange(len(targets))
    hidden, weight, given = both_ways(logits, dtype)
    sft = tk.Objective.sft(reduction="sum")
    linear = tk.linear_policy_loss(hidden, weight, targets, sft, backend=backend)
    direct = tk.policy_loss_from_logits(given, targets, sft, backend=backend)
    for out, of in ((linear, weight), (direct, given)):
        assert_relative(out.logprobs, logprobs, OF_VALUES[dtype], SMALLEST[torch.float32], "log p")
        (grad,) = torch.autograd.grad(out.loss, of)
        grad = (grad.t() if of is weight else grad).double()
        assert_relative(grad, -d_logp, OF_GRADIENTS[dtype], SMALLEST[dtype], "gradient")
        target = grad[rows, targets]
        others = grad.sum(1) - target
        assert_relative(others, -target, OF_GRADIENTS[dtype], VOCAB * SMALLEST[dtype], "the others' sum")


# z_y in fp32 ------------------------------------------------------------------------------------------------------


def between(dtype, backend, head):
    """(hidden, weight, z, targets) of 16-bit heads whose target's logit z_y lies between two numbers of the dtype, as
    the others do not: its product has a second half in a column of the hidden states of its own."""
    logits, targets = margins(dtype, backend)
    n, rows = len(targets), torch.arange(len(targets))
    logits = logits.clamp(min=-60)
    upper = logits[rows, targets]
    half = (upper.abs() * torch.finfo(dtype).eps / 2).clamp(min=2.0**-9)
    lower = (half * torch.linspace(-0.9, 0.9, n, dtype=torch.float64)).to(dtype)
    weight = torch.cat([logits.t(), torch.zeros(VOCAB, n)], 1)
    weight[targets, n + rows] = lower.double()
    z = logits.clone()
    z[rows, targets] = upper + lower.double()
    scale = head.get("logit_scale", 1.0) / head.get("temperature", 1.0)
    z = z * scale
    if "softcap" in head:
        z = head["softcap"] * torch.tanh(z / head["softcap"])
    eye = torch.eye(n, dtype=dtype)
    return torch.cat([eye, eye], 1), weight.to(dtype).contiguous(), z, targets


@pytest.mark.parametrize("head", [{}, {"logit_scale": 0.5}, {"softcap": 512.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_log_p_is_of_a_target_logit_that_was_not_rounded(backend, dtype, head):
    hidden, weight, z, targets = between(dtype, backend, head)
    logprobs, entropy, d_logp, _ = truth(z, targets)
    rows, n = torch.arange(len(targets)), len(targets)
    # Others' logits are rounded once more by a soft-cap's tanh, in fp32.
    tolerance = 2e-4 if "softcap" in head else 2e-5
    weight.requires_grad_()
    sft = tk.Objective.sft(reduction="sum")
    out = tk.linear_logprobs(hidden, weight, targets, entropy=True, backend=backend, **head)
    loss = tk.linear_policy_loss(hidden, weight, targets, sft, backend=backend, **head)
    with torch.no_grad():
        alone = tk.linear_logprobs(hidden, weight, targets, entropy=True, backend=backend, **head)
    for found in (out, loss, alone):
        assert_relative(found.logprobs, logprobs, tolerance, SMALLEST[torch.float32], "log p")
        assert_relative(found.entropy, entropy, tolerance, SMALLEST[torch.float32], "entropy")
    slope = head.get("logit_scale", 1.0) * (1 - (z / head["softcap"]).square() if "softcap" in head else 1)
    for value in (-out.logprobs.sum(), loss.loss):
        grad = torch.autograd.grad(value, weight)[0].double().t()
        assert_relative(grad[:n], -d_logp * slope, OF_GRADIENTS[dtype], SMALLEST[dtype], "gradient")
        at_target = grad[rows, targets]
        if "softcap" not in head:
            others = grad[:n].sum(1) - at_target
            assert_relative(others, -at_target, OF_GRADIENTS[dtype], VOCAB * SMALLEST[dtype], "the others' sum")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_statistics_of_a_row_are_of_that_logit_too(backend, dtype):
    hidden, weight, z, targets = between(dtype, backend, {})
    found = tk.linear_statistics(hidden, weight, targets, ["top1_mass", "sum_sq", "argmax_match"], backend=backend)
    pi = z.softmax(1)
    assert_relative(found["top1_mass"], pi.amax(1), 1e-5, 0, "mass of the likeliest class")
    assert_relative(found["sum_sq"], pi.square().sum(1), 1e-5, 0, "sum of squares")
    assert torch.equal(found["argmax_match"].bool(), z.argmax(1) == targets)


@pytest.mark.parametrize("head", [{"softcap": 200.0}, {"temperature": 0.5}, {"logit_scale": 4.0}], ids=str)
def test_so_they_do_under_a_head_with_options(backend, head):
    logits, targets = margins(torch.float32, backend)
    logits = logits.clamp(min=-70)
    x = logits
    if "softcap" in head:
        x = 200 * torch.atanh(logits / 200)
    x = (x * head.get("temperature", 1.0) / head.get("logit_scale", 1.0)).float()
    z = x.double() / head.get("temperature", 1.0) * head.get("logit_scale", 1.0)
    z = 200 * torch.tanh(z / 200) if "softcap" in head else z
    logprobs, entropy, *_ = truth(z, targets)
    out = tk.linear_logprobs(
        torch.eye(len(targets)), x.t().contiguous(), targets, entropy=True, backend=backend, **head
    )
    # A soft-capped logit is rounded once more: 60 · 2^-24 · 2.
    assert_relative(out.logprobs, logprobs, 4e-5 if "softcap" in head else 1e-5, 1e-37, "log p")
    assert_relative(out.entropy, entropy, 4e-5 if "softcap" in head else 1e-5, 1e-37, "entropy")


def test_log_p_is_never_above_zero_and_one_class_has_no_gradient(backend):
    # Logits whose soft-capped maximum would differ from itself if it were rounded on one of two ways only.
    n = affordable(backend, 40) if few(backend) else 2000
    for vocab in (1, 50):
        h = torch.rand(n, 1, generator=torch.Generator().manual_seed(0)) * 25 + 10
        weight = torch.zeros(vocab, 1)
        weight[0] = 1
        targets = torch.zeros(n, dtype=torch.long)
        for cap in (None, 30.0, 7.0):
            w = weight.clone().requires_grad_()
            linear = tk.linear_policy_loss(h, w, targets, tk.Objective.sft(), softcap=cap, backend=backend)
            logits = (h @ weight.t()).requires_grad_()
            direct = tk.logprobs_from_logits(logits, targets, softcap=cap, backend=backend)
            for logprobs in (linear.logprobs, direct.logprobs):
                assert (logprobs <= 0).all(), f"{int((logprobs > 0).sum())} above 0"
            grads = (
                torch.autograd.grad(linear.loss, w)[0][0],
                torch.autograd.grad(-direct.logprobs.sum(), logits)[0][:, 0],
            )
            for at_target in grads:
                assert (at_target <= 0).all()
                assert vocab > 1 or not at_target.any()


def test_what_is_no_number_stays_none(backend):
    rows = {
        "nan": [0.0, torch.nan, 1.0],
        "inf": [0.0, torch.inf, 1.0],
        "nothing possible": [-torch.inf] * 3,
    }
    for name, row in rows.items():
        for target in range(3):
            logits = torch.tensor([row])
            out = tk.logprobs_from_logits(logits, torch.tensor([target]), entropy=True, backend=backend)
            assert out.logprobs.isnan().all(), name
            assert out.entropy.isnan().all(), name
    alone = tk.logprobs_from_logits(torch.tensor([[torch.nan]]), torch.tensor([0]), entropy=True, backend=backend)
    assert alone.logprobs.isnan().all()
    assert alone.entropy.isnan().all()


def test_every_term_of_a_confident_row_is_as_in_float64(backend):
    logits, targets = margins(torch.float32, backend)
    n = len(targets)
    logprobs, *_ = truth(logits, targets)
    g = torch.Generator().manual_seed(3)
    inputs = {
        "advantages": torch.randn(n, generator=g),
        "old_logprobs": (logprobs + 0.05 * torch.randn(n, generator=g)).float(),
        "ref_logprobs": (logprobs + 0.1 * torch.randn(n, generator=g)).float(),
        "rollout_logprobs": logprobs.float(),
        "expert_mask": torch.rand(n, generator=g) < 0.3,
    }

    def gradient(dtype, name):
        weight = logits.t().clamp(min=-300).to(dtype).contiguous().requires_grad_()
        hidden = torch.eye(n, dtype=dtype)
        out = tk.linear_policy_loss(hidden, weight, targets, EVERYTHING, backend=name, **inputs)
        return out, torch.autograd.grad(out.loss, weight)[0].double()

    out, actual = gradient(torch.float32, backend)
    expected, exact = gradient(torch.float64, "reference")
    assert_relative(out.logprobs, expected.logprobs, 1e-5, 1e-37, "log p")
    assert_relative(out.entropy, expected.entropy, 1e-5, 1e-37, "entropy")
    assert math.isclose(out.loss.item(), expected.loss.item(), rel_tol=1e-5)
    # Several terms of either sign meet in a gradient, so what counts is the largest of its row.
    error, largest = (actual - exact).abs().amax(0), exact.abs().amax(0)
    assert (error <= 1e-4 * largest + 1e-37).all()
