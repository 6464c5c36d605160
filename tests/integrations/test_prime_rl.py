"""The prime-rl style loss: found by its import path, one sequence at a time, against plain formulas."""

from __future__ import annotations

import importlib
import math
import sys
import types
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

import trapo_kernels as tk
from trapo_kernels.integrations.prime_rl import use_expert_loss
from trapo_kernels.integrations.prime_rl_head import use_fused_head


@dataclass
class LossInputs:
    """prime-rl's, field by field."""

    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    loss_weights: torch.Tensor | None = None


@pytest.fixture
def policy_loss():
    module, _, name = "trapo_kernels.integrations.prime_rl.policy_loss".rpartition(".")
    return getattr(importlib.import_module(module), name)


def make(n=40, seed=0, **extra):
    g = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(n, generator=g, dtype=torch.float64)

    logprobs = -normal().abs()
    return LossInputs(
        trainer_logprobs=logprobs.clone().requires_grad_(),
        inference_logprobs=logprobs + 0.4 * normal(),
        ref_logprobs=logprobs + 0.3 * normal(),
        advantages=normal(),
        loss_mask=torch.rand(n, generator=g) < 0.7,
        **{name: make_extra(n, g) for name, make_extra in extra.items()},
    )


def test_a_clipped_loss_is_the_sum_over_the_sequence(policy_loss):
    inputs = make()
    out = policy_loss(inputs, policy="clip", clip_low=0.2, clip_high=0.28)
    (grad,) = torch.autograd.grad(out.loss, inputs.trainer_logprobs)
    ratio = (inputs.trainer_logprobs - inputs.inference_logprobs).exp()
    a = inputs.advantages
    plain = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a)[inputs.loss_mask].sum()
    (expected,) = torch.autograd.grad(plain, inputs.trainer_logprobs)
    torch.testing.assert_close(out.loss.double(), plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)
    assert not grad[~inputs.loss_mask].any()
    assert out.metrics["loss_policy"] == pytest.approx(plain.item() / inputs.loss_mask.sum().item(), rel=1e-4)


def test_kl_and_weights(policy_loss):
    inputs = make(loss_weights=lambda n, g: torch.rand(n, generator=g, dtype=torch.float64))
    out = policy_loss(inputs, policy="unclipped", kl_coef=0.1)
    logp, ref = inputs.trainer_logprobs, inputs.ref_logprobs
    own = -(logp - inputs.inference_logprobs).exp() * inputs.advantages
    token = (own + 0.1 * (torch.exp(ref - logp) - (ref - logp) - 1)) * inputs.loss_weights
    torch.testing.assert_close(out.loss.double(), token[inputs.loss_mask].sum(), rtol=1e-5, atol=1e-5)


# What prime-rl's compute_loss does with the two streams of a sequence, and looks up where.
COMPUTE_LOSS = """
def ce_loss_fn(inputs):
    raise AssertionError("prime-rl's own")


def compute_loss(LossInputs, logprobs, inference, advantages, mask, rl_weights, ce_weights, rl_loss_fn):
    def inputs(mask, weights):
        return LossInputs(logprobs, inference, None, advantages, mask, weights)

    rl = rl_loss_fn(inputs(mask & (rl_weights != 0), rl_weights))
    ce = ce_loss_fn(inputs(ce_weights != 0, ce_weights))
    return rl.loss / 10 + ce.loss / 5, {**rl.metrics, **ce.metrics}
"""


@pytest.fixture
def prime_rl_loss(monkeypatch):
    names = ("prime_rl", "prime_rl.trainer", "prime_rl.trainer.rl", "prime_rl.trainer.rl.loss")
    modules = [types.ModuleType(name) for name in names]
    for module, child in pairwise(modules):
        setattr(module, child.__name__.rpartition(".")[2], child)
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(COMPUTE_LOSS, vars(modules[-1]))
    return modules[-1]


def test_expert_tokens_are_those_of_the_ce_stream(policy_loss, prime_rl_loss):
    use_expert_loss(alpha=0.2)
    inputs = make()
    g = torch.Generator().manual_seed(5)
    expert = torch.rand(40, generator=g) < 0.4
    ce_weights = torch.where(expert, torch.rand(40, generator=g) + 0.1, 0.0)
    loss, metrics = prime_rl_loss.compute_loss(
        LossInputs, inputs.trainer_logprobs, inputs.inference_logprobs, inputs.advantages, inputs.loss_mask,
        (~expert).double(), ce_weights, policy_loss,
    )  # fmt: skip
    logp = inputs.trainer_logprobs
    p, own = logp.exp(), -(logp - inputs.inference_logprobs).exp() * inputs.advantages
    trsft = torch.where(p >= 0.2, -logp, 1 - math.log(0.2) - p / 0.2)
    expected = own[inputs.loss_mask & ~expert].sum() / 10 + (trsft * ce_weights)[expert].sum() / 5
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    ours, stock = (torch.autograd.grad(each, logp)[0] for each in (loss, expected))
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)
    assert metrics["nll"] == pytest.approx(-logp[expert].mean().item(), rel=1e-5)
    assert metrics["expert_prob"] == pytest.approx(p[expert].mean().item(), rel=1e-5)


def test_an_expert_term_that_cannot_be_is_refused_where_it_is_chosen(policy_loss, prime_rl_loss):
    with pytest.raises(ValueError, match=r"policy_loss: expert must be None, see use_expert_loss; got 'trsft'"):
        policy_loss(make(), expert="trsft")
    with pytest.raises(ValueError, match=r"expert_loss: objective must have an expert term alone.*got expert='luffy'"):
        use_expert_loss(expert="luffy")
    with pytest.raises(ValueError, match=r"expert_loss: entropy_coef must be 0"):
        use_expert_loss(entropy_coef=0.1)
    del prime_rl_loss.ce_loss_fn
    with pytest.raises(RuntimeError, match=r"must have ce_loss_fn; got another version"):
        use_expert_loss()


def test_a_truncated_ratio_to_the_engine(policy_loss):
    inputs = make()
    out = policy_loss(inputs, policy="clip", tis_cap=2.0)
    (grad,) = torch.autograd.grad(out.loss, inputs.trainer_logprobs)
    weight = (inputs.trainer_logprobs - inputs.inference_logprobs).exp().clamp(max=2.0).detach()
    expected = torch.where(inputs.loss_mask, -weight * inputs.advantages, 0)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)


def test_what_log_probabilities_cannot_give_is_refused(policy_loss):
    with pytest.raises(ValueError, match=r"policy_loss: entropy_coef must be 0, without entropies; got 0.1"):
        policy_loss(make(), entropy_coef=0.1)
    inputs = make()
    inputs.ref_logprobs = None
    with pytest.raises(ValueError, match=r"policy_loss: ref_logprobs must be given, which kl_coef=0.1 needs"):
        policy_loss(inputs, kl_coef=0.1)


@pytest.mark.parametrize("settings", [{"policy": "gspo"}, {"policy": "gspo", "kl_coef": 0.1}], ids=str)
def test_terms_that_read_more_than_tokens_are_refused(policy_loss, settings):
    with pytest.raises(ValueError, match="policy_loss: objective must read log-probabilities of tokens alone"):
        policy_loss(make(), **settings)


def test_a_sequence_without_tokens_gives_zero(policy_loss):
    inputs = make()
    inputs.loss_mask = torch.zeros_like(inputs.loss_mask)
    out = policy_loss(inputs)
    assert out.loss == 0
    assert all(value == 0 for value in out.metrics.values())
    assert not torch.autograd.grad(out.loss, inputs.trainer_logprobs)[0].any()


def test_the_module_needs_torch_alone():
    """In a fresh interpreter: no trainer's package is imported."""
    import subprocess
    import sys

    code = (
        "import sys, trapo_kernels, trapo_kernels.integrations, trapo_kernels.integrations.prime_rl, "
        "trapo_kernels.integrations.prime_rl_head, trapo_kernels.integrations.liger\n"
        "found = {'transformers', 'trl', 'verl', 'liger_kernel', 'datasets', 'trapo'} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert tk.Objective


@pytest.mark.parametrize("weighted", [False, True])
def test_dppo_with_a_squared_log_ratio_has_the_gradient_of_prime_rls_default_loss(policy_loss, weighted):
    inputs = make(loss_weights=lambda n, g: torch.rand(n, generator=g, dtype=torch.float64))
    if not weighted:
        inputs.loss_weights = None
    out = policy_loss(inputs, policy="dppo_tv", clip_low=0.1, clip_high=0.15, dppo_cap=1e6, adv_tau=0.7, kl_tau=0.05)
    # default_loss_fn of src/prime_rl/trainer/rl/loss.py.
    logp, sampled, a = inputs.trainer_logprobs, inputs.inference_logprobs, inputs.advantages
    moved = logp.exp() - sampled.exp()
    masked = torch.where(a > 0, moved > 0.15, moved < -0.1)
    mask, log_ratio = inputs.loss_mask.double(), logp - sampled
    token = mask * (0.05 * log_ratio**2 - (~masked).double() * 0.7 * a * log_ratio.exp())
    expected = (token if inputs.loss_weights is None else token * inputs.loss_weights).sum()
    assert 0 < (masked & inputs.loss_mask).sum() < inputs.loss_mask.sum()
    ours, theirs = (torch.autograd.grad(loss, logp)[0] for loss in (out.loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# The head --------------------------------------------------------------------------------------------------------


class FusedOutputLinear(torch.nn.Linear):
    """prime-rl's class by its constructor and its forward's arguments."""

    def __init__(self, in_features, out_features, chunk_size):
        super().__init__(in_features, out_features, bias=False)
        self.chunk_size = chunk_size

    def forward(self, hidden_states, labels=None, temperature=None):
        raise AssertionError("prime-rl's own")


class GemmaFusedOutputLinear(FusedOutputLinear):
    def __init__(self, in_features, out_features, chunk_size, softcap):
        super().__init__(in_features, out_features, chunk_size)
        self.softcap = softcap


@pytest.fixture
def prime_rl_heads(monkeypatch):
    """The classes where prime-rl has them."""
    name = "prime_rl.trainer.models.layers"
    for end in range(1, name.count(".") + 2):
        monkeypatch.setitem(sys.modules, ".".join(name.split(".")[:end]), types.ModuleType("stub"))
    kinds = []
    for module, kind in (("lm_head", FusedOutputLinear), ("lm_head_gemma", GemmaFusedOutputLinear)):
        copy = type(kind.__name__, (kind,), {})
        monkeypatch.setitem(sys.modules, f"{name}.{module}", types.SimpleNamespace(**{kind.__name__: copy}))
        kinds.append(copy)
    return kinds


@pytest.mark.parametrize("temperatures", [[1.7], [0.5, 1.0, 1.3]], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0], ids=str)
def test_a_head_that_exists_gives_each_token_its_temperature(prime_rl_heads, softcap, temperatures):
    plain, gemma = prime_rl_heads
    torch.manual_seed(0)
    head = plain(8, 37, chunk_size=3) if softcap is None else gemma(8, 37, chunk_size=3, softcap=softcap)
    use_fused_head()
    hidden, labels = torch.randn(2, 5, 8, requires_grad=True), torch.randint(0, 37, (2, 5))
    temperature = torch.tensor(temperatures)[torch.randint(0, len(temperatures), (2, 5))]
    out = head(hidden, labels, temperature=temperature)
    logits = hidden @ head.weight.t()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_pi = (logits / temperature[..., None]).log_softmax(-1)
    logprobs, entropy = log_pi.gather(-1, labels[..., None]).squeeze(-1), -(log_pi.exp() * log_pi).sum(-1)
    torch.testing.assert_close(out["logprobs"], logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out["entropy"], entropy, rtol=1e-5, atol=1e-5)
    slopes = torch.randn(2, 5)
    grads = [torch.autograd.grad((x * slopes).sum(), (hidden, head.weight)) for x in (out["logprobs"], logprobs)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_frozen_head_gets_no_gradient(prime_rl_heads):
    head = prime_rl_heads[0](8, 37, chunk_size=3).requires_grad_(False)
    use_fused_head()
    hidden = torch.randn(2, 5, 8, requires_grad=True)
    head(hidden, torch.zeros(2, 5, dtype=torch.int64), temperature=torch.ones(2, 5))["logprobs"].sum().backward()
    assert hidden.grad is not None
    assert head.weight.grad is None


def test_a_head_says_what_it_misses(prime_rl_heads, monkeypatch):
    use_fused_head()
    head = prime_rl_heads[0](8, 37, chunk_size=3)
    with pytest.raises(ValueError, match=r"FusedOutputLinear: temperature must be given; got None"):
        head(torch.zeros(1, 2, 8), torch.zeros(1, 2, dtype=torch.int64))
    monkeypatch.setitem(sys.modules, "prime_rl.trainer.models.layers.lm_head", types.SimpleNamespace())
    with pytest.raises(RuntimeError, match=r"lm_head must have FusedOutputLinear; got another version"):
        use_fused_head()
