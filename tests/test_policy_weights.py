"""policy_weights: a constant factor on a token's policy term, the same on every path, and on nothing else of it."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import (
    BACKENDS,
    DTYPES,
    EVERYTHING,
    STREAMED,
    TOLERANCE,
    affordable,
    assert_close,
    gemms,
    make_case,
    run,
)
from kernel_cases import policy_loss as call

import trapo_kernels as tk

backends = pytest.mark.parametrize("backend", BACKENDS)


def focal(logprobs, entropy, advantages):
    return -advantages * ((1 - logprobs.exp()) ** 2) * logprobs + 0.1 * entropy.square()


OBJECTIVES = {
    "everything": EVERYTHING,
    "luffy": tk.Objective.luffy(entropy_coef=0.01),  # whose expert term reads the advantage too
    "half": tk.Objective(policy_coef=0.5, kl_coef=0.1, reduction="sequence_mean"),
    "cispo": tk.Objective.cispo(entropy_coef=0.02),
    "sapo": tk.Objective.sapo(tis_cap=1.5),
    "gspo": tk.Objective.gspo(kl_coef=0.1),
    "own": tk.Objective(expert="sft", policy=focal),
}


def own_tokens(case):
    return case.inputs["mask"] & ~case.inputs["expert_mask"] & (case.targets != -100)


def with_weights(n, vocab=97, dtype=torch.float64, **head):
    """A case, its weights among the inputs: of any size, and 0 at every third own token; three sequences."""
    case = make_case(n, vocab, dtype=dtype, with_bias=True, **head)
    weights = torch.rand(n, generator=torch.Generator().manual_seed(0)) * 3
    weights[own_tokens(case).nonzero()[::3]] = 0
    case.inputs |= {"policy_weights": weights, "sequence_ids": torch.arange(n) * 3 // n}
    return case


def plainly(case, o):
    """(loss, gradients) from all logits in float64, every part of a token's loss by itself."""
    case = case.to(torch.float64).requires_grad()
    z = case.hidden @ case.weight.T + case.bias
    z = z * case.head.get("logit_scale", 1.0) / case.head.get("temperature", 1.0)
    log_pi = z.log_softmax(-1)
    inputs = {name: t for name, t in case.inputs.items() if name not in ("mask", "expert_mask", "policy_weights")}
    active = (case.targets != -100) & case.inputs["mask"]
    ids = inputs.pop("sequence_ids")[active]
    tokens = tk.Tokens(
        log_pi.gather(1, case.targets.clamp(min=0)[:, None]).squeeze(1)[active],
        -(log_pi.exp() * log_pi).sum(1)[active],
        case.inputs["expert_mask"][active],
        **{name: t[active].double() for name, t in inputs.items()},
        sequences=tk.Sequences.of(ids),
    )
    parts = o.losses(tokens)
    parts["policy"] = parts["policy"] * case.inputs["policy_weights"].double()[active]
    total = sum(parts.values())
    if o.reduction == "sequence_mean":
        loss = sum(total[ids == i].mean() for i in ids.unique()) / len(ids.unique())
    else:
        loss = total.sum() / active.sum()
    return loss.detach(), torch.autograd.grad(loss, case.params())


@backends
@pytest.mark.parametrize("name", OBJECTIVES)
def test_weights_multiply_the_policy_term_and_nothing_else(backend, name):
    case = with_weights(affordable(backend, 60))
    expected, grads = plainly(case, OBJECTIVES[name])
    found = run(case, OBJECTIVES[name], backend)
    assert_close(found.loss, expected, 1e-11, "loss", floor=1.0)
    for what, a, b in zip(("d_hidden", "d_weight", "d_bias"), found.grads, grads, strict=True):
        assert_close(a, b, 1e-11, what)


@backends
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64], ids=str)
def test_weights_are_right_in_every_dtype(backend, dtype):
    case = with_weights(affordable(backend, 60), dtype=dtype, temperature=1.7)
    expected, grads = plainly(case, EVERYTHING)
    found = run(case, EVERYTHING, backend)
    assert_close(found.loss, expected, TOLERANCE[dtype], "loss", floor=1.0)
    for what, a, b in zip(("d_hidden", "d_weight", "d_bias"), found.grads, grads, strict=True):
        assert_close(a, b, TOLERANCE[dtype], what)


@backends
def test_skipping_tokens_without_gradient_changes_no_gradient(backend):
    case, n = with_weights(affordable(backend, 60)), affordable(backend, 60)
    one, other = (run(case, tk.Objective.grpo(), backend, skip_inactive=skip) for skip in (False, True))
    for a, b in zip(one.grads, other.grads, strict=True):
        assert_close(b, a, 1e-11, "gradient")
    live = own_tokens(case) & (case.inputs["advantages"] != 0) & (case.inputs["policy_weights"] != 0)
    assert n > live.sum() == other.metrics["computed_tokens"]


@pytest.mark.parametrize("backend", STREAMED)
def test_tokens_of_weight_zero_cost_the_first_product_alone(backend):
    case = make_case(40, 64)
    case.inputs["mask"] = case.inputs["expert_mask"] = None
    case.targets.clamp_(min=0)
    nothing = torch.zeros(40)

    def step(**inputs):
        call(case, tk.Objective.grpo(), backend, **inputs).loss.backward()

    assert gemms(lambda: step(policy_weights=nothing), case) == 1
    assert gemms(lambda: step(advantages=torch.ones(40)), case) == 3


@backends
@pytest.mark.parametrize("name", ["everything", "sapo", "own", "gspo"])
def test_a_token_of_weight_zero_has_no_policy_term_whatever_it_holds(backend, name):
    case = with_weights(affordable(backend, 40))
    ignored = (case.inputs["policy_weights"] == 0) & ~case.inputs["expert_mask"]
    assert (ignored & own_tokens(case)).any()
    o = OBJECTIVES[name]
    clean = run(case, o, backend)
    if name != "gspo":  # whose ratio is of all tokens
        case.inputs["old_logprobs"] = case.inputs["old_logprobs"].masked_fill(ignored, -1e4)  # r overflows
    case.inputs["advantages"] = case.inputs["advantages"].masked_fill(ignored, torch.inf)
    found = run(case, o, backend)
    assert torch.equal(found.loss, clean.loss)
    for a, b in zip(found.grads, clean.grads, strict=True):
        assert torch.equal(a, b)


@backends
def test_what_weights_hold_at_other_tokens_does_not_matter(backend):
    case = with_weights(affordable(backend, 40))
    clean = run(case, EVERYTHING, backend)
    others = case.inputs["expert_mask"] | ~case.inputs["mask"] | (case.targets == -100)
    for value in (torch.nan, torch.inf, -1.0):
        case.inputs["policy_weights"] = case.inputs["policy_weights"].masked_fill(others, value)
        found = run(case, EVERYTHING, backend)
        assert torch.equal(found.loss, clean.loss)
        for a, b in zip(found.grads, clean.grads, strict=True):
            assert torch.equal(a, b)


@backends
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_no_number_is_not_hidden(backend, value):
    case = with_weights(affordable(backend, 40))
    own = own_tokens(case) & (case.inputs["advantages"] != 0)
    case.inputs["policy_weights"][own.nonzero()[0]] = value
    assert not run(case, tk.Objective.trapo(), backend).loss.isfinite()


@backends
def test_a_weight_below_zero_is_refused(backend):
    case = with_weights(8)
    case.targets.clamp_(min=0)
    case.inputs |= {"mask": None, "expert_mask": None}
    case.inputs["policy_weights"][3] = -0.5
    with pytest.raises(
        ValueError, match=r"linear_policy_loss: policy_weights must be at least 0 at own tokens; got min -0.5"
    ):
        call(case, tk.Objective.grpo(), backend)


def test_weights_can_be_one_per_sequence():
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((3, 5, 8), (11, 8)))
    targets, advantages = torch.randint(0, 11, (3, 5), generator=g), torch.randn(3, generator=g)
    each = torch.tensor([0.5, 0.0, 2.0])
    losses = [
        tk.linear_policy_loss(
            hidden, weight, targets, tk.Objective.grpo(), advantages=advantages, policy_weights=w
        ).loss
        for w in (each, each[:, None], each[:, None].expand(3, 5))
    ]
    assert losses[0] == losses[1] == losses[2] != 0
    with pytest.raises(
        ValueError, match=r"policy_weights must be \[3, 5\] as targets or one per sequence, \[3\]; got \[5\]"
    ):
        tk.linear_policy_loss(
            hidden, weight, targets, tk.Objective.grpo(), advantages=advantages, policy_weights=each.new_ones(5)
        )


def test_the_loss_from_logits_and_the_module_take_weights_too():
    case = with_weights(40)
    expected, _ = plainly(case, EVERYTHING)
    logits = case.hidden @ case.weight.T + case.bias
    assert_close(
        tk.policy_loss_from_logits(logits, case.targets, EVERYTHING, **case.inputs).loss, expected, 1e-11, "logits"
    )
    module = tk.TrapoLoss(EVERYTHING, bias=case.bias)
    assert_close(module(case.hidden, case.weight, case.targets, **case.inputs).loss, expected, 1e-11, "module")


def test_weights_have_no_gradient():
    case = with_weights(20)
    case.inputs["policy_weights"].requires_grad_()
    call(case, EVERYTHING, "torch").loss.backward()
    assert case.inputs["policy_weights"].grad is None


@pytest.mark.parametrize("name", ["everything", "gspo", "own"])
def test_a_compiled_graph_takes_weights(name):
    torch._dynamo.reset()
    case, o = with_weights(40), OBJECTIVES[name]
    compiled = torch.compile(lambda: call(case, o, "torch").loss, backend="aot_eager", fullgraph=True)
    loss = compiled()
    grads = torch.autograd.grad(loss, case.params())
    expected, expected_grads = plainly(case, o)
    assert_close(loss, expected, 1e-11, "loss", floor=1.0)
    for a, b in zip(grads, expected_grads, strict=True):
        assert_close(a, b, 1e-11, "gradient")
    case.inputs["policy_weights"][own_tokens(case).nonzero()[0]] = -1.0  # values cannot be looked at: the loss is none
    assert math.isnan(float(compiled().detach()))
