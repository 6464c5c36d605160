"""Statistics of rows beside log-probability and entropy: values, memory, and that nobody pays who did not ask."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import BACKENDS, HEADS, STREAMED, assert_close, make_case, memory, policy_loss
from test_reference import logits_of

import trapo_kernels as tk
from trapo_kernels import statistics

NAMES = ("top3_mass", "top20_entropy", "top100_mass", "sum_sq", "argmax_match", "mean_logit")
backends = pytest.mark.parametrize("backend", BACKENDS)


def plain(name, z, targets):
    pi = z.softmax(-1)
    if name == "sum_sq":
        return pi.pow(2).sum(-1)
    if name == "argmax_match":
        return (z.argmax(-1) == targets).double()
    if name == "mean_logit":
        return z.mean(-1)
    k = int(name.split("_")[0][3:])
    top = pi.sort(-1, descending=True).values[:, :k]
    if name.endswith("mass"):
        return top.sum(-1)
    return torch.distributions.Categorical(probs=top / top.sum(-1, keepdim=True)).entropy()


def found(case, backend, **options):
    return tk.linear_statistics(
        case.hidden, case.weight, case.targets, NAMES, bias=case.bias, backend=backend, **case.head, **options
    )


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS)
def test_values_are_those_of_the_plain_formulas(head, dtype, backend):
    case = make_case(40, 67, dtype=dtype, **HEADS[head])
    z = logits_of(case.to(torch.float64))
    case.targets[:10] = z[:10].argmax(-1)
    actual = found(case, backend)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    ignored = case.targets == -100
    assert actual.keys() == set(NAMES)
    for name in NAMES:
        expected = plain(name, z, case.targets).masked_fill(ignored, 0)
        if name == "argmax_match" and dtype == torch.bfloat16:
            assert (actual[name] != expected).sum() <= 2  # ties of rounded logits
        else:
            assert_close(actual[name], expected, tolerance, name)
        assert not actual[name].requires_grad


@backends
def test_a_policy_loss_reports_the_means_of_those_it_was_asked_for(backend):
    case = make_case(40, 67)
    asked = policy_loss(case, tk.Objective.trapo(), backend, statistics=["sum_sq", "argmax_match"])
    plain_ = policy_loss(case, tk.Objective.trapo(), backend)
    assert asked.metrics.keys() - plain_.metrics.keys() == {"sum_sq", "argmax_match"}
    assert torch.equal(asked.loss, plain_.loss)
    per_token = found(case, backend)["sum_sq"]
    active = case.inputs["mask"] & (case.targets != -100)
    assert_close(asked.metrics["sum_sq"], per_token[active].mean(), 1e-12, "sum_sq")
    halves = []
    for part in (active.cumsum(0) <= 9, active.cumsum(0) > 9):
        mask = case.inputs["mask"] & part
        out = policy_loss(case, tk.Objective.trapo(), backend, statistics=["sum_sq"], mask=mask)
        halves.append(out.metrics)
    assert_close(tk.merge_metrics(halves)["sum_sq"], asked.metrics["sum_sq"], 1e-12, "merged")


@pytest.mark.parametrize("backend", STREAMED)
def test_nothing_is_computed_that_nobody_asked_for(backend, monkeypatch):
    def refuse(*_):
        raise AssertionError("computed")

    monkeypatch.setattr(statistics, "row_statistics", refuse)
    case = make_case(10, 33)
    policy_loss(case, tk.Objective.trapo(entropy_coef=0.1), backend)
    with pytest.raises(AssertionError, match="computed"):
        policy_loss(case, tk.Objective.eaft(), backend)


@pytest.mark.parametrize("backend", STREAMED)
def test_memory_keeps_to_the_budget(backend):
    case = make_case(400, 20011, 24, dtype=torch.float32)
    with tk.budget_mb(12):
        used = memory(lambda: found(case, backend))
    assert used.peak <= 12 * 2**20 + 400 * 8 * 40


def test_an_unknown_name_is_refused():
    case = make_case(4, 33)
    message = r"^linear_statistics: statistics must be among 'top20_mass', .*; got 'top0_mass'"
    with pytest.raises(ValueError, match=message):
        tk.linear_statistics(case.hidden, case.weight, case.targets, ["top0_mass"])
    with pytest.raises(ValueError, match=r"^linear_policy_loss: statistics must be among"):
        policy_loss(case, tk.Objective.trapo(), "torch", statistics=["perplexity"])


@pytest.mark.parametrize("n", [1, 7, 100])
@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_the_threshold_of_sed_leaves_its_share_of_the_tokens_at_or_above_it(n, share):
    masses = torch.rand(n)
    found = tk.sed_threshold(masses, share)
    assert abs(float((masses >= found).float().mean()) - share) <= max(1 / n, 0.5 / n + 1e-6)


@pytest.mark.parametrize(("masses", "share"), [(torch.empty(0), 0.7), (torch.rand(3), 0.0), (torch.rand(3), 1.5)])
def test_the_threshold_of_sed_refuses_nothing_and_no_share(masses, share):
    with pytest.raises(ValueError, match=r"^sed_threshold: needs tokens and a share in"):
        tk.sed_threshold(masses, share)
