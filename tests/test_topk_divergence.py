"""Divergences from a teacher's top-k: against what verl and TRL compute from logits, hostile inputs, memory, work."""

from __future__ import annotations

import re

import pytest
import torch
from kernel_cases import BACKENDS, DTYPES, STREAMED, TOLERANCE, affordable, assert_close, gemms, make_case, memory
from torch.nn import functional as F

import trapo_kernels as tk
from trapo_kernels.support.topk_terms import KINDS, TAILS

backends = pytest.mark.parametrize("backend", BACKENDS)
kinds = pytest.mark.parametrize("kind", KINDS)
tails = pytest.mark.parametrize("tail", TAILS)


def teacher_of(n, vocab, k, seed=1, dtype=torch.float64):
    """(ids, log-probabilities [n, k]) of the top k of random logits."""
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, vocab, generator=g, dtype=torch.float64)
    found, ids = logits.log_softmax(1).topk(k, 1)
    return ids, found.to(dtype)


def logits_of(case):
    return case.hidden @ case.weight.T + (0 if case.bias is None else case.bias)


def run(case, teacher, backend, **options):
    case = case.to(case.hidden.dtype).requires_grad()
    out = tk.linear_topk_divergence(
        case.hidden, case.weight, *teacher, bias=case.bias, backend=backend, **case.head, **options
    )
    return out, torch.autograd.grad(out.loss, case.params())


def same(actual, expected, dtype):
    (out, grads), (right, right_grads) = actual, expected
    for name in ("loss", "tokens", "tail"):
        a, b = getattr(out, name), getattr(right, name)
        assert (a is None) == (b is None)
        if a is not None:
            none = b == -torch.inf
            assert torch.equal(a == -torch.inf, none), name
            assert_close(a.masked_fill(none, 0), b.masked_fill(none, 0), TOLERANCE[dtype], name, floor=1.0)
    for a, b in zip(grads, right_grads, strict=True):
        assert a.dtype == dtype
        assert_close(a, b, TOLERANCE[dtype], "gradient")


# What others compute -----------------------------------------------------------------------------------------


def verl_forward_kl_topk(student_logits, teacher_logprobs, teacher_ids):
    """verl, trainer/distillation/fsdp/losses.py, compute_forward_kl_topk without its clamp."""
    student = torch.gather(F.log_softmax(student_logits, dim=-1), -1, teacher_ids)
    return (teacher_logprobs.exp() * (teacher_logprobs - student)).sum(-1), student.exp().sum(-1)


def trl_divergence(student, teacher, alpha):
    """TRL 1.16, experimental/sdft/loss_utils.py, compute_divergence: alpha weighs the teacher."""
    if alpha in (0.0, 1.0):
        first, second = (student, teacher) if alpha == 0.0 else (teacher, student)
        return F.kl_div(first, second, reduction="none", log_target=True).sum(-1)
    a = torch.tensor(alpha, dtype=student.dtype)
    mixture = torch.logsumexp(torch.stack([student + torch.log(1 - a), teacher + torch.log(a)]), 0)
    of_teacher = F.kl_div(mixture, teacher, reduction="none", log_target=True)
    of_student = F.kl_div(mixture, student, reduction="none", log_target=True)
    return torch.lerp(of_student, of_teacher, alpha).sum(-1)


def trl_with_tail(log_probs):
    """TRL 1.16, add_tail_bucket."""
    log_s = torch.clamp(torch.logsumexp(log_probs, -1, keepdim=True), max=-1e-7)
    return torch.cat([log_probs, torch.log(-torch.expm1(log_s))], -1)


@backends
def test_a_dropped_tail_is_verls_forward_kl(backend):
    case = make_case(affordable(backend, 20), 67, with_bias=True)
    n = case.hidden.shape[0]
    ids, logprobs = teacher_of(n, 67, 9)
    out, grads = run(case, (ids, logprobs), backend, tail="drop")
    expected, mass = verl_forward_kl_topk(logits_of(case), logprobs, ids)
    assert_close(out.tokens, expected, 1e-11, "tokens")
    assert_close(1 - out.tail.exp(), mass, 1e-11, "mass")
    for a, b in zip(grads, torch.autograd.grad(expected.mean(), case.params()), strict=True):
        assert_close(a, b, 1e-11, "gradient")


@backends
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize(("kind", "alpha"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.3)])
def test_the_other_tails_are_trls(kind, alpha, tail, backend):
    case = make_case(affordable(backend, 20), 67, with_bias=True)
    ids, logprobs = teacher_of(case.hidden.shape[0], 67, 9)
    beta = alpha if kind == "jsd" else 0.5
    out, grads = run(case, (ids, logprobs), backend, kind=kind, tail=tail, beta=beta)
    student = logits_of(case).log_softmax(-1).gather(-1, ids)
    if tail == "bucket":
        student, teacher = trl_with_tail(student), trl_with_tail(logprobs)
    else:
        student, teacher = student.log_softmax(-1), logprobs.log_softmax(-1)
    expected = trl_divergence(student, teacher, alpha)
    assert_close(out.tokens, expected, 1e-11, "tokens")
    for a, b in zip(grads, torch.autograd.grad(expected.mean(), case.params()), strict=True):
        assert_close(a, b, 1e-10, "gradient")


@backends
def test_the_gradient_with_a_bucket_is_the_one_in_the_text(backend):
    case = make_case(affordable(backend, 20), 67)
    ids, logprobs = teacher_of(case.hidden.shape[0], 67, 9)
    _, grads = run(case, (ids, logprobs), backend, normalizer=1.0)
    q, p = logits_of(case).softmax(-1), logprobs.exp()
    inside, mass = q.gather(1, ids), p.sum(1, keepdim=True)
    own = inside.sum(1, keepdim=True)
    expected = (q * (mass - own) / (1 - own)).scatter(1, ids, inside - p)
    assert_close(grads[0], expected @ case.weight, 1e-11, "d_hidden")


# Against the oracle ------------------------------------------------------------------------------------------


@backends
@kinds
@tails
def test_every_kind_agrees_with_the_oracle_under_every_option(kind, tail, backend):
    n = affordable(backend, 40)
    case = make_case(n, 1500, dtype=torch.float32, with_bias=True, softcap=3.0, temperature=0.8)
    ids, logprobs = teacher_of(n, 1500, 7)
    ids[0], ids[1, 3], ids[2, 5] = -1, ids[1, 2], -1
    g = torch.Generator().manual_seed(0)
    options = {
        "kind": kind, "tail": tail, "beta": 0.3, "mask": torch.rand(n, generator=g) < 0.8,
        "weights": torch.rand(n, generator=g) * (torch.rand(n, generator=g) < 0.7), "normalizer": 3.0,
    }  # fmt: skip
    with tk.budget_mb(0.2):
        actual = run(case, (ids, logprobs), backend, **options)
    same(actual, run(case.to(torch.float64), (ids, logprobs), "reference", **options), torch.float32)
    assert not actual[0].tokens[~options["mask"]].any()


@backends
@tails
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("n", "vocab", "k"), [(0, 5, 2), (1, 1, 1), (4, 5, 5), (4, 5, 0), (30, 1500, 6)])
def test_every_dtype_agrees_with_the_oracle(n, vocab, k, dtype, tail, backend):
    n = affordable(backend, n)
    case, teacher = make_case(n, vocab, dtype=dtype), teacher_of(n, vocab, k)
    actual = run(case, teacher, backend, kind="mixed", tail=tail)
    same(actual, run(case.to(torch.float64), teacher, "reference", kind="mixed", tail=tail), dtype)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@kinds
@tails
def test_gradcheck(kind, tail, backend):
    case = make_case(3, 9, width=3, with_bias=True, softcap=2.0)
    teacher = teacher_of(3, 9, 3)

    def loss(*params):
        return tk.linear_topk_divergence(
            params[0], params[1], *teacher, bias=params[2], kind=kind, tail=tail, beta=0.3, backend=backend, **case.head
        ).loss

    assert torch.autograd.gradcheck(loss, case.params())


@backends
@kinds
def test_all_ids_with_any_tail_are_the_whole_divergence(kind, backend):
    n = affordable(backend, 12)
    case = make_case(n, 20)
    ids, logprobs = teacher_of(n, 20, 20)
    found = [run(case, (ids, logprobs), backend, kind=kind, tail=tail, beta=0.3) for tail in TAILS]
    p, q = logprobs, logits_of(case).log_softmax(1).gather(1, ids)
    m = torch.logaddexp(p + torch.tensor(0.3).log(), q + torch.tensor(0.7).log())
    forward, reverse = ((a.exp() * (a - b)).sum(1) for a, b in ((p, q), (q, p)))
    jsd = 0.3 * (p.exp() * (p - m)).sum(1) + 0.7 * (q.exp() * (q - m)).sum(1)
    whole = {"forward_kl": forward, "reverse_kl": reverse, "jsd": jsd, "mixed": 0.3 * forward + 0.7 * reverse}[kind]
    for (out, grads), tail in zip(found, TAILS, strict=True):
        assert_close(out.tokens, whole, 1e-7 if kind == "jsd" else 1e-11, tail)
        for a, b in zip(grads, torch.autograd.grad(whole.mean(), case.params(), retain_graph=True), strict=True):
            assert_close(a, b, 1e-7 if kind == "jsd" else 1e-11, tail)


# Hostile inputs, cost ----------------------------------------------------------------------------------------


@backends
@tails
def test_a_teachers_impossible_ids_add_nothing_to_a_forward_kl(tail, backend):
    case = make_case(3, 20, dtype=torch.float32)
    ids, logprobs = teacher_of(3, 20, 4, dtype=torch.float32)
    logprobs[:, 2] = -torch.inf
    out, grads = run(case, (ids, logprobs), backend, tail=tail)
    assert out.loss.isfinite()
    assert all(g.isfinite().all() for g in grads)
    same((out, grads), run(case.to(torch.float64), (ids, logprobs.double()), "reference", tail=tail), torch.float32)
    honest, _ = run(case, (ids, logprobs), backend, kind="reverse_kl", tail=tail)
    assert honest.loss == torch.inf
    # A token without weight adds nothing, whatever it is.
    silent, grads = run(case, (ids, logprobs), backend, kind="reverse_kl", tail=tail, weights=torch.zeros(3))
    assert silent.loss == 0
    assert not any(g.any() for g in grads)


@backends
@kinds
def test_a_teacher_that_is_sure_has_a_finite_divergence(kind, backend):
    case = make_case(2, 20, dtype=torch.float32)
    ids, logprobs = torch.tensor([[4], [5]]), torch.tensor([[0.0], [1e-7]])  # 1 and, by rounding, more
    out, grads = run(case, (ids, logprobs), backend, kind=kind)
    assert out.tokens.isfinite().all()
    assert all(g.isfinite().all() for g in grads)
    if kind == "forward_kl":
        chosen = logits_of(case).log_softmax(1).gather(1, ids).squeeze(1)
        assert_close(out.tokens, -chosen, 1e-5, "cross-entropy")


@backends
@kinds
def test_a_student_that_is_the_teacher_has_no_divergence(kind, backend):
    case = make_case(4, 30)
    logprobs, ids = logits_of(case).log_softmax(1).detach().topk(6, 1)
    for tail in TAILS:
        out, grads = run(case, (ids, logprobs), backend, kind=kind, tail=tail)
        assert out.tokens.abs().max() < 1e-12
        # With a dropped tail the masses on the ids are no distribution: a forward KL pulls them up.
        assert tail == "drop" or all(g.abs().max() < 1e-12 for g in grads)


@pytest.mark.parametrize("backend", STREAMED)
def test_three_gemms_and_one_without_gradient(backend):
    case = make_case(64, 300, width=32, dtype=torch.float32)
    teacher = teacher_of(64, 300, 8, dtype=torch.float32)
    assert gemms(lambda: run(case, teacher, backend), case) == 3
    with torch.no_grad():
        assert gemms(lambda: tk.linear_topk_divergence(case.hidden, case.weight, *teacher, backend=backend), case) == 1


def test_a_second_backward_recomputes_and_a_renormalised_one_makes_no_logits():
    case, teacher = make_case(8, 2000), teacher_of(8, 2000, 4)
    out = tk.linear_topk_divergence(case.hidden, case.weight, *teacher, backend="torch")
    first = torch.autograd.grad(2 * out.loss, case.params(), retain_graph=True)
    kept = [g.clone() for g in first]
    for a, b in zip(torch.autograd.grad(2 * out.loss, case.params()), kept, strict=True):
        assert torch.equal(a, b)
    assert gemms(lambda: run(case, teacher, "torch", tail="drop"), case) == 3
    with torch.no_grad():
        wide = make_case(600, 20_000, width=8, dtype=torch.float32)
        found = teacher_of(1, 20_000, 20, dtype=torch.float32)
        many = [t.expand(600, 20).contiguous() for t in found]
        used = memory(lambda: run_forward(wide, many, tail="renormalise"))
    assert used.peak < 9 * 2**20


def run_forward(case, teacher, **options):
    return tk.linear_topk_divergence(case.hidden, case.weight, *teacher, backend="torch", **options)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_memory_keeps_to_the_budget(backend):
    case, teacher = make_case(2048, 9000, width=8, dtype=torch.float32), teacher_of(2048, 9000, 16, dtype=torch.float32)
    with tk.budget_mb(12):
        assert memory(lambda: run(case, teacher, backend)).peak < 12 * 2**20 + 3 * 2**20


@pytest.mark.parametrize(("tail", "backend"), [("bucket", "torch"), ("renormalise", "torch"), ("drop", "reference")])
def test_it_is_one_graph(tail, backend):
    case, teacher = make_case(6, 700, with_bias=True), teacher_of(6, 700, 4)
    weights, mask = torch.rand(6, dtype=torch.float64), torch.arange(6) != 3

    def value(hidden, weight, bias):
        return tk.linear_topk_divergence(
            hidden, weight, *teacher, bias=bias, kind="mixed", tail=tail, weights=weights, mask=mask, backend=backend
        )

    expected = value(*case.params())
    actual = torch.compile(value, fullgraph=True, backend="aot_eager")(*case.params())
    for name in ("loss", "tokens"):
        assert_close(getattr(actual, name), getattr(expected, name), 1e-12, name)
    pairs = zip(*(torch.autograd.grad(3 * out.loss, case.params()) for out in (actual, expected)), strict=True)
    for a, b in pairs:
        assert b.any()
        assert_close(a, b, 1e-11, "gradient")


def test_opcheck():
    case = make_case(12, 19, width=5, dtype=torch.float32, with_bias=True)
    ids, logprobs = teacher_of(12, 19, 3, dtype=torch.float32)
    active, weights = torch.arange(12) % 4 != 1, torch.rand(12).masked_fill(torch.arange(12) == 3, 0)
    arguments = (
        *case.params(), ids, active, logprobs, weights, "mixed", "bucket", 0.3, 0.7, 3.0, 1.5, "torch", True, True,
        True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.trapo_kernels.topk_divergence.default, arguments)


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"kind": "kl"}, ValueError, "kind must be one of 'forward_kl', 'reverse_kl', 'jsd', 'mixed'; got 'kl'"),
        ({"tail": None}, ValueError, "tail must be one of 'bucket', 'drop', 'renormalise'; got None"),
        ({"beta": 1.0}, ValueError, "beta must be a number in (0, 1); got 1.0"),
        ({"teacher_logprobs": torch.zeros(3, 1)}, ValueError, "teacher_logprobs must be [3, 2] as ids; got [3, 1]"),
        ({"teacher_logprobs": None}, TypeError, "teacher_logprobs must be a tensor; got NoneType"),
        (
            {"teacher_logprobs": torch.zeros(3, 2).long()},
            TypeError,
            "teacher_logprobs must be float16, bfloat16, float",
        ),
        ({"weights": torch.zeros(2)}, ValueError, "weights must be [3] as hidden; got [2]"),
        ({"normalizer": -1.0}, ValueError, "normalizer must be a number above 0 or a 0-dim tensor; got -1.0"),
        ({"ids": torch.full((3, 2), 9)}, ValueError, "ids must be int64 in [0, V) or -1 for none; got max 9 with V=7"),
    ],
    ids=str,
)
def test_it_refuses(wrong, kind, message):
    arguments = {
        "hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "ids": torch.zeros(3, 2).long(),
        "teacher_logprobs": torch.zeros(3, 2), **wrong,
    }  # fmt: skip
    with pytest.raises(kind, match="^" + re.escape(f"linear_topk_divergence: {message}")) as error:
        tk.linear_topk_divergence(**arguments)
    assert "\n" not in str(error.value)
