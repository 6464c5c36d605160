"""grad_tolerance: what may be left out of the gradients, and that the share that was is known."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import BACKENDS, EVERYTHING, GemmCounter, assert_close, make_case, policy_loss

import trapo_kernels as tk

needs_cpu = pytest.mark.skipif(not tk.backends()["cpu"].available, reason=str(tk.backends()["cpu"]))


def peaked_case(n=200, vocab=3000, width=32, most=14, **options):
    """Logits of a trained model's kind: most tokens confident, most of the vocabulary out of the question."""
    case = make_case(n, vocab, width, dtype=torch.float32, **options)
    with torch.no_grad():
        # Towards the target's row, so that its logit stands out; by how much differs from token to token.
        push = torch.linspace(0, most, n)[:, None] * case.weight[case.targets.clamp(min=0)]
        case.hidden += push
    return case


def logit_gradient(case, objective, **inputs):
    """dL/dz [N, V] in float64, by autograd through logits that exist."""
    wide = case.to(torch.float64)
    bias = 0 if wide.bias is None else wide.bias
    z = (wide.hidden @ wide.weight.T + bias).requires_grad_()
    loss = tk.policy_loss_from_logits(
        z, wide.targets, objective, backend="reference", **inputs, **case.inputs, **case.head
    ).loss
    return torch.autograd.grad(loss, z)[0]


def gradients(case, objective, **options):
    case = case.to(torch.float32).requires_grad()
    out = policy_loss(case, objective, "cpu", **options)
    return out, torch.autograd.grad(out.loss, case.params())


@needs_cpu
@pytest.mark.parametrize("tolerance", [1e-4, 1e-2, 0.2])
@pytest.mark.parametrize("options", [{}, {"with_bias": True, "softcap": 6.0, "temperature": 0.9}], ids=["plain", "all"])
@pytest.mark.parametrize("budget", [0.5, 144])
def test_what_was_left_out_is_reported_and_keeps_to_the_tolerance(tolerance, options, budget):
    case = peaked_case(**options)
    with tk.budget_mb(budget):
        out, (d_hidden, d_weight, *d_bias) = gradients(case, EVERYTHING, grad_tolerance=tolerance)
    _, exact = gradients(case, EVERYTHING)
    left_out = out.metrics["grad_left_out"].item()
    assert 0 <= left_out <= tolerance
    if tolerance >= 1e-2:
        assert left_out > 0.2 * tolerance  # the tolerance is used
    # Δ of the gradients is linear in what is missing of dL/dz, whose mass is left_out of the whole.
    mass = logit_gradient(case, EVERYTHING).abs().sum() * left_out * 1.01 + 1e-5
    assert (d_hidden - exact[0]).abs().max() <= mass * case.weight.abs().max()
    assert (d_weight - exact[1]).abs().max() <= mass * case.hidden.abs().max()
    for found, wanted in zip(d_bias, exact[2:], strict=True):
        assert (found - wanted).abs().sum() <= mass + 1e-4 * wanted.abs().sum()


@needs_cpu
def test_values_do_not_depend_on_the_tolerance():
    case = peaked_case()
    exact, _ = gradients(case, EVERYTHING)
    sparse, _ = gradients(case, EVERYTHING, grad_tolerance=0.1)
    assert torch.equal(sparse.loss, exact.loss)
    assert torch.equal(sparse.logprobs, exact.logprobs)
    assert "grad_left_out" not in exact.metrics


@needs_cpu
def test_a_tolerance_leaves_out_products():
    case = peaked_case(400, 6000, most=60)

    def macs(tolerance):
        with GemmCounter() as counter:
            gradients(case, EVERYTHING, grad_tolerance=tolerance)
        return counter.macs / (case.hidden.numel() * case.weight.shape[0])

    exact, sparse = macs(0.0), macs(1e-2)
    active = exact / 3
    assert sparse - active < 0.5 * (exact - active)


@needs_cpu
def test_frozen_parameters_and_masked_tokens_go_together_with_a_tolerance():
    case = peaked_case()
    case.weight.requires_grad_(False)
    out = policy_loss(case, EVERYTHING, "cpu", grad_tolerance=1e-3)
    (d_hidden,) = torch.autograd.grad(out.loss, [case.hidden])
    _, exact = gradients(case, EVERYTHING)
    assert_close(d_hidden, exact[0], 2e-2, "d_hidden")


@needs_cpu
def test_a_row_that_is_not_a_number_is_not_left_out():
    case = peaked_case()
    with torch.no_grad():
        case.hidden[3] = torch.nan
    case.inputs["mask"] = None
    case.targets[3] = 1
    _, (d_hidden, d_weight, *_) = gradients(case, EVERYTHING, grad_tolerance=0.1)
    assert d_hidden[3].isnan().all()
    assert d_weight.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_that_save_nothing_stay_exact_and_say_so(backend):
    case = make_case(20, 50, dtype=torch.float64)
    out = policy_loss(case, EVERYTHING, backend, grad_tolerance=0.5)
    exact = policy_loss(case, EVERYTHING, backend)
    assert out.metrics["grad_left_out"] == 0
    for a, b in zip(
        torch.autograd.grad(out.loss, case.params()), torch.autograd.grad(exact.loss, case.params()), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tolerance", [-0.1, 1, 1.5, "0.1", True, float("nan")])
def test_a_tolerance_out_of_range_is_refused(tolerance):
    case = make_case(4, 5)
    with pytest.raises(ValueError, match=r"^linear_policy_loss: grad_tolerance must be a number in \[0, 1\); got "):
        policy_loss(case, EVERYTHING, "torch", grad_tolerance=tolerance)
