"""Every backend, every option: values and gradients against the float64 oracle."""

from __future__ import annotations

import functools
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    BACKENDS,
    DEVICE,
    DTYPES,
    EVERYTHING,
    HEADS,
    OBJECTIVES,
    TOLERANCE,
    affordable,
    assert_close,
    assert_same_result,
    make_case,
    oracle,
    policy_loss,
    run,
    slow,
)

import trapo_kernels as tk

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


def logprobs_and_grads(case, backend):
    """linear_logprobs with a random cotangent on both outputs."""
    case = case.to(case.hidden.dtype).requires_grad()
    out = tk.linear_logprobs(
        case.hidden, case.weight, case.targets, bias=case.bias, entropy=True, backend=backend, **case.head
    )
    g = torch.Generator().manual_seed(7)
    u, v = (torch.randn(case.targets.shape, generator=g, dtype=torch.float64) for _ in range(2))
    value = (u * out.logprobs).sum() + (v * out.entropy).sum()
    return out, torch.autograd.grad(value, case.params())


# Shapes and dtypes -------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def with_oracle(n, vocab, dtype):
    """(a case, its right result), which the backends that take so many rows share."""
    case = make_case(n, vocab, dtype=dtype)
    return case, oracle(case, EVERYTHING)


SIZES = [(n, vocab) for n in (0, 1, 7, 300) for vocab in (1, 2, 257, 50257)]


def sizes_and_dtypes():
    """All of each with all of each; the largest in the slow suite for the dtypes that no such head is trained in."""
    for (n, vocab), dtype in product(SIZES, DTYPES):
        largest = (n, vocab) == SIZES[-1] and dtype in (torch.float64, torch.float16)
        yield pytest.param(
            n, vocab, dtype, marks=[pytest.mark.slow] if largest else [], id=f"{n}-{vocab}-{name_of(dtype)}"
        )


@pytest.mark.parametrize(("n", "vocab", "dtype"), list(sizes_and_dtypes()))
def test_loss_and_gradients_at_every_size_and_dtype(backend, n, vocab, dtype):
    if backend == "cuda-on-cpu" and n * vocab > 10**6:
        pytest.skip("takes minutes on fibers; 7 rows of this vocabulary are run")
    case, expected = with_oracle(affordable(backend, n, vocab), vocab, dtype)
    assert_same_result(run(case, EVERYTHING, backend), expected, dtype, terms=vocab)


@dtypes
@pytest.mark.parametrize(("n", "vocab"), [(0, 257), (1, 1), (1, 50257), (7, 2), (300, 257)])
def test_logprobs_entropy_and_gradients_at_every_size_and_dtype(backend, n, vocab, dtype):
    case = make_case(affordable(backend, n, vocab), vocab, dtype=dtype)
    actual, grads = logprobs_and_grads(case, backend)
    expected, expected_grads = logprobs_and_grads(case.to(torch.float64), "reference")
    assert actual.logprobs.dtype == actual.entropy.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(actual.logprobs, expected.logprobs, TOLERANCE[dtype], "logprobs", floor=1.0)
    assert_close(actual.entropy, expected.entropy, TOLERANCE[dtype], "entropy", floor=1.0)
    for name, a, b in zip(("d_hidden", "d_weight"), grads, expected_grads, strict=True):
        assert a.dtype == dtype
        assert_close(a, b, TOLERANCE[dtype], name)


# Options -----------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("head", HEADS)
def test_head_options(backend, head, dtype):
    case = make_case(affordable(backend, 40), 257, dtype=dtype, **HEADS[head])
    assert_same_result(run(case, EVERYTHING, backend), oracle(case, EVERYTHING), dtype)


@pytest.mark.parametrize("head", HEADS)
def test_head_options_of_logprobs(backend, head):
    case = make_case(affordable(backend, 40), 257, dtype=torch.float32, **HEADS[head])
    actual, grads = logprobs_and_grads(case, backend)
    expected, expected_grads = logprobs_and_grads(case.to(torch.float64), "reference")
    assert_close(actual.logprobs, expected.logprobs, 1e-5, "logprobs", floor=1.0)
    for a, b in zip(grads, expected_grads, strict=True):
        assert_close(a, b, 1e-5, "gradient")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_preset(backend, objective):
    case = make_case(affordable(backend, 60), 257, dtype=torch.float32)
    chosen = OBJECTIVES[objective]
    actual, expected = run(case, chosen, backend), oracle(case, chosen)
    assert_same_result(actual, expected, torch.float32)
    assert actual.metrics.keys() == expected.metrics.keys()
    for name in expected.metrics:
        assert_close(actual.metrics[name], expected.metrics[name], 1e-5, name, floor=1.0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_old_logprobs_the_ratio_is_one_with_its_gradient(backend, objective):
    case = make_case(affordable(backend, 30), 257, dtype=torch.float32)
    case.inputs["old_logprobs"] = None
    assert_same_result(run(case, OBJECTIVES[objective], backend), oracle(case, OBJECTIVES[objective]), torch.float32)


# Heads and terms meet nowhere: every head with all terms at once, and two of them with the term that has an advantage.
CHECKED = [("everything", head) for head in HEADS] + [("luffy", "plain"), ("luffy", "all")]
CHECKED += [pytest.param("luffy", head, marks=pytest.mark.slow) for head in HEADS if head not in ("plain", "all")]


@pytest.mark.parametrize(("objective", "head"), CHECKED)
def test_gradcheck_in_float64(backend, objective, head):
    case = make_case(affordable(backend, 6), 5, width=3, **HEADS[head])
    chosen = OBJECTIVES[objective]

    def loss(hidden, weight, bias):
        return tk.linear_policy_loss(
            hidden, weight, case.targets, chosen, bias=bias, backend=backend, **case.inputs, **case.head
        ).loss

    assert torch.autograd.gradcheck(loss, (case.hidden, case.weight, case.bias), fast_mode=slow(backend))


@pytest.mark.parametrize("head", HEADS)
def test_gradcheck_of_logprobs_and_entropy_in_float64(backend, head):
    case = make_case(affordable(backend, 6), 5, width=3, **HEADS[head])

    def outputs(hidden, weight, bias):
        return tuple(
            tk.linear_logprobs(hidden, weight, case.targets, bias=bias, entropy=True, backend=backend, **case.head)
        )

    assert torch.autograd.gradcheck(outputs, (case.hidden, case.weight, case.bias), fast_mode=slow(backend))


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias", "hidden weight", "weight bias", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_choice_of_trained_parameters(backend, wanted, dtype):
    case = make_case(affordable(backend, 20), 33, dtype=dtype, with_bias=True)
    expected = dict(zip(("hidden", "weight", "bias"), oracle(case, EVERYTHING).grads, strict=True))
    for name in expected:
        getattr(case, name).requires_grad_(name in wanted)
    loss = policy_loss(case, EVERYTHING, backend).loss
    assert loss.requires_grad == bool(wanted)
    if wanted:
        loss.backward()
    for name, gradient in expected.items():
        if name in wanted:
            assert_close(getattr(case, name).grad, gradient, TOLERANCE[dtype], name)
        else:
            assert getattr(case, name).grad is None


def test_batched_non_contiguous_inputs_and_one_advantage_per_sequence(backend):
    flat = make_case(12, 33)
    hidden = flat.hidden.detach().reshape(3, 4, -1).transpose(0, 1).contiguous().transpose(0, 1)
    weight = flat.weight.detach().t().contiguous().t()
    assert not hidden.is_contiguous()
    assert not weight.is_contiguous()
    inputs = {name: t.reshape(3, 4) for name, t in flat.inputs.items()}
    per_sequence = torch.tensor([1.0, 0.0, -2.0])
    flat.inputs["advantages"] = per_sequence[:, None].expand(3, 4).reshape(12)
    expected = oracle(flat, EVERYTHING)
    for advantages in (per_sequence, per_sequence[:, None], per_sequence[:, None].expand(3, 4)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = tk.linear_policy_loss(
            h, w, flat.targets.reshape(3, 4), EVERYTHING, backend=backend, **{**inputs, "advantages": advantages}
        )
        out.loss.backward()
        assert_close(out.loss, expected.loss, 1e-11, "loss")
        assert out.logprobs.shape == out.entropy.shape == (3, 4)
        assert_close(out.logprobs.reshape(-1), expected.logprobs, 1e-11, "logprobs")
        assert_close(h.grad.reshape(12, -1), expected.grads[0], 1e-11, "d_hidden")
        assert_close(w.grad, expected.grads[1], 1e-11, "d_weight")


@dtypes
@pytest.mark.parametrize("head", ["plain", "all"])
def test_from_logits_forms_agree_with_the_oracle(backend, head, dtype):
    case = make_case(affordable(backend, 40), 257, dtype=dtype, **{**HEADS[head], "with_bias": False})
    logits = (case.hidden.detach().double() @ case.weight.detach().double().T).to(dtype)

    def both(logits, backend):
        logits = logits.detach().requires_grad_()
        out = tk.policy_loss_from_logits(logits, case.targets, EVERYTHING, backend=backend, **case.inputs, **case.head)
        lp = tk.logprobs_from_logits(logits, case.targets, entropy=True, backend=backend, **case.head)
        return out, lp, torch.autograd.grad(out.loss + 0.1 * lp.logprobs.sum() + 0.2 * lp.entropy.sum(), logits)

    out, lp, (grad,) = both(logits, backend)
    expected, expected_lp, (expected_grad,) = both(logits.double(), "reference")
    assert grad.dtype == dtype
    assert out.loss.dtype == torch.promote_types(dtype, torch.float32)
    # The logits are given, not rounded by a GEMM: only the gradient's own rounding is left.
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5}.get(dtype, 1e-5)
    assert_close(out.loss, expected.loss, tolerance, "loss", floor=1.0)
    assert_close(lp.logprobs, expected_lp.logprobs, tolerance, "logprobs")
    assert_close(lp.entropy, expected_lp.entropy, tolerance, "entropy")
    assert_close(grad, expected_grad, TOLERANCE[dtype], "d_logits")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32], ids=str)
def test_autocast_changes_nothing(backend, dtype):
    case = make_case(affordable(backend, 40), 257, dtype=dtype, with_bias=True)
    plain = run(case, EVERYTHING, backend)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = policy_loss(case, EVERYTHING, backend).loss
    assert torch.equal(loss, plain.loss)
    grads = torch.autograd.grad(loss, case.params())
    assert all(torch.equal(a, b) for a, b in zip(grads, plain.grads, strict=True))


# Which tokens count ------------------------------------------------------------------------------------------


def test_all_ignored_or_all_masked_gives_zero_and_zero_gradients(backend):
    for which in ("targets", "mask"):
        case = make_case(9, 33, dtype=torch.float32, with_bias=True)
        if which == "targets":
            case.targets.fill_(-100)
        else:
            case.inputs["mask"].fill_(False)
        out = run(case, EVERYTHING, backend)
        assert out.loss == 0
        assert all(not g.any() for g in out.grads)
        assert not out.logprobs.any()
        assert all(torch.isfinite(value) for value in out.metrics.values())
        assert out.metrics["tokens"] == 0


def test_all_expert(backend):
    case = make_case(30, 257, dtype=torch.float32)
    case.inputs["expert_mask"].fill_(True)
    out = run(case, EVERYTHING, backend)
    assert_same_result(out, oracle(case, EVERYTHING), torch.float32)
    assert out.metrics["own_tokens"] == 0
    assert out.metrics["loss_policy"] == 0


def test_zero_advantages_give_no_policy_gradient(backend):
    case = make_case(30, 257, dtype=torch.float32)
    case.inputs["advantages"].zero_()
    out = run(case, tk.Objective.grpo(), backend)
    assert out.loss == 0
    assert all(not g.any() for g in out.grads)
    assert out.metrics["zero_gradient_tokens"] == out.metrics["tokens"] > 0
    # ... but the metrics are whole.
    assert out.metrics["entropy"] > 1
    assert (out.logprobs != 0).sum() == out.metrics["tokens"]
    assert_same_result(run(case, EVERYTHING, backend), oracle(case, EVERYTHING), torch.float32)


def test_skip_inactive_changes_no_loss_and_no_gradient_but_leaves_tokens_out(backend):
    case = make_case(60, 257)
    whole, skipped = (
        run(case, tk.Objective.trapo(), backend),
        run(case, tk.Objective.trapo(), backend, skip_inactive=True),
    )
    assert whole.metrics["zero_gradient_tokens"] > 0
    assert_close(skipped.loss, whole.loss, 1e-12, "loss")
    for a, b in zip(skipped.grads, whole.grads, strict=True):
        assert_close(a, b, 1e-12, "gradient")
    for name in ("tokens", "zero_gradient_tokens"):
        assert skipped.metrics[name] == whole.metrics[name]
    missing = whole.metrics["computed_tokens"] - skipped.metrics["computed_tokens"]
    assert missing == whole.metrics["zero_gradient_tokens"]
    assert (skipped.logprobs != 0).sum() == skipped.metrics["computed_tokens"]


def test_what_other_tokens_are_padded_with_does_not_matter(backend):
    case = make_case(40, 33)
    expected = run(case, EVERYTHING, backend)
    inactive = ~case.inputs["mask"] | (case.targets == -100)
    own_only = inactive | case.inputs["expert_mask"]
    for name in ("advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs"):
        case.inputs[name] = case.inputs[name].masked_fill(own_only, torch.nan)
    case.targets = case.targets.masked_fill(~case.inputs["mask"], 10**6)
    with torch.no_grad():
        case.hidden[inactive] = torch.nan
    actual = run(case, EVERYTHING, backend)
    assert torch.equal(actual.loss, expected.loss)
    assert torch.equal(actual.grads[1], expected.grads[1])
    assert not actual.grads[0][inactive].any()


@pytest.mark.parametrize("normalizer", [7, 7.0, torch.tensor(7), torch.tensor(7.0)])
def test_normalizer_divides_the_sum(backend, normalizer):
    case = make_case(20, 33)
    default, given = run(case, EVERYTHING, backend), run(case, EVERYTHING, backend, normalizer=normalizer)
    factor = default.metrics["tokens"] / 7
    assert_close(given.loss, default.loss * factor, 1e-12, "loss")
    for a, b in zip(given.grads, default.grads, strict=True):
        assert_close(a, b * factor, 1e-12, "gradient")


def test_micro_batches_with_one_normalizer_add_up_to_the_batch(backend):
    case = make_case(50, 33)
    whole = run(case, EVERYTHING, backend, normalizer=50)
    loss, grads = 0.0, [torch.zeros_like(p) for p in case.params()]
    for at in (slice(0, 13), slice(13, 50)):
        part = make_case(50, 33)
        part.hidden, part.targets = part.hidden[at].detach(), part.targets[at]
        part.inputs = {name: t[at] for name, t in part.inputs.items()}
        out = run(part, EVERYTHING, backend, normalizer=50)
        loss += out.loss
        grads[0][at], grads[1] = out.grads[0], grads[1] + out.grads[1]
    assert_close(loss, whole.loss, 1e-12, "loss")
    for a, b in zip(grads, whole.grads, strict=True):
        assert_close(a, b, 1e-12, "gradient")


# Properties --------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 40),
    vocab=st.integers(1, 70),
    width=st.integers(1, 9),
    seed=st.integers(0, 2**20),
    head=st.sampled_from(list(HEADS)),
    objective=st.sampled_from(list(OBJECTIVES)),
    kilobytes=st.floats(0.1, 5000),
)
def test_any_small_problem_agrees_with_the_oracle(backend, n, vocab, width, seed, head, objective, kilobytes):
    if slow(backend) and seed % 4:
        return  # a quarter of the examples
    case = make_case(affordable(backend, n), vocab, width, seed=seed, **HEADS[head])
    with tk.budget_mb(kilobytes / 1024):
        actual = run(case, OBJECTIVES[objective], backend)
    assert_same_result(actual, oracle(case, OBJECTIVES[objective]), torch.float64)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), shift=st.floats(-50, 50), head=st.sampled_from(["plain", "temperature", "scale"]))
def test_adding_a_constant_to_all_logits_changes_nothing(backend, seed, shift, head):
    if slow(backend) and seed % 4:
        return  # a quarter of the examples
    case = make_case(affordable(backend, 8), 19, 4, seed=seed, with_bias=True, **HEADS[head])
    before = run(case, EVERYTHING, backend)
    case.bias = case.bias.detach() + shift
    after = run(case, EVERYTHING, backend)
    assert_close(after.logprobs, before.logprobs, 1e-10, "logprobs")
    for a, b in zip(after.grads, before.grads, strict=True):
        assert_close(a, b, 1e-10, "gradient")
    # and so the gradient of a row of logits sums to zero
    assert abs(after.grads[2].sum()) < 1e-12


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_the_order_of_tokens_and_of_the_vocabulary_does_not_matter(backend, seed):
    if slow(backend) and seed % 4:
        return  # a quarter of the examples
    n = affordable(backend, 12)
    case = make_case(n, 19, 4, seed=seed)
    before = run(case, EVERYTHING, backend)
    g = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(n, generator=g), torch.randperm(19, generator=g)
    case.hidden, case.weight = case.hidden.detach()[rows], case.weight.detach()[columns]
    place = columns.argsort()
    case.targets = torch.where(case.targets == -100, -100, place[case.targets.clamp(min=0)])[rows]
    case.inputs = {name: t[rows] for name, t in case.inputs.items()}
    after = run(case, EVERYTHING, backend)
    assert_close(after.loss, before.loss, 1e-11, "loss")
    assert_close(after.grads[0], before.grads[0][rows], 1e-11, "d_hidden")
    assert_close(after.grads[1], before.grads[1][columns], 1e-11, "d_weight")
