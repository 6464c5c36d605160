"""What docs/methods.md derives: the C¹ form of TrSFT, Proposition 1, and the one logit gradient of all losses."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import BACKENDS, EVERYTHING, OBJECTIVES, affordable, assert_close, make_case
from torch.nn import functional as F

import trapo_kernels as tk

backends = pytest.mark.parametrize("backend", BACKENDS)


@backends
@pytest.mark.parametrize("alpha", [0.02, 0.1, 0.5, 1.0])
def test_the_c1_form_of_trsft_has_the_gradient_of_the_authors_form(backend, alpha):
    torch.manual_seed(0)
    n = affordable(backend, 200)
    logits = (4 * torch.randn(n, 11, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(0, 11, (n,))
    p = logits.softmax(-1).gather(1, targets[:, None]).squeeze(1)
    assert (p < alpha).any()
    authors = -(p / p.detach().clamp(min=alpha)).mean()
    ours = tk.policy_loss_from_logits(logits, targets, tk.Objective(policy=None, alpha=alpha), backend=backend).loss
    (expected,), (actual,) = torch.autograd.grad(authors, logits), torch.autograd.grad(ours, logits)
    assert_close(actual, expected, 1e-13, "d_logits")


@pytest.mark.parametrize("alpha", [0.02, 0.1, 0.5])
def test_trsft_is_continuously_differentiable_at_alpha(alpha):
    o = tk.Objective(policy=None, alpha=alpha)

    def at(p):
        lp = torch.tensor([math.log(p)], dtype=torch.float64)
        tokens = tk.Tokens(lp, lp, torch.tensor([True]))
        return o.losses(tokens)["expert"].item(), o.slopes(tokens)[0].item()

    below, above = at(alpha * (1 - 1e-9)), at(alpha * (1 + 1e-9))
    assert math.isclose(below[0], above[0], rel_tol=1e-8)
    assert math.isclose(below[1], above[1], rel_tol=1e-8)
    assert math.isclose(at(alpha)[0], -math.log(alpha), rel_tol=1e-12)


def fit(expert, objective, backend, steps, rate=3.0):
    """Gradient descent on a tabular softmax of E over expert classes of the loss, that expectation taken exactly: each
    class is a target once, weighted by its probability. Gives the softmax after each of so many `steps`."""
    logits = torch.zeros(len(expert), dtype=torch.float64, requires_grad=True)
    targets, found = torch.arange(len(expert)), []
    for step in range(1, max(steps) + 1):
        lp = tk.logprobs_from_logits(logits.expand(len(expert), -1), targets, backend=backend).logprobs
        value = objective.losses(tk.Tokens(lp, torch.zeros_like(lp), torch.ones(len(expert), dtype=torch.bool)))
        (gradient,) = torch.autograd.grad((expert * value["expert"]).sum(), logits)
        with torch.no_grad():
            logits -= rate * gradient
        if step in steps:
            found.append(logits.detach().softmax(-1))
    return found


def proposition_1(expert, alpha):
    """p_E/λ on S = {c : p_E(c) > αλ}, λ = Σ_S p_E: the largest set that is consistent, found by dropping the rarest."""
    order = expert.argsort(descending=True)
    for size in range(len(expert), 0, -1):
        kept = order[:size]
        mass = expert[kept].sum()
        if (expert[kept] > alpha * mass).all():
            limit = torch.zeros_like(expert)
            limit[kept] = expert[kept] / mass
            return limit
    raise AssertionError


EXPERTS = {
    "one rare class": [0.5, 0.3, 0.15, 0.05],
    "two rare classes": [0.6, 0.3, 0.06, 0.04],
    "none rare": [0.4, 0.35, 0.25],
}


@pytest.mark.parametrize("expert", EXPERTS)
def test_proposition_1_trsft_descends_to_the_renormalised_head_of_the_expert(expert):
    expert = torch.tensor(EXPERTS[expert], dtype=torch.float64)
    limit = proposition_1(expert, 0.1)
    before, found = fit(expert, tk.Objective(policy=None, alpha=0.1), "torch", steps=(20, 1334))
    # Outside S probabilities fall like 1/steps.
    torch.testing.assert_close(found, limit, rtol=0, atol=5e-3)
    assert (found[limit == 0] < 5e-3).all()
    assert (found - limit).abs().max() <= (before - limit).abs().max()


@pytest.mark.parametrize("expert", EXPERTS)
def test_sft_descends_to_the_expert(expert):
    expert = torch.tensor(EXPERTS[expert], dtype=torch.float64)
    (found,) = fit(expert, tk.Objective.sft(), "torch", steps=(334,))
    torch.testing.assert_close(found, expert, rtol=0, atol=1e-6)


def test_the_expert_does_not_satisfy_trsft_where_it_has_a_rare_class():
    expert = torch.tensor(EXPERTS["one rare class"], dtype=torch.float64)
    assert (proposition_1(expert, 0.1) == 0).sum() == 1
    assert torch.equal(proposition_1(expert, 0.01), expert)


@backends
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_loss_has_the_one_logit_gradient(backend, objective):
    """dL/dz_j = g_lp (1[j=y] − π_j) − g_H π_j (log π_j + H), with the slopes of the objective."""
    o = OBJECTIVES[objective]
    case = make_case(affordable(backend, 40), 33)
    keep = case.inputs["mask"] & (case.targets != -100)
    z = F.linear(*[p.detach() for p in case.params()])[keep].requires_grad_()
    targets = case.targets[keep]
    inputs = {name: t[keep] for name, t in case.inputs.items()}
    loss = tk.policy_loss_from_logits(z, targets, o, backend=backend, normalizer=1, **inputs).loss
    (actual,) = torch.autograd.grad(loss, z)
    log_pi = z.detach().log_softmax(-1)
    pi = log_pi.exp()
    entropy = -(pi * log_pi).sum(-1)
    expert = inputs.pop("expert_mask")
    inputs.pop("mask")
    tokens = tk.Tokens(log_pi.gather(1, targets[:, None]).squeeze(1), entropy, expert, **inputs)
    g_lp, g_entropy = o.slopes(tokens)
    expected = g_lp[:, None] * (F.one_hot(targets, 33) - pi)
    if g_entropy is not None:
        expected = expected - g_entropy[:, None] * pi * (log_pi + entropy[:, None])
    assert_close(actual, expected, 1e-12, "d_logits")


@backends
def test_expert_tokens_do_not_feel_the_advantage_and_own_tokens_do(backend):
    case = make_case(30, 33)
    both = []
    for factor in (1.0, 3.0):
        case.inputs["advantages"] = case.inputs["advantages"] * factor
        hidden = case.hidden.detach().requires_grad_()
        out = tk.linear_policy_loss(hidden, case.weight, case.targets, EVERYTHING, backend=backend, **case.inputs)
        both.append((out.metrics["loss_expert"], torch.autograd.grad(out.loss, hidden)[0]))
    expert = case.inputs["expert_mask"]
    torch.testing.assert_close(both[0][0], both[1][0])
    torch.testing.assert_close(both[0][1][expert], both[1][1][expert])
    assert not torch.allclose(both[0][1][~expert], both[1][1][~expert])
