"""expert_normalizer and reduction="region_mean": expert and own tokens have divisors of their own, on every path."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kernel_cases import BACKENDS, EVERYTHING, STREAMED, TOLERANCE, affordable, assert_close, gemms, make_case, run
from kernel_cases import policy_loss as call

import trapo_kernels as tk

backends = pytest.mark.parametrize("backend", BACKENDS)


def focal(logprobs, entropy, advantages):
    return -advantages * ((1 - logprobs.exp()) ** 2) * logprobs + 0.1 * entropy.square()


OBJECTIVES = {
    "everything": EVERYTHING,  # by the kernels' own slopes where they have them
    "chord": tk.Objective.chord(0.3, entropy_coef=0.02),  # by slopes of terms.py
    "coupled": tk.Objective(expert="pear", policy="gspo", clip_low=0.1, clip_high=0.2, entropy_coef=0.02),
    "logits": tk.Objective(expert="lco_mse", policy="clip"),
    "own": tk.Objective(expert="sft", policy=focal, entropy_coef=0.01),
}


def case_of(n, backend, dtype=torch.float64, vocab=67):
    case = make_case(affordable(backend, n), vocab, dtype=dtype, with_bias=True)
    n = len(case.targets)
    case.inputs["sequence_ids"] = torch.arange(n) * 3 // n
    case.inputs["expert_mask"][n // 2] = ~case.inputs["expert_mask"][n // 2]
    return case


def two_losses(case, objective, of_experts, of_own):
    """Loss and gradients of the oracle over the expert tokens alone plus those over the own tokens alone."""
    mask, expert = case.inputs["mask"], case.inputs["expert_mask"]
    parts = []
    for region, divisor in ((expert, of_experts), (~expert, of_own)):
        part = case.to(torch.float64).requires_grad()
        part.inputs = {**case.inputs, "mask": mask & region}
        parts.append((run(part, dataclasses.replace(objective, reduction="sum"), "reference"), divisor))
    loss = sum(part.loss / divisor for part, divisor in parts)
    return loss, [sum(part.grads[i] / divisor for part, divisor in parts) for i in range(3)]


@backends
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_is_that_of_the_expert_tokens_and_that_of_the_own_tokens_each_by_its_divisor(backend, name):
    case, o = case_of(40, backend), OBJECTIVES[name]
    loss, grads = two_losses(case, o, 5, 700)
    found = run(case, o, backend, normalizer=700, expert_normalizer=torch.tensor(5))
    assert_close(found.loss, loss, 1e-12, "loss")
    for actual, expected in zip(found.grads, grads, strict=True):
        assert_close(actual, expected, 1e-11, "gradient")
    parts = [found.metrics[f"loss_{part}"] for part in ("expert", "policy", "entropy", "kl")]
    assert_close(sum(parts), loss, 1e-12, "parts")


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_hold_in_every_dtype(backend, dtype):
    case = case_of(40, backend, dtype)
    loss, grads = two_losses(case, EVERYTHING, 5, 700)
    found = run(case, EVERYTHING, backend, normalizer=700, expert_normalizer=5)
    assert_close(found.loss, loss, TOLERANCE[dtype], "loss", floor=1.0)
    for actual, expected in zip(found.grads, grads, strict=True):
        assert_close(actual, expected, TOLERANCE[dtype], "gradient")


@backends
def test_region_mean_divides_each_region_by_its_number_of_active_tokens(backend):
    case, o = case_of(40, backend), OBJECTIVES["chord"]
    active, expert = case.inputs["mask"] & (case.targets != -100), case.inputs["expert_mask"]
    counts = int((active & expert).sum()), int((active & ~expert).sum())
    assert counts[0] != counts[1]
    loss, grads = two_losses(case, o, *counts)
    found = run(case, o, backend)
    assert_close(found.loss, loss, 1e-12, "loss")
    assert_close(found.grads[1], grads[1], 1e-11, "gradient")


@pytest.mark.parametrize("empty", ["expert", "own"])
def test_a_region_without_a_token_gives_nothing_and_leaves_the_others_mean_alone(empty):
    case = case_of(30, "torch")
    case.inputs["expert_mask"] = torch.full_like(case.inputs["mask"], empty == "own")
    o = tk.Objective(expert="sft", policy="clip", reduction="region_mean")
    found, plain = run(case, o, "torch"), run(case, tk.Objective(expert="sft", policy="clip"), "torch")
    assert_close(found.loss, plain.loss, 1e-12, "loss")
    assert_close(found.grads[0], plain.grads[0], 1e-12, "gradient")


@backends
def test_chord_is_mu_times_a_mean_over_expert_tokens_and_the_rest_times_one_over_own_tokens(backend):
    """Trinity-RFT's chord_policy_loss.py and ms-swift: (1 − μ) · GRPO + μ · weighted SFT, a masked mean each."""
    case, mu = case_of(40, backend), 0.3
    fresh = case.to(torch.float64).requires_grad()
    z = fresh.hidden @ fresh.weight.T + fresh.bias
    logp = z.log_softmax(-1).gather(1, fresh.targets.clamp(min=0)[:, None])[:, 0]
    active, expert = case.inputs["mask"] & (case.targets != -100), case.inputs["expert_mask"]
    p = logp.detach().exp()
    a, r = case.inputs["advantages"], (logp - case.inputs["old_logprobs"]).exp()
    sft = (-p * (1 - p) * logp)[active & expert].mean()
    grpo = -torch.minimum(r * a, r.clamp(0.8, 1.2) * a)[active & ~expert].mean()
    loss = mu * sft + (1 - mu) * grpo
    found = run(case, tk.Objective.chord(mu), backend)
    assert_close(found.loss, loss, 1e-12, "loss")
    expected = torch.autograd.grad(loss, fresh.params())
    for actual, grad in zip(found.grads, expected, strict=True):
        assert_close(actual, grad, 1e-11, "gradient")


def test_forms_from_logits_and_from_logprobs_take_it_too():
    case, o = case_of(40, "torch"), OBJECTIVES["everything"]
    loss, _ = two_losses(case, o, 5, 700)
    logits = (case.hidden @ case.weight.T + case.bias).detach()
    found = tk.policy_loss_from_logits(
        logits, case.targets, o, backend="torch", normalizer=700, expert_normalizer=5, **case.inputs
    )
    assert_close(found.loss, loss, 1e-12, "logits")
    values = {**case.inputs, "mask": case.inputs["mask"] & (case.targets != -100), "entropy": found.entropy}
    found = tk.policy_loss_from_logprobs(found.logprobs, o, normalizer=700, expert_normalizer=5, **values)
    assert_close(found.loss, loss, 1e-12, "logprobs")


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_compiled_loss_has_them_and_one_graph_for_all_counts(backend):
    case, o = case_of(40, backend), OBJECTIVES["everything"]

    def loss(hidden, divisors):
        return tk.linear_policy_loss(
            hidden, case.weight, case.targets, o, bias=case.bias, backend=backend, normalizer=divisors[0],
            expert_normalizer=divisors[1], **case.inputs,
        ).loss  # fmt: skip

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        for own, expert in ((700, 5), (9, 30)):
            expected, grads = two_losses(case, o, expert, own)
            found = compiled(case.hidden, torch.tensor([own, expert]).unbind())
            assert_close(found, expected, 1e-12, "loss")
            (actual,) = torch.autograd.grad(found, [case.hidden])
            assert_close(actual, grads[0], 1e-11, "gradient")


@pytest.mark.parametrize("backend", STREAMED[:1])
def test_the_weights_cost_no_second_pass(backend):
    case = case_of(40, backend)
    one = gemms(lambda: run(case, EVERYTHING, backend), case)
    assert gemms(lambda: run(case, EVERYTHING, backend, expert_normalizer=3), case) == one


@pytest.mark.parametrize("wrong", [0, -1, "8", float("nan"), True, torch.ones(2)])
def test_what_is_no_divisor_is_refused_by_its_name(wrong):
    case = case_of(8, "torch")
    with pytest.raises(ValueError, match=r"^linear_policy_loss: expert_normalizer must be a number above 0 or a 0-dim"):
        call(case, EVERYTHING, "torch", expert_normalizer=wrong)
