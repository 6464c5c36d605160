"""policy_loss_from_logprobs: the same function of log-probabilities and entropies as every other loss."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import EVERYTHING, OBJECTIVES, assert_close, make_case

import trapo_kernels as tk


def focal(logprobs, entropy, advantages, old_logprobs=None):
    return -advantages * ((1 - logprobs.exp()) ** 2) * logprobs + 0.1 * entropy.square()


LOSSES = {
    **OBJECTIVES,
    "chord": tk.Objective.chord(),
    "pear": tk.Objective.pear(),
    "gspo": tk.Objective.gspo(kl_coef=0.1, entropy_coef=0.02),
    "cispo": tk.Objective.cispo(),
    "sapo": tk.Objective.sapo(tis_cap=1.5),
    "sequence mean": tk.Objective.trapo(reduction="sequence_mean"),
    "sum": tk.Objective.grpo(reduction="sum"),
    "own": tk.Objective(expert=focal, policy=focal),
}


def from_case(n=60, dtype=torch.float64):
    """(logits of a case, its targets, its inputs with weights and sequences)."""
    case = make_case(n, 97, dtype=dtype)
    logits = (case.hidden @ case.weight.T).detach()
    inputs = {**case.inputs, "policy_weights": torch.rand(n) + 0.5, "sequence_ids": torch.arange(n) * 4 // n}
    return logits, case.targets, inputs


def tokens_of(logits, targets):
    """(log-probabilities, entropies) of logits, differentiable."""
    log_pi = logits.log_softmax(-1)
    found = log_pi.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    return found, -(log_pi.exp() * log_pi).sum(-1)


def without_targets(inputs, targets):
    return {**inputs, "mask": inputs["mask"] & (targets != -100)}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_it_is_the_loss_from_logits_given_the_same_log_probabilities(name, skip):
    logits, targets, inputs = from_case()
    given, logits = logits.clone().requires_grad_(), logits.requires_grad_()
    o = LOSSES[name]
    expected = tk.policy_loss_from_logits(given, targets, o, skip_inactive=skip, **inputs)
    logprobs, entropy = tokens_of(logits, targets)
    found = tk.policy_loss_from_logprobs(
        logprobs, o, entropy=entropy, skip_inactive=skip, **without_targets(inputs, targets)
    )
    assert_close(found.loss, expected.loss, 1e-12, "loss", floor=1.0)
    assert found.metrics.keys() == expected.metrics.keys()
    for metric, value in expected.metrics.items():
        assert_close(found.metrics[metric], value, 1e-12, metric, floor=1.0)
    for which in ("logprobs", "entropy"):
        assert_close(getattr(found, which), getattr(expected, which), 1e-12, which, floor=1.0)
        assert not getattr(found, which).requires_grad
    grads = [torch.autograd.grad(out.loss, z)[0] for out, z in ((found, logits), (expected, given))]
    assert_close(grads[0], grads[1], 1e-12, "gradient")


def test_logits_without_a_gradient_give_a_loss_without_one():
    logits, targets, inputs = from_case()
    logprobs, entropy = tokens_of(logits, targets)
    out = tk.policy_loss_from_logprobs(logprobs, EVERYTHING, entropy=entropy, **without_targets(inputs, targets))
    assert not out.loss.requires_grad


def test_gradients_and_second_derivatives_pass_gradcheck():
    logits, targets, inputs = from_case(12)
    logprobs, entropy = (t.detach().requires_grad_() for t in tokens_of(logits, targets))
    given = without_targets(inputs, targets)

    def loss(lp, h):
        return tk.policy_loss_from_logprobs(lp, EVERYTHING, entropy=h, **given).loss

    assert torch.autograd.gradcheck(loss, (logprobs, entropy))
    assert torch.autograd.gradgradcheck(loss, (logprobs, entropy))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_loss_is_wide_and_gradients_come_back_in_the_dtype_of_the_input(dtype):
    logprobs = (-torch.rand(4, 6) * 3).to(dtype).requires_grad_()
    advantages = torch.randn(4)
    out = tk.policy_loss_from_logprobs(logprobs, tk.Objective.grpo(), advantages=advantages)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.loss.dtype == out.logprobs.dtype == wide
    out.loss.backward()
    assert logprobs.grad.dtype == dtype
    # With r = 1 the loss of a token is −A, and so is its slope.
    assert_close(out.loss, -advantages.mean(), 1e-6, "loss")
    assert_close(logprobs.grad, -advantages[:, None].expand(4, 6) / 24, 1e-2, "gradient")


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
def test_a_batch_without_tokens_has_loss_zero(shape):
    logprobs = torch.zeros(shape, requires_grad=True)
    out = tk.policy_loss_from_logprobs(logprobs, tk.Objective.grpo(), advantages=torch.zeros(shape))
    out.loss.backward()
    assert out.loss == 0
    assert out.logprobs.shape == logprobs.grad.shape == shape


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["everything", "gspo", "pear", "own"])
def test_masked_tokens_may_hold_anything(name, value):
    logits, targets, inputs = from_case()
    given = without_targets(inputs, targets)
    results = []
    for fill in (0.0, value):
        logprobs, entropy = (t.masked_fill(~given["mask"], fill).requires_grad_() for t in tokens_of(logits, targets))
        padded = {n: t.masked_fill(~given["mask"], fill) if t.is_floating_point() else t for n, t in given.items()}
        out = tk.policy_loss_from_logprobs(logprobs, LOSSES[name], entropy=entropy, **padded)
        results.append((out.loss, *torch.autograd.grad(out.loss, (logprobs, entropy), allow_unused=True)))
    for a, b in zip(*results, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_an_impossible_token_has_an_infinite_loss_and_no_nan_beside_it():
    logprobs = torch.tensor([-torch.inf, -1.0], requires_grad=True)
    out = tk.policy_loss_from_logprobs(logprobs, tk.Objective.sft())
    assert out.loss == torch.inf
    out = tk.policy_loss_from_logprobs(logprobs, tk.Objective.grpo(), advantages=torch.ones(2))
    out.loss.backward()
    assert out.loss == -0.5  # r = 0 and 1
    assert logprobs.grad.tolist() == [0.0, -0.5]


def test_without_entropies_there_is_no_metric_of_them():
    out = tk.policy_loss_from_logprobs(torch.tensor([-1.0, -2.0]), tk.Objective.sft())
    assert "entropy" not in out.metrics
    assert out.loss == 1.5
    assert out.entropy.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["everything", "gspo", "pear", "own", "sum"])
def test_a_compiled_graph_is_one_and_right(name):
    torch._dynamo.reset()
    logits, targets, inputs = from_case()
    given, o = without_targets(inputs, targets), LOSSES[name]
    results = []
    for compiling in (False, True):
        logprobs, entropy = (t.detach().requires_grad_() for t in tokens_of(logits, targets))

        def loss(lp, h):
            return tk.policy_loss_from_logprobs(lp, o, entropy=h, **given).loss

        out = (torch.compile(loss, backend="aot_eager", fullgraph=True) if compiling else loss)(logprobs, entropy)
        results.append((out, *torch.autograd.grad(out, (logprobs, entropy), allow_unused=True, materialize_grads=True)))
    for a, b in zip(*results, strict=True):
        assert_close(b, a, 1e-12, name, floor=1e-3)


def refuse(message, logprobs=None, objective=None, **inputs):
    logprobs = torch.zeros(2, 3) if logprobs is None else logprobs
    with pytest.raises((TypeError, ValueError), match=message):
        tk.policy_loss_from_logprobs(logprobs, objective or tk.Objective.sft(), **inputs)


def test_what_is_wrong_is_named_in_one_line():
    refuse("policy_loss_from_logprobs: logprobs must be a tensor; got list", [0.0])
    refuse("logprobs must be float16, bfloat16, float32 or float64; got int64", torch.zeros(2, dtype=torch.int64))
    refuse(r"entropy must be \[2, 3\] as logprobs; got \[2\]", entropy=torch.zeros(2))
    refuse("objective must be an Objective; got str", objective="sft")
    refuse("advantages must be a tensor, which policy='clip' needs; got None", objective=tk.Objective.grpo())
    refuse(r"advantages must be \[2, 3\] as logprobs or one per sequence, \[2\]; got \[4\]", advantages=torch.zeros(4))
    refuse(r"mask must be \[2, 3\] as logprobs; got \[3\]", mask=torch.ones(3, dtype=torch.bool))
    refuse("normalizer must be a number above 0", normalizer=0)
    refuse(r"sequence_ids must be \[2, 3\] as logprobs; got \[2\]", sequence_ids=torch.zeros(2, dtype=torch.int64))
    refuse("logprobs must be \\[B, T\\] or sequence_ids given", torch.zeros(3),
           tk.Objective.gspo(), advantages=torch.zeros(3))  # fmt: skip
    refuse(
        "entropy must be a tensor, which entropy_coef=0.1 needs; got None", objective=tk.Objective.sft(entropy_coef=0.1)
    )
    refuse("entropy must be a tensor, which policy=focal needs; got None",
           objective=tk.Objective(expert=None, policy=focal), advantages=torch.zeros(2, 3))  # fmt: skip
    for o, what in ((tk.Objective.sed(), "statistics of a row"), (tk.Objective.asft(), "a reference head"),
                    (tk.Objective.lco(), "target logits")):  # fmt: skip
        refuse(f"objective must read log-probabilities and entropies of tokens alone; got one that reads {what}",
               objective=o, advantages=torch.zeros(2, 3))  # fmt: skip
