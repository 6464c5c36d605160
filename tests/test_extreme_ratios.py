"""Ratios of 0, of infinity and beyond fp32, with advantages of 0 and of both signs, by the published formulas: what the
clip or an advantage of 0 takes away is gone, whatever the ratio; nothing else is."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from kernel_cases import BACKENDS, assert_close

import trapo_kernels as tk

INF = math.inf
LOGS = (-INF, -1000.0, -100.0, -0.5, 0.0, 0.5, 20.0, 100.0, 1000.0, INF)
ADVANTAGES = (0.0, 1.5, -1.5)
BOTH = {"clip_low": 0.2, "clip_high": 0.28}
POLICIES = {
    "unclipped": {},
    "clip": {},
    "clip both": {"policy": "clip", **BOTH},
    "clip low": {"policy": "clip", "clip_low": 0.2},
    "clip dual": {"policy": "clip", **BOTH, "dual_clip": 3.0},
    "gspo": {},
    "gspo both": {"policy": "gspo", **BOTH},
    "cispo": {},
    "cispo both": {"policy": "cispo", **BOTH},
    "sapo": {},
}
OBJECTIVES = {
    name: tk.Objective(**{"expert": None, "policy": name.split()[0], **fields}) for name, fields in POLICIES.items()
}


def exp(x):
    return INF if x > 709 else math.exp(x)


def clip(o, r, a):
    """(−min(r A, clip(r) A) or its dual clip, its slope in log r)."""
    low, high = (1 - o.clip_low if o.clip_low else 0.0), (1 + o.clip_high if o.clip_high else INF)
    if a > 0 and r > high:
        return -high * a, 0.0
    if a < 0 and r < low:
        return -low * a, 0.0
    if a < 0 and o.dual_clip and r > o.dual_clip:
        return -o.dual_clip * a, 0.0
    return -r * a, -r * a


def formula(o, log_r, logp, a):
    """(value, ∂value/∂logp) of a token in float64."""
    if a == 0:
        return 0.0, 0.0
    r = exp(log_r)
    if o.policy == "cispo":
        weight = min(max(r, 1 - o.clip_low if o.clip_low else 0.0), 1 + o.clip_high if o.clip_high else INF) * a
        return -weight * logp, -weight
    if o.policy == "sapo":
        tau = o.sapo_tau_pos if a > 0 else o.sapo_tau_neg
        gate = 1 / (1 + exp(-tau * (r - 1)))
        return -4 / tau * gate * a, 0.0 if gate == 1 else -4 * gate * (1 - gate) * r * a
    return clip(o, r, a)


def table(dtype=torch.float64, logs=LOGS):
    """(log r, A) [n] of every pair; an old probability of 0 has r = ∞."""
    return torch.tensor(list(product(logs, ADVANTAGES)), dtype=dtype).unbind(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_values_and_slopes_are_those_of_the_formula(name, dtype):
    o, (log_r, advantages) = OBJECTIVES[name], table(dtype)
    n = len(log_r)
    logprobs = torch.full((n,), -1.0, dtype=dtype, requires_grad=True)
    tokens = tk.Tokens(
        logprobs, logprobs.detach().neg(), torch.zeros(n).bool(), advantages=advantages, old_logprobs=-1 - log_r,
        sequences=tk.Sequences.of(torch.arange(n)),
    )  # fmt: skip
    value = o.losses(tokens)["policy"]
    finite = value.isfinite()
    (by_autograd,) = torch.autograd.grad(value[finite].sum(), logprobs)
    expected = torch.tensor(
        [formula(o, r, -1.0, a) for r, a in zip(log_r.tolist(), advantages.tolist(), strict=True)], dtype=torch.float64
    ).to(dtype)
    torch.testing.assert_close(value.detach(), expected[:, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(by_autograd[finite], expected[finite, 1], rtol=1e-5, atol=1e-6)
    if not o.coupled:
        torch.testing.assert_close(o.slopes(tokens)[0].detach(), expected[:, 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bonus", [0.0, 0.1])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_gives_the_loss_and_the_gradient_of_the_formula(backend, name, bonus):
    o = replace(OBJECTIVES[name], entropy_coef=bonus, reduction="sum")
    g = torch.Generator().manual_seed(0)
    log_r, advantages = table(logs=LOGS[1:])
    hidden, weight = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((len(log_r), 4), (9, 4)))
    targets = torch.randint(0, 9, (len(log_r), 1), generator=g)
    params = hidden.requires_grad_(), weight.requires_grad_()
    found = tk.linear_logprobs(hidden[:, None], weight, targets, entropy=True, backend="reference")
    logp = found.logprobs.squeeze(1)
    pairs = zip(log_r.tolist(), logp.tolist(), advantages.tolist(), strict=True)
    value, slope = torch.tensor([formula(o, *pair) for pair in pairs], dtype=torch.float64).unbind(1)
    finite = (value.abs() < 1e6) & (slope.abs() < 1e6)  # of a size that a sum in fp32 bears
    assert finite.sum() > 15
    expected = value[finite].sum() - bonus * found.entropy.squeeze(1)[finite].sum()
    surrogate = (slope[finite] * logp[finite]).sum() - bonus * found.entropy.squeeze(1)[finite].sum()
    right = torch.autograd.grad(surrogate, params)
    narrow = [p.detach().float().requires_grad_() for p in params]
    out = tk.linear_policy_loss(
        narrow[0][:, None], narrow[1], targets, o, advantages=advantages[:, None].float(),
        old_logprobs=(logp - log_r)[:, None].detach().float(), mask=finite[:, None], backend=backend,
    )  # fmt: skip
    assert_close(out.loss, expected, 1e-5, "loss", floor=1.0)
    for actual, exact in zip(torch.autograd.grad(out.loss, narrow), right, strict=True):
        assert_close(actual, exact, 2e-5, "gradient")
    assert not any(value.isnan() for value in out.metrics.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_probability_of_0_in_every_policy_at_once_gives_no_nan(backend):
    """The policy's, the old one's, the reference's and the sampler's: weight and KL of such a token are 0."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*s, generator=g) for s in ((4, 4), (9, 4)))
    bias, never = torch.zeros(9), torch.full((4,), -INF)
    bias[2] = -INF
    params = [t.requires_grad_() for t in (hidden, weight, bias)]
    own = torch.tensor([True, True, False, True])
    o = tk.Objective(clip_low=0.2, kl_coef=0.1, tis_cap=2.0, entropy_coef=0.1, expert="dft")
    out = tk.linear_policy_loss(
        hidden, weight, torch.full((4,), 2), o, bias=bias, advantages=torch.tensor([1.0, -1.0, 1.0, 0.0]),
        old_logprobs=never, ref_logprobs=never, rollout_logprobs=never, expert_mask=~own, backend=backend,
    )  # fmt: skip
    assert out.loss.isfinite()
    for grad in torch.autograd.grad(out.loss, params):
        assert grad.isfinite().all()


@pytest.mark.parametrize("objective", [tk.Objective.sft(), tk.Objective(expert=None, policy=None)], ids=["sft", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_impossible_own_token_without_a_policy_term_has_the_bonus_alone(objective, backend):
    bias = torch.zeros(9)
    bias[2] = -INF
    params = [t.requires_grad_() for t in (torch.ones(2, 4), torch.ones(9, 4), bias)]
    out = tk.linear_policy_loss(
        params[0], params[1], torch.tensor([2, 3]), replace(objective, entropy_coef=0.1), bias=params[2],
        expert_mask=torch.zeros(2).bool(), backend=backend,
    )  # fmt: skip
    assert_close(out.loss, torch.tensor(-0.1 * math.log(8)), 1e-6, "loss")
    for grad in torch.autograd.grad(out.loss, params):
        assert grad.isfinite().all()


@pytest.mark.parametrize(
    "objective", [tk.Objective.eaft(), tk.Objective.pear(pear_gamma=1e-30, pear_floor=-1e4)], ids=["eaft", "pear"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_impossible_expert_token_of_weight_0_adds_nothing(objective, backend):
    """EAFT: one class is possible, so the entropy is 0. PEAR: γ to the number of later tokens is."""
    length = 20
    hidden, weight, bias = torch.ones(1, length, 4), torch.ones(9, 4), torch.full((9,), -INF)
    bias[0] = 0
    targets = torch.zeros(1, length, dtype=torch.int64)
    targets[0, 0] = 3
    params = [t.requires_grad_() for t in (hidden, weight, bias)]
    out = tk.linear_policy_loss(
        hidden, weight, targets, objective, bias=bias, old_logprobs=torch.full((1, length), -1.0), backend=backend
    )
    assert out.loss == 0
    for grad in torch.autograd.grad(out.loss, params):
        assert grad.isfinite().all()


@pytest.mark.parametrize("loss", ["mse", "logcosh"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_removed_column_has_no_slope_in_the_targets_logit(loss, backend):
    bias = torch.zeros(5)
    bias[2] = -INF
    bias.requires_grad_()
    out = tk.linear_policy_loss(
        torch.ones(1, 4), torch.ones(5, 4), torch.tensor([2]), tk.Objective.lco(loss), advantages=torch.ones(1),
        bias=bias, backend=backend,
    )  # fmt: skip
    out.loss.backward()
    assert not bias.grad.any()


@pytest.mark.parametrize("policy", ["gspo", "clip", "cispo", "sapo"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_policy_term_without_weight_clips_nothing(policy, backend):
    o = tk.Objective(expert=None, policy=policy, policy_coef=0.0, kl_coef=0.1)
    out = tk.linear_policy_loss(
        torch.ones(2, 3, 4), torch.ones(9, 4), torch.zeros(2, 3, dtype=torch.int64), o, advantages=torch.ones(2),
        old_logprobs=torch.full((2, 3), -9.0), ref_logprobs=torch.zeros(2, 3), backend=backend,
    )  # fmt: skip
    assert out.loss.isfinite()
    assert out.metrics["clip_high"] == 0
