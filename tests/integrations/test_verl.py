"""verl's actor loss with an expert mask, against verl's own functions, and verl's fused head against ours."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

import trapo_kernels as tk

pytest.importorskip("verl", reason="verl is not installed here: `make test-verl` runs this in a venv of its own")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from tensordict import TensorDict
    from verl.trainer.ppo import core_algos
    from verl.utils.experimental.torch_functional import FusedLinearForPPO as VerlHead
    from verl.workers.config.actor import ActorConfig, PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss

    from trapo_kernels.integrations import verl as ours

MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def make_config(**changes):
    settings = {
        "strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1, "clip_ratio": 0.2, "clip_ratio_low": 0.2,
        "clip_ratio_high": 0.28, "loss_agg_mode": "token-mean", "policy_loss": PolicyLossConfig(loss_mode="trapo"),
    }  # fmt: skip
    return ActorConfig(**{**settings, **changes})


def make(rows=4, length=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([9, 5, 1, 7])[:, None]
    mask = torch.arange(length)[None] < lengths
    log_prob = -torch.randn(rows, length, generator=g).abs() - 0.2
    steps = torch.tensor([-0.6, -0.3, -0.05, 0.0, 0.05, 0.5, 1.5])
    return {
        "log_prob": log_prob.requires_grad_(),
        "old": log_prob.detach() - steps[torch.randint(0, 7, (rows, length), generator=g)],
        "ref": log_prob.detach() + 0.2 * torch.randn(rows, length, generator=g),
        "advantages": torch.randn(rows, 1, generator=g).expand(rows, length) * mask,
        "weights": torch.rand(rows, length, generator=g) + 0.5,
        "entropy": torch.rand(rows, length, generator=g).requires_grad_(),
        "expert": torch.rand(rows, length, generator=g) < 0.3,
        "mask": mask,
    }


def test_the_loss_is_registered_under_its_name():
    assert core_algos.get_policy_loss_fn("trapo") is ours.trapo_policy_loss


@pytest.mark.parametrize("how", ["VERL_USE_EXTERNAL_MODULES", "entry point"])
def test_verl_loads_it_without_being_told_where_to_import_it(how):
    """In a fresh process that imports verl alone."""
    import os

    env = dict(os.environ)
    if how == "entry point":
        env["VERL_USE_EXTERNAL_PLUGINS"] = "trapo_kernels"
    else:
        env |= {how: "trapo_kernels.integrations.verl", "VERL_USE_EXTERNAL_PLUGINS": "none"}
    code = "from verl.trainer.ppo.core_algos import get_policy_loss_fn as f; print(f('trapo').__module__)"
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.strip().endswith("trapo_kernels.integrations.verl")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weighted", [False, True])
def test_without_expert_tokens_it_is_verls_vanilla_loss(mode, weighted):
    case, config = make(), make_config(loss_agg_mode=mode)
    results = []
    for fn in (core_algos.get_policy_loss_fn("vanilla"), core_algos.get_policy_loss_fn("trapo")):
        loss, metrics = fn(
            old_log_prob=case["old"], log_prob=case["log_prob"], advantages=case["advantages"],
            response_mask=case["mask"], loss_agg_mode=mode, config=config,
            rollout_is_weights=case["weights"] if weighted else None,
        )  # fmt: skip
        results.append((loss, torch.autograd.grad(loss, case["log_prob"])[0], metrics))
    (expected, expected_grad, theirs), (loss, grad, found) = results
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)
    assert found["actor/ppo_kl"] == pytest.approx(theirs["actor/ppo_kl"], rel=1e-4, abs=1e-6)
    assert found["actor/pg_clipfrac"] == pytest.approx(theirs["actor/pg_clipfrac"], abs=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_expert_tokens_get_the_expert_term(mode):
    case, config = make(), make_config(loss_agg_mode=mode)
    arguments = {
        "old_log_prob": case["old"], "advantages": case["advantages"], "response_mask": case["mask"],
        "loss_agg_mode": mode, "config": config,
    }  # fmt: skip
    loss, metrics = ours.trapo_policy_loss(log_prob=case["log_prob"], expert_mask=case["expert"], **arguments)
    logp = case["log_prob"]
    ratio, a, p = (logp - case["old"]).exp(), case["advantages"], logp.exp()
    own = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.28))
    own = torch.where(a < 0, torch.minimum(own, -3.0 * a), own)
    expert = torch.where(p >= 0.1, -logp, 1 - torch.log(torch.tensor(0.1)) - p / 0.1)
    plain = core_algos.agg_loss(torch.where(case["expert"], expert, own), case["mask"], mode)
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(x, logp)[0] for x in (loss, plain)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
    inside = case["expert"] & case["mask"]
    assert metrics["actor/expert_prob"] == pytest.approx(p[inside].mean().item(), rel=1e-5)


def make_batch(case, expert=True, ref=True):
    """What an engine hands a loss, in verl's padding-free layout: two prompt tokens before each response."""
    lengths = case["mask"].sum(1)

    def nested(values):
        return torch.nested.nested_tensor([v[:n] for v, n in zip(values, lengths, strict=True)], layout=torch.jagged)

    fields = {
        "response_mask": nested(case["mask"].long()), "advantages": nested(case["advantages"]),
        "old_log_probs": nested(case["old"]),
    }  # fmt: skip
    if expert:
        fields["expert_mask"] = nested(case["expert"].long())
    if ref:
        fields["ref_log_prob"] = nested(case["ref"])
    batch = TensorDict(fields, batch_size=[4])
    for name, value in {"dp_size": 1, "batch_num_tokens": 40, "global_batch_size": 4}.items():
        batch.set_non_tensor(name, value)
    return batch


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("with_kl", [False, True])
def test_the_actor_loss_without_expert_tokens_is_verls_ppo_loss(mode, with_kl, monkeypatch):
    case = make()
    # The engine's layout of log-probabilities is verl's business; hand both the padded ones.
    for where in ("verl.workers.utils.losses", "verl.workers.utils.padding"):
        monkeypatch.setattr(f"{where}.no_padding_2_padding", lambda values, data: values)
    output = {"log_probs": case["log_prob"], "entropy": case["entropy"]}
    settings = {"loss_agg_mode": mode, "entropy_coeff": 0.01, "use_kl_loss": with_kl, "kl_loss_coef": 0.1}
    results = []
    for fn in (ppo_loss, ours.actor_loss):
        config = make_config(policy_loss=PolicyLossConfig(loss_mode="vanilla"), **settings)
        loss, metrics = fn(config, output, make_batch(case, expert=False, ref=with_kl))
        grads = torch.autograd.grad(loss, (case["log_prob"], case["entropy"]))
        results.append((loss, *grads, metrics))
    (*expected, _), (*found, metrics) = results
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert {"actor/policy_loss", "actor/entropy_loss"} <= metrics.keys()


def test_the_actor_loss_reads_the_expert_mask_from_the_batch(monkeypatch):
    case = make()
    monkeypatch.setattr("verl.workers.utils.padding.no_padding_2_padding", lambda values, data: values)
    config = make_config()
    loss, metrics = ours.actor_loss(config, {"log_probs": case["log_prob"]}, make_batch(case, ref=False))
    expected, _ = ours.trapo_policy_loss(
        case["old"],
        case["log_prob"],
        case["advantages"],
        case["mask"],
        "token-mean",
        config,
        expert_mask=case["expert"],
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert {"actor/expert_loss", "actor/policy_loss", "actor/expert_prob"} <= metrics.keys()


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="kl_loss_type must be 'low_var_kl' or 'k3'; got 'mse'"):
        ours.actor_objective(make_config(use_kl_loss=True, kl_loss_type="mse"))
    case, objective = make(), tk.Objective.trapo(tis_cap=2.0)
    given = (case["old"], case["log_prob"], case["advantages"], case["mask"], "token-mean", make_config())
    with pytest.raises(ValueError, match=r"rollout_logprobs must be in the batch, which tis_cap=2.0 needs"):
        ours.trapo_policy_loss(*given, objective=objective)


# verl's fused head: the shape of its own test, cut down to what a CPU does in seconds -------------------------

# Their sizes are 1530–8192 tokens × 32256–152064 entries in bfloat16 on a GPU; the ratios are kept, the dtype widened
# to float32 as their comparison does.
HEADS = [(1, 193, 358, 1521), (1, 217, 90, 15194), (2, 77, 205, 3226)]


@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_the_fused_head_is_verls(shape, temperature):
    b, t, h, v = shape
    g = torch.Generator().manual_seed(0)
    hidden, weight = ((torch.rand(*size, generator=g) - 0.5) for size in ((b, t, h), (v, h)))
    labels = torch.randint(0, v, (b, t), generator=g)
    g_lp, g_entropy = torch.rand(b, t, generator=g) * 2 - 1, torch.rand(b, t, generator=g) - 0.5
    results = []
    for head in (VerlHead(), ours.FusedLinearForPPO()):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs, entropy = head(x, w, labels, temperature=temperature)
        grads = torch.autograd.grad((logprobs, entropy), (x, w), (g_lp, g_entropy))
        results.append((logprobs, entropy, *grads))
    tolerances = ((1e-4, 1e-4), (1e-4, 1e-4), (1e-2, 1e-4), (1e-2, 1e-4))  # theirs, for two fp32 implementations
    for a, e, (atol, rtol) in zip(results[1], results[0], tolerances, strict=True):
        torch.testing.assert_close(a, e, atol=atol, rtol=rtol)
    # Their absolute tolerance hides a gradient; ours is relative to the largest.
    for a, e in zip(results[1][2:], results[0][2:], strict=True):
        assert (a - e).abs().max() <= 1e-5 * e.abs().max()


def test_verls_forwards_use_our_head_once_told_to(monkeypatch):
    import verl.utils.experimental.torch_functional as module

    monkeypatch.setattr(module, "FusedLinearForPPO", module.FusedLinearForPPO)  # restored after the test
    ours.use_fused_head()
    from transformers import LlamaConfig, LlamaForCausalLM
    from verl.models.transformers.dense_common import forward_with_torch_backend

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=97, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    ids = torch.randint(0, 97, (2, 11))
    out = forward_with_torch_backend(model, input_ids=ids, return_dict=True, temperature=0.7)
    log_pi = (model(ids).logits / 0.7).log_softmax(-1)
    expected = log_pi.gather(-1, torch.roll(ids, -1, -1)[..., None]).squeeze(-1)
    torch.testing.assert_close(out.log_probs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.entropy, -(log_pi.exp() * log_pi).sum(-1), rtol=1e-5, atol=1e-5)
