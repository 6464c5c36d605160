"""Log-probabilities on a support: against torch's log_softmax in float64, hostile inputs, memory, work, compilers."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    BACKENDS,
    DTYPES,
    HEADS,
    STREAMED,
    TOLERANCE,
    affordable,
    assert_close,
    gemms,
    make_case,
    memory,
)

import trapo_kernels as tk
from trapo_kernels.support import gathered
from trapo_kernels.support import ops as support_ops

backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def some_ids(n, vocab, k, seed=0):
    """Random ids, no two alike in a row; some are missing, one row has none and one has an id twice."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(vocab, generator=g)[:k] for _ in range(n)]) if n else torch.empty(0, k).long()
    ids = ids.masked_fill(torch.rand(ids.shape, generator=g) < 0.1, -1)
    if n > 2 and k > 1:
        ids[0] = -1
        ids[1, 0], ids[1, 1] = 3 % vocab, 3 % vocab
        ids[2, 0] = -1
    return ids


def plain(logits, ids, restrict=False):
    """(log-probabilities, tail, entropy) of logits [n, V], a row at a time, as the definitions say."""
    logprobs, tails, entropies = [], [], []
    for z, row in zip(logits, ids.tolist(), strict=True):
        chosen = sorted({i for i in row if i >= 0})
        others = [j for j in range(len(z)) if j not in chosen]
        log_p = (z[chosen] if restrict else z).log_softmax(0)
        place = {i: at if restrict else i for at, i in enumerate(chosen)}
        logprobs.append(torch.stack([log_p[place[i]] if i >= 0 else z.new_zeros(()) for i in row]))
        tails.append(log_p[others].logsumexp(0) if others and not restrict else z.new_tensor(-torch.inf))
        entropies.append(-(log_p.exp() * log_p).sum())
    return torch.stack(logprobs), torch.stack(tails), torch.stack(entropies)


def logits_of(case):
    """In the order of the head: scale, soft-cap, temperature."""
    hidden, weight, *bias = case.params()
    z = (hidden @ weight.T + (bias[0] if bias else 0)) * case.head.get("logit_scale", 1.0)
    cap = case.head.get("softcap")
    return (z if cap is None else cap * torch.tanh(z / cap)) / case.head.get("temperature", 1.0)


def values(case, ids, backend, **options):
    return tk.linear_support_logprobs(
        case.hidden, case.weight, ids, bias=case.bias, backend=backend, **case.head, **options
    )


def scalar(found, ids, weights):
    """Of all three outputs, with other weights for each row; a tail of nothing has no part in it."""
    logprobs, tail, entropy = found
    total = (logprobs * weights[:, : ids.shape[1]]).sum() + (entropy * weights[:, -1]).sum()
    return total if tail is None else total + (tail.masked_fill(tail == -torch.inf, 0) * weights[:, -2]).sum()


def run(case, ids, backend, **options):
    """(outputs, gradients of a weighted sum of all of them)."""
    case = case.to(case.hidden.dtype).requires_grad()
    found = values(case, ids, backend, entropy=True, **options)
    g = torch.Generator().manual_seed(7)
    weights = torch.randn(ids.shape[0], ids.shape[1] + 2, generator=g, dtype=torch.float64).to(found.logprobs.dtype)
    return found, torch.autograd.grad(scalar(found, ids, weights), case.params())


def same(actual, expected, dtype):
    (found, grads), (right, right_grads) = actual, expected
    for name in ("logprobs", "tail", "entropy"):
        a, b = getattr(found, name), getattr(right, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a == -torch.inf, b == -torch.inf), name
            none = b == -torch.inf
            assert_close(a.masked_fill(none, 0), b.masked_fill(none, 0), TOLERANCE[dtype], name, floor=1.0)
    for a, b in zip(grads, right_grads, strict=True):
        assert a.dtype == dtype
        assert_close(a, b, TOLERANCE[dtype], "gradient")


@backends
@pytest.mark.parametrize("restrict", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_values_and_gradients_are_those_of_log_softmax(head, restrict, backend):
    case = make_case(affordable(backend, 12), 67, **HEADS[head])
    ids = some_ids(case.hidden.shape[0], 67, 9)
    found, grads = run(case, ids, backend, restrict=restrict)
    logprobs, tail, entropy = plain(logits_of(case), ids, restrict)
    expected = (logprobs, None if restrict else tail, entropy)
    g = torch.Generator().manual_seed(7)
    weights = torch.randn(ids.shape[0], 11, generator=g, dtype=torch.float64)
    right = torch.autograd.grad(scalar(expected, ids, weights), case.params())
    same((found, grads), (tk.SupportLogprobs(*expected), right), torch.float64)


@backends
@dtypes
@pytest.mark.parametrize("restrict", [False, True])
@pytest.mark.parametrize(("n", "vocab", "k"), [(0, 5, 3), (1, 1, 1), (7, 2, 0), (7, 5, 5), (60, 1500, 9)])
def test_every_dtype_agrees_with_the_oracle(n, vocab, k, restrict, dtype, backend):
    n = affordable(backend, n)
    case, ids = make_case(n, vocab, dtype=dtype, with_bias=True), some_ids(n, vocab, k)
    with tk.budget_mb(0.2):
        same(
            run(case, ids, backend, restrict=restrict),
            run(case.to(torch.float64), ids, "reference", restrict=restrict),
            dtype,
        )


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 20), vocab=st.integers(1, 50), k=st.integers(0, 60), seed=st.integers(0, 2**20),
    kilobytes=st.floats(0.1, 500), restrict=st.booleans(), cap=st.sampled_from([None, 2.0]),
)  # fmt: skip
def test_any_small_problem_agrees_with_the_oracle(n, vocab, k, seed, kilobytes, restrict, cap):
    case = make_case(n, vocab, seed=seed, softcap=cap)
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, vocab, (n, k), generator=g)
    with tk.budget_mb(kilobytes / 1024):
        for backend in ("torch", "cpu"):
            same(
                run(case, ids, backend, restrict=restrict),
                run(case, ids, "reference", restrict=restrict),
                torch.float64,
            )


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("restrict", [False, True])
def test_gradcheck(restrict, backend, monkeypatch):
    monkeypatch.setattr(gathered, "_GATHERED_COST", 4)
    case = make_case(4, 12, width=3, with_bias=True, temperature=0.6, softcap=2.0)
    ids = torch.stack([torch.arange(2) + 3 * i for i in range(4)])
    assert gathered.pays(2, 12)

    def loss(*params):
        found = tk.linear_support_logprobs(
            params[0], params[1], ids, bias=params[2], restrict=restrict, entropy=True, backend=backend, **case.head
        )
        return [t for t in found if t is not None]

    assert torch.autograd.gradcheck(loss, case.params())


@backends
@pytest.mark.parametrize("cap", [None, 30.0])
def test_a_tail_of_next_to_nothing_keeps_its_digits(backend, cap):
    # A class 60 nats above all others: 1 − Σ is 0 in float64, the tail is not.
    hidden = torch.ones(2, 1, dtype=torch.float32, requires_grad=True)
    z = torch.linspace(-2, 2, 40)
    z[5] = 28.0 if cap else 60.0
    ids = torch.tensor([[5], [5]])
    found = tk.linear_support_logprobs(hidden, z[:, None], ids, softcap=cap, backend=backend)
    exact = z.double() if cap is None else cap * torch.tanh(z.double() / cap)
    log_pi = exact.log_softmax(0)
    others = torch.cat([log_pi[:5], log_pi[6:]]).logsumexp(0)
    assert_close(found.tail, others.expand(2), 1e-6, "tail")
    rest = exact[torch.arange(40) != 5]
    slope = (rest.softmax(0) * z[torch.arange(40) != 5]).sum() - z[5] if cap is None else None
    (grad,) = torch.autograd.grad(found.tail[0], hidden)
    if slope is not None:
        assert_close(grad[0], slope[None], 1e-6, "gradient")


@backends
def test_impossible_classes_are_minus_infinity_and_have_no_gradient(backend):
    case = make_case(3, 20, dtype=torch.float32, with_bias=True)
    with torch.no_grad():
        case.bias[[2, 3]] = -torch.inf
    ids = torch.tensor([[2, 4], [4, 5], [2, 3]])
    found, grads = run(case, ids, backend)
    assert (found.logprobs == -torch.inf).tolist() == [[True, False], [False, False], [True, True]]
    assert not any(g.isnan().any() for g in grads)
    # All that is possible is in the support: nothing is left for the others.
    with torch.no_grad():
        case.bias[:] = -torch.inf
        case.bias[[4, 5]] = 0.0
    found, grads = run(case, torch.tensor([[4, 5]] * 3), backend)
    assert (found.tail == -torch.inf).all()
    assert_close(found.logprobs.exp().sum(1), torch.ones(3), 1e-6, "mass")
    assert not any(g.isnan().any() for g in grads)


@backends
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_of_no_numbers_is_nan_and_harms_no_other(backend, value):
    case = make_case(3, 20, dtype=torch.float32)
    with torch.no_grad():
        case.hidden[1] = value
    ids = torch.tensor([[1, 2], [1, 2], [3, 4]])
    found = values(case, ids, backend, entropy=True)
    for t in (found.logprobs.sum(1), found.tail, found.entropy):
        assert t.isnan().tolist() == [False, True, False]
    masked = values(case, ids, backend, entropy=True, mask=torch.tensor([True, False, True]))
    assert all(not t.isnan().any() and not t[1].any() for t in masked)
    total = masked.logprobs.sum() + masked.tail.sum() + masked.entropy.sum()
    grads = torch.autograd.grad(total, case.params())
    assert not any(g.isnan().any() for g in grads)
    assert not grads[0][1].any()


@backends
def test_a_second_backward_is_right_and_a_gradient_that_is_zero_costs_nothing(backend):
    case, ids = make_case(4, 30), some_ids(4, 30, 3)
    found = values(case, ids, backend)
    first = torch.autograd.grad(found.tail.sum(), case.params(), retain_graph=True)
    second = torch.autograd.grad(found.tail.sum(), case.params())
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    zero = values(case, ids, backend).logprobs * 0
    assert not any(g.any() for g in torch.autograd.grad(zero.sum(), case.params()))


@pytest.mark.parametrize("backend", STREAMED)
def test_one_gemm_forward_three_backward_and_none_of_a_sampling_mask(backend):
    case, ids = make_case(64, 3000, width=32, dtype=torch.float32), some_ids(64, 3000, 8)
    ids[0] = torch.arange(8)
    assert gemms(lambda: values(case, ids, backend), case) == 1
    found = values(case, ids, backend)
    assert gemms(lambda: torch.autograd.grad(found.tail.sum(), case.params(), retain_graph=True), case) == 3
    assert gemms(lambda: torch.autograd.grad(found.tail[:32].sum(), case.params()), case) == 1.5
    with torch.no_grad():
        assert gemms(lambda: values(case, ids, backend, mask=torch.arange(64) < 16), case) == 0.25


def test_a_sampling_mask_makes_nothing_of_the_size_of_logits():
    case, ids = make_case(600, 20_000, width=8, dtype=torch.float32), some_ids(600, 20_000, 20)
    assert gathered.pays(20, 20_000)
    used = memory(lambda: values(case, ids, "torch", restrict=True))
    assert used.peak < 9 * 2**20  # logits are 46 MiB


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_memory_keeps_to_the_budget(backend):
    case, ids = make_case(2048, 9000, width=8, dtype=torch.float32), some_ids(2048, 9000, 16)

    def both():
        found = values(case, ids, backend)
        return torch.autograd.grad(found.tail.sum() + found.logprobs.sum(), case.params())

    with tk.budget_mb(12):
        assert memory(both).peak < 12 * 2**20 + 3 * 2**20  # 70 MiB of logits; values of the support beside the budget


@backends
def test_ids_that_stand_twice_count_once_and_have_their_gradient_twice(backend):
    case = make_case(2, 30)
    one, two = (values(case, torch.tensor(ids), backend) for ids in ([[4, 7]] * 2, [[4, 7, 4]] * 2))
    assert torch.equal(one.tail, two.tail)
    assert torch.equal(two.logprobs[:, 0], two.logprobs[:, 2])
    twice = torch.autograd.grad(one.logprobs[:, 0].sum() * 2, case.params())
    for a, b in zip(torch.autograd.grad(two.logprobs[:, [0, 2]].sum(), case.params()), twice, strict=True):
        assert_close(a, b, 1e-12, "gradient")


@pytest.mark.parametrize(
    ("k", "restrict", "backend"),
    [(3, False, "torch"), (3, True, "torch"), (40, True, "torch"), (3, False, "reference")],
)
def test_it_is_one_graph(k, restrict, backend):
    case = make_case(6, 400, with_bias=True)
    ids, mask = some_ids(6, 400, k), torch.arange(6) != 3

    def value(hidden, weight, bias, ids):
        found = tk.linear_support_logprobs(
            hidden, weight, ids, bias=bias, restrict=restrict, mask=mask, entropy=True, backend=backend, softcap=3.0
        )
        total = found.logprobs.sum() + 0.3 * found.entropy.sum()
        return total if restrict else total + found.tail.sum()

    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    expected, actual = value(*case.params(), ids), compiled(*case.params(), ids)
    assert_close(actual, expected, 1e-12, "value")
    pairs = zip(*(torch.autograd.grad(out, case.params()) for out in (actual, expected)), strict=True)
    for a, b in pairs:
        assert_close(a, b, 1e-11, "gradient")


def test_an_id_out_of_range_makes_its_token_nan_where_it_cannot_be_looked_at():
    case, ids = make_case(3, 20), torch.tensor([[1, 2], [20, 2], [-2, 2]])

    def value(ids):
        return values(case, ids, "torch", entropy=True)

    found = torch.compile(value, fullgraph=True, backend="aot_eager")(ids)
    assert found.logprobs.isnan().tolist() == [[False, False], [True, False], [True, False]]
    assert found.tail.isnan().tolist() == found.entropy.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("name", ["values", "gathered"])
def test_opcheck(name):
    case, ids = make_case(12, 19, width=5, dtype=torch.float32, with_bias=True), some_ids(12, 19, 3)
    ids[1, 1] = -1
    active, wants = torch.arange(12) % 4 != 1, (True, True, True)
    if name == "values":
        arguments = (*case.params(), ids, active, True, 0.7, 3.0, 1.5, "torch", *wants)
        torch.library.opcheck(torch.ops.trapo_kernels.support_values.default, arguments)
    else:
        torch.library.opcheck(torch.ops.trapo_kernels.gathered_logits.default, (*case.params(), ids, 1.5, *wants))


def test_every_operator_is_checked_here():
    names = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "trapo_kernels::" in name
    }
    checked = {"support_values", "support_values_backward", "gathered_logits", "gathered_logits_backward"}
    checked |= {"topk_divergence"}  # test_topk_divergence.py
    assert {name for name in names if name in vars(support_ops)} == checked


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"ids": torch.zeros(3, 2)}, TypeError, "ids must be int64; got float32"),
        ({"ids": [[1]]}, TypeError, "ids must be a tensor; got list"),
        ({"ids": torch.zeros(2, 2).long()}, ValueError, "ids must be [3, K] for the tokens of hidden; got [2, 2]"),
        ({"ids": torch.zeros(3).long()}, ValueError, "ids must be [3, K] for the tokens of hidden; got [3]"),
        (
            {"ids": torch.full((3, 1), 7)},
            ValueError,
            "ids must be int64 in [0, V) or -1 for none; got max 7 with V=7",
        ),
        ({"ids": torch.full((3, 1), -2)}, ValueError, "ids must be int64 in [0, V) or -1 for none; got min -2 with"),
        ({"mask": torch.ones(3)}, TypeError, "mask must be bool; got float32"),
        ({"restrict": 1}, TypeError, "restrict must be True or False; got 1"),
        ({"temperature": 0}, ValueError, "temperature must be a finite number above 0; got 0"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
    ],
    ids=str,
)
def test_it_refuses(wrong, kind, message):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "ids": torch.zeros(3, 2).long(), **wrong}
    with pytest.raises(kind, match="^" + re.escape(f"linear_support_logprobs: {message}")) as error:
        tk.linear_support_logprobs(**arguments)
    assert "\n" not in str(error.value)
