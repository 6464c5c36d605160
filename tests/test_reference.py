"""The oracle itself, against PyTorch's own functions and a transcription that shares no code with it."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import EVERYTHING, HEADS, OBJECTIVES, assert_close, make_case, oracle
from torch.nn import functional as F

import trapo_kernels as tk


def logits_of(case):
    """The head, written out."""
    z = case.hidden.detach() @ case.weight.detach().T
    if case.bias is not None:
        z = z + case.bias.detach()
    z = z * case.head.get("logit_scale", 1.0)
    if case.head.get("softcap") is not None:
        z = case.head["softcap"] * torch.tanh(z / case.head["softcap"])
    return z / case.head.get("temperature", 1.0)


@pytest.mark.parametrize("head", HEADS)
def test_logprobs_are_those_of_torch_cross_entropy_and_categorical(head):
    case = make_case(50, 33, **HEADS[head])
    out = tk.linear_logprobs(
        case.hidden, case.weight, case.targets, bias=case.bias, entropy=True, backend="reference", **case.head
    )
    z = logits_of(case)
    assert_close(out.logprobs, -F.cross_entropy(z, case.targets, reduction="none"), 1e-13, "logprobs")
    entropy = torch.distributions.Categorical(logits=z).entropy()
    assert_close(out.entropy, entropy.masked_fill(case.targets == -100, 0), 1e-13, "entropy")


def test_sft_is_torch_cross_entropy_with_its_gradients():
    case = make_case(50, 33, with_bias=True)
    case.inputs = {}
    ours = oracle(case, tk.Objective.sft())
    theirs = F.cross_entropy(F.linear(*case.params()), case.targets)
    assert_close(ours.loss, theirs, 1e-13, "loss")
    for a, b in zip(ours.grads, torch.autograd.grad(theirs, case.params()), strict=True):
        assert_close(a, b, 1e-13, "gradient")


def token_loss(o, lp, entropy, expert, advantage, old, ref, rollout):
    """One token in plain Python floats, straight from the papers. An advantage-weighted ratio, a clamp, a maximum."""
    p = math.exp(lp)
    total = -o.entropy_coef * entropy
    if expert:
        if o.expert == "sft":
            total += o.expert_coef * -lp
        elif o.expert == "trsft":
            total += o.expert_coef * (-lp if p >= o.alpha else 1 - math.log(o.alpha) - p / o.alpha)
        elif o.expert == "dft":
            total += o.expert_coef * -p * lp
        elif o.expert == "luffy":
            total += o.expert_coef * -advantage * p / (p + o.luffy_gamma)
        return total
    if o.policy is not None:
        r = math.exp(lp - old)
        low = 1 - o.clip_low if o.clip_low is not None else -math.inf
        high = 1 + o.clip_high if o.clip_high is not None else math.inf
        surrogate = min(r * advantage, min(max(r, low), high) * advantage)
        if o.dual_clip is not None and advantage < 0:
            surrogate = max(surrogate, o.dual_clip * advantage)
        weight = 1.0 if o.tis_cap is None else min(math.exp(old - rollout), o.tis_cap)
        total -= surrogate * weight
    if o.kl_coef:
        total += o.kl_coef * (math.exp(ref - lp) - (ref - lp) - 1)
    return total


@pytest.mark.parametrize("head", ["plain", "all"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_the_papers_formula_token_by_token(objective, head):
    o = OBJECTIVES[objective]
    case = make_case(60, 33, **HEADS[head])
    log_pi = torch.log_softmax(logits_of(case), -1)
    entropies = torch.distributions.Categorical(logits=log_pi).entropy()
    total, count = 0.0, 0
    for i in range(60):
        if case.targets[i] == -100 or not case.inputs["mask"][i]:
            continue
        count += 1
        given = {name: t[i].item() for name, t in case.inputs.items()}
        total += token_loss(
            o, log_pi[i, case.targets[i]].item(), entropies[i].item(), given["expert_mask"], given["advantages"],
            given["old_logprobs"], given["ref_logprobs"], given["rollout_logprobs"],
        )  # fmt: skip
    out = oracle(case, o)
    assert out.metrics["tokens"] == count
    assert math.isclose(out.loss.item(), total / count, rel_tol=1e-12, abs_tol=1e-14)


def test_gradients_are_those_of_the_published_losses_with_their_own_stop_gradients():
    """TrSFT as −p/sg(max(p, α)), the ratio as p/sg(p) · sg(r): the authors' code, not our C¹ form."""
    o = EVERYTHING
    case = make_case(60, 33, with_bias=True)
    given = case.inputs
    log_pi = F.linear(*case.params()).log_softmax(-1)
    lp = log_pi.gather(1, case.targets.clamp(min=0)[:, None]).squeeze(1)
    p = lp.exp()
    expert = -o.expert_coef * p / p.detach().clamp(min=o.alpha)
    r, advantages = (lp - given["old_logprobs"]).exp(), given["advantages"]
    inside = (r.detach() >= 1 - o.clip_low) & (r.detach() <= 1 + o.clip_high)
    beyond = (advantages > 0) & (r < 1 - o.clip_low) | (advantages < 0) & (r > 1 + o.clip_high) & (r <= o.dual_clip)
    tis = (given["old_logprobs"] - given["rollout_logprobs"]).exp().clamp(max=o.tis_cap)
    policy = -(inside | beyond).double() * r * advantages * tis
    x = given["ref_logprobs"] - lp
    kl = o.kl_coef * (x.exp() - x - 1)
    token = torch.where(given["expert_mask"], expert, policy + kl) + o.entropy_coef * (log_pi.exp() * log_pi).sum(-1)
    active = given["mask"] & (case.targets != -100)
    theirs = torch.autograd.grad((token * active).sum() / active.sum(), case.params())
    for a, b in zip(oracle(case, o).grads, theirs, strict=True):
        assert_close(a, b, 1e-12, "gradient")
