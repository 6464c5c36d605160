"""Metrics: the names of the table, values by hand, merging of micro-batches, no host sync."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import BACKENDS, EVERYTHING, OBJECTIVES, affordable, make_case, policy_loss, run
from torch.utils._python_dispatch import TorchDispatchMode

import trapo_kernels as tk
from trapo_kernels.metrics import policy_metrics

CONDITIONAL = {"kl_ref_k1", "kl_ref_k3", "tis_weight", "grad_left_out"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_names_are_those_of_the_table_and_values_are_0_dim(backend, objective):
    case = make_case(affordable(backend, 30), 33)
    metrics = policy_loss(case, OBJECTIVES[objective], backend).metrics
    exact = set(tk.METRICS) - {"grad_left_out"}
    assert set(metrics) == (exact if objective == "everything" else exact - {"tis_weight"})
    assert all(isinstance(value, torch.Tensor) and value.ndim == 0 for value in metrics.values())
    case.inputs = {"advantages": case.inputs["advantages"]}
    assert set(policy_loss(case, tk.Objective.sft(), backend).metrics) == set(tk.METRICS) - CONDITIONAL


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_add_up_to_the_loss(backend):
    out = policy_loss(make_case(60, 33), EVERYTHING, backend)
    parts = [out.metrics[f"loss_{name}"] for name in ("expert", "policy", "entropy", "kl")]
    assert all(parts)
    torch.testing.assert_close(sum(parts), out.loss.detach())
    torch.testing.assert_close(out.metrics["loss"], out.loss.detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_by_hand(backend):
    """Three classes with probabilities ½, ¼, ¼ for every token."""
    logits = torch.tensor([2.0, 1.0, 1.0]).log().expand(6, 3).clone().requires_grad_()
    half, quarter = math.log(0.5), math.log(0.25)
    out = tk.policy_loss_from_logits(
        logits,
        torch.tensor([0, 1, 0, 0, 1, -100]),
        tk.Objective(alpha=0.3, clip_low=0.2, clip_high=0.2, entropy_coef=0.1, tis_cap=1.5),
        advantages=torch.tensor([9.0, 9.0, 1.0, -1.0, 0.0, 1.0]),
        expert_mask=torch.tensor([True, True, False, False, False, False]),
        # ratios of the own tokens: 2, ½, 4
        old_logprobs=torch.tensor([0.0, 0.0, quarter, 0.0, 2 * quarter, 0.0]),
        ref_logprobs=torch.tensor([0.0, 0.0, half, quarter, quarter, 0.0]),
        # weights of the own tokens: 1, min(2, 1.5), 1
        rollout_logprobs=torch.tensor([0.0, 0.0, quarter, half, 2 * quarter, 0.0]),
        backend=backend,
    )
    expected = {
        "tokens": 5, "expert_tokens": 2, "own_tokens": 3, "computed_tokens": 5, "zero_gradient_tokens": 0,
        "entropy": 1.5 * math.log(2),
        "expert_prob": 0.375,
        "trsft_clipped": 0.5,
        "ratio_mean": 6.5 / 3, "ratio_max": 4.0,
        "clip_low": 1 / 3, "clip_high": 1 / 3, "clip_dual": 0.0,
        "kl_old_k1": (-math.log(2) + math.log(2) - math.log(4)) / 3,
        "kl_old_k3": ((2 - 1 - math.log(2)) + (0.5 - 1 + math.log(2)) + (4 - 1 - math.log(4))) / 3,
        "kl_ref_k1": (0 + math.log(2) + 0) / 3,
        "kl_ref_k3": (0 + (0.5 + math.log(2) - 1) + 0) / 3,
        "tis_weight": 3.5 / 3,
        "loss_expert": (-half + (1 - math.log(0.3) - 0.25 / 0.3)) / 5,
        "loss_policy": (-1.2 * 1.0 + 0.8 * 1.5 + 0) / 5,
        "loss_entropy": -0.1 * 1.5 * math.log(2),
        "loss_kl": 0.0,
    }  # fmt: skip
    expected["loss"] = sum(expected[f"loss_{name}"] for name in ("expert", "policy", "entropy", "kl"))
    assert out.metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert out.metrics[name].item() == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics_of_micro_batches_merge_to_those_of_the_batch(backend):
    case = make_case(50, 33)
    whole = run(case, EVERYTHING, backend, normalizer=50).metrics
    parts = []
    for at in (slice(0, 13), slice(13, 49), slice(49, 50)):
        part = make_case(50, 33)
        part.hidden, part.targets = part.hidden[at].detach(), part.targets[at]
        part.inputs = {name: t[at] for name, t in part.inputs.items()}
        parts.append(run(part, EVERYTHING, backend, normalizer=50).metrics)
    merged = tk.merge_metrics(parts)
    assert merged.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(merged[name], value, msg=name, check_dtype=False)
    assert tk.merge_metrics([]) == {}


class HostReads(TorchDispatchMode):
    """Operators that copy a value to the host, or whose result's shape depends on values."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_metrics_need_no_host_sync():
    n = 20
    lp = -torch.rand(n)
    tokens = tk.Tokens(lp, torch.rand(n), torch.arange(n) < 5, torch.randn(n), lp + 0.1, lp - 0.1, lp.clone())
    with HostReads() as reads:
        losses = EVERYTHING.losses(tokens)
        EVERYTHING.slopes(tokens)
        policy_metrics(EVERYTHING, tokens, losses, torch.tensor(3.0), {})
    assert reads.seen == []
    with HostReads() as reads:
        assert (lp < 0).all()
    assert reads.seen
