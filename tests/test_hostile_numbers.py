"""Every backend where logits are huge, columns removed, targets impossible or inputs NaN: as the float64 oracle, and
finite where it is."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    BACKENDS,
    EVERYTHING,
    HEADS,
    TOLERANCE,
    affordable,
    assert_close,
    assert_same_result,
    make_case,
    oracle,
    policy_loss,
    run,
)
from test_conformance import dtypes

import trapo_kernels as tk

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_logits_of_ten_thousand(backend, dtype):
    case = make_case(30, 257, dtype=torch.float64)
    with torch.no_grad():
        # Whole numbers, so that fp32 logits are exact and all error is the kernel's.
        case.hidden.copy_((case.hidden * 40).round())
        case.weight.copy_((case.weight * 100).round())
    case = case.to(dtype)
    assert (case.hidden @ case.weight.T).abs().max() > 1e4
    objective = tk.Objective.trapo(entropy_coef=0.1)
    case.inputs["old_logprobs"] = None
    assert_same_result(run(case, objective, backend), oracle(case, objective), dtype)


@dtypes
def test_a_bias_of_minus_infinity_removes_a_column(backend, dtype):
    case = make_case(30, 33, dtype=dtype, with_bias=True)
    removed = 5
    case.targets[case.targets == removed] = 6
    with torch.no_grad():
        case.bias[removed] = -torch.inf
    actual = run(case, EVERYTHING, backend)
    assert all(torch.isfinite(g).all() for g in actual.grads)
    assert not actual.grads[1][removed].any()
    assert_same_result(actual, oracle(case, EVERYTHING), dtype)
    smaller = make_case(30, 33, dtype=dtype, with_bias=True)
    keep = torch.arange(33) != removed
    smaller.weight, smaller.bias = case.weight.detach()[keep], case.bias.detach()[keep]
    smaller.targets = case.targets - (case.targets > removed).long()
    assert_close(run(smaller, EVERYTHING, backend).loss, actual.loss, TOLERANCE[dtype], "loss", floor=1.0)


def test_an_impossible_target_has_finite_gradients(backend):
    case = make_case(30, 33, dtype=torch.float32, with_bias=True)
    case.targets[:10] = 5
    with torch.no_grad():
        case.bias[5] = -torch.inf
    for objective in (tk.Objective.trapo(entropy_coef=0.1), tk.Objective.dft(), tk.Objective.luffy()):
        for old in (None, case.inputs["old_logprobs"]):
            out = run(case, objective, backend, old_logprobs=old)
            assert torch.isfinite(out.loss)
            assert all(torch.isfinite(g).all() for g in out.grads)
            assert_same_result(
                with_finite_logprobs(out),
                with_finite_logprobs(oracle(case, objective, old_logprobs=old)),
                torch.float32,
            )
    assert run(case, tk.Objective.sft(), backend).loss == torch.inf


@pytest.mark.parametrize("head", ["plain", "softcap"])
@pytest.mark.parametrize("loss", ["mse", "logcosh"])
def test_a_removed_target_has_no_gradient_of_its_logit(backend, loss, head):
    case = make_case(12, 33, dtype=torch.float32, with_bias=True, **HEADS[head])
    case.targets[:6] = 5
    with torch.no_grad():
        case.bias[5] = -torch.inf
    objective = tk.Objective.lco(loss=loss)
    options = {"expert_mask": torch.ones(12, dtype=torch.bool)}
    actual, expected = run(case, objective, backend, **options), oracle(case, objective, **options)
    for name, a, b in zip(("d_hidden", "d_weight", "d_bias"), actual.grads, expected.grads, strict=True):
        assert_close(a, b, 1e-5, name)


def with_finite_logprobs(result):
    assert (result.logprobs == -torch.inf).any()
    result.logprobs = result.logprobs.masked_fill(result.logprobs == -torch.inf, -999.0)
    return result


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_one_poisoned_hidden_row_poisons_its_row_and_the_loss_alone(backend, poison):
    case = make_case(30, 33, dtype=torch.float32)
    clean = run(case, EVERYTHING, backend)
    row = int(clean.logprobs.nonzero()[0])
    with torch.no_grad():
        case.hidden[row, 0] = poison
    out = run(case, EVERYTHING, backend)
    others = torch.arange(30) != row
    assert out.loss.isnan()
    assert out.logprobs[row].isnan()
    assert torch.equal(out.logprobs[others], clean.logprobs[others])
    assert torch.equal(out.entropy[others], clean.entropy[others])
    assert torch.equal(out.grads[0][others], clean.grads[0][others])
    assert out.grads[0][row].isnan().all()
    logprobs = tk.linear_logprobs(case.hidden, case.weight, case.targets, backend=backend).logprobs
    assert logprobs[row].isnan()
    assert logprobs[others].isfinite().all()


def test_nan_advantages_reach_the_loss_and_the_gradient(backend):
    case = make_case(30, 33, dtype=torch.float32)
    own = ~case.inputs["expert_mask"] & case.inputs["mask"] & (case.targets != -100)
    case.inputs["advantages"][own.nonzero()[0]] = torch.nan
    out = run(case, tk.Objective.grpo(), backend)
    assert out.loss.isnan()
    assert out.grads[1].isnan().all()


def test_results_are_equal_bit_for_bit_from_run_to_run(backend):
    case = make_case(affordable(backend, 300), 257, dtype=torch.float32, with_bias=True)
    first, second = run(case, EVERYTHING, backend), run(case, EVERYTHING, backend)
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(a, b) for a, b in zip(first.grads, second.grads, strict=True))


def test_float16_gradients_survive_a_small_normalised_loss_under_a_loss_scale(backend):
    case = make_case(30, 257, dtype=torch.float16)
    exact = oracle(case, EVERYTHING, normalizer=1e7)
    loss = policy_loss(case, EVERYTHING, backend, normalizer=1e7).loss
    grads = torch.autograd.grad(loss * 2.0**20, case.params())
    for actual, expected in zip(grads, exact.grads, strict=True):
        assert_close(actual.double() / 2**20, expected, TOLERANCE[torch.float16], "gradient", floor=0)
