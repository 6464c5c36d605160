"""Log-probabilities with foreseen gradients, against plain autograd on float64 logits, foreseen rightly and wrongly."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import BACKENDS, TOLERANCE, affordable, assert_close, make_case, slow

import trapo_kernels as tk
from trapo_kernels import foreseen
from trapo_kernels.foreseen import Foreseen, token_outputs

STATISTICS = ("argmax_match", "mean_logit", "sum_sq")


def plain_outputs(case):
    """Log-probabilities, entropies and statistics from all logits."""
    z = case.hidden @ case.weight.T + (0 if case.bias is None else case.bias)
    z = z * case.head.get("logit_scale", 1.0)
    cap = case.head.get("softcap")
    z = (z if cap is None else cap * torch.tanh(z / cap)) / case.head.get("temperature", 1.0)
    log_pi = z.log_softmax(-1)
    active = case.targets != -100
    logprobs = log_pi.gather(-1, case.targets.clamp(min=0)[:, None]).squeeze(-1)
    found = (logprobs, -(log_pi.exp() * log_pi).sum(-1), (z.argmax(-1) == case.targets).double(), z.mean(-1))
    return [torch.where(active, t, 0) for t in (*found, log_pi.exp().square().sum(-1))]


def clipped_loss(logprobs, entropy, advantages, old):
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum() - 0.3 * entropy.sum()


OTHER_LOSSES = {
    "another weight of one token": lambda lp, h, a, old: clipped_loss(lp, h, a, old) + 0.01 * lp[3],
    "no entropy": lambda lp, h, a, old: clipped_loss(lp, h.detach(), a, old),
    "entropy alone": lambda lp, h, a, old: -0.3 * h.sum(),
    "twice the entropy": lambda lp, h, a, old: clipped_loss(lp, 2 * h, a, old),
}


def run(backend, loss_of, *, dtype=torch.float32, rows=40, frozen=(), head=None):
    """(gradients, expected ones; how often it was foreseen wrongly; outputs, expected ones)."""
    exact = make_case(
        affordable(backend, rows), 61, **(head or {"with_bias": True, "temperature": 1.3, "softcap": 4.0})
    )
    exact.targets[1] = -100
    case = exact.to(dtype)
    for each in (exact, case):
        for i, t in enumerate(each.params()):
            t.requires_grad_(i not in frozen)
    expected = plain_outputs(exact)
    g = torch.Generator().manual_seed(1)
    a = torch.randn(case.targets.shape, generator=g, dtype=torch.float64)
    a[2] = 0
    old = expected[0].detach() + 0.3 * torch.randn(a.shape, generator=g, dtype=torch.float64)
    active = exact.targets != -100
    missed = []
    objective = tk.Objective.grpo(entropy_coef=0.3)
    out = token_outputs(
        case.hidden, case.weight, case.targets, bias=case.bias, entropy=True, statistics=STATISTICS, backend=backend,
        foreseen=Foreseen(objective, {"advantages": a, "old_logprobs": old}, lambda: missed.append(1)), **case.head,
    )  # fmt: skip
    assert out.entropy is not None
    grads = []
    for values, each in ((expected[:2], exact), ((out.logprobs, out.entropy), case)):
        lp, h = (torch.where(active, t, 0) for t in values)
        loss = 0.37 * loss_of(lp, h, a * active, old)  # a factor that is not foreseen
        trained = [t for t in each.params() if t.requires_grad]
        grads.append(torch.autograd.grad(loss, trained))
    return grads[1], grads[0], len(missed), (out.logprobs, out.entropy, *out.statistics.values()), expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_foreseen_loss_gets_its_gradients_times_what_it_was_multiplied_by(backend, dtype, monkeypatch):
    monkeypatch.setattr(foreseen, "_recomputed", lambda *_: pytest.fail("recomputed"))
    grads, expected, missed, outputs, plain = run(backend, clipped_loss, dtype=dtype)
    assert not missed
    for ours, exact in zip(grads, expected, strict=True):
        assert_close(ours, exact, TOLERANCE[dtype], "gradient")
    for name, ours, exact in zip(("logprobs", "entropy", *STATISTICS), outputs, plain, strict=True):
        if name != "argmax_match" or dtype != torch.bfloat16:  # where rounding can change which is the largest
            assert_close(ours, exact, TOLERANCE[dtype], name)


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        pytest.param(b, n, marks=[pytest.mark.slow] if slow(b) and n != "no entropy" else [])
        for b in BACKENDS
        for n in OTHER_LOSSES
    ],
)
def test_any_other_loss_gets_its_own_gradients(backend, name):
    grads, expected, missed, *_ = run(backend, OTHER_LOSSES[name])
    assert missed == (backend != "reference")
    for ours, exact in zip(grads, expected, strict=True):
        assert_close(ours, exact, 1e-5, "gradient")


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1)], ids=str)
def test_frozen_parameters_have_no_gradient(frozen):
    for loss_of in (clipped_loss, OTHER_LOSSES["entropy alone"]):
        grads, expected, *_ = run("torch", loss_of, frozen=frozen)
        for ours, exact in zip(grads, expected, strict=True):
            assert_close(ours, exact, 1e-5, "gradient")


def make_sft(scale=1.0):
    case = make_case(9, 31, dtype=torch.float32).requires_grad()
    case.targets.clamp_(min=0)
    missed = []
    out = token_outputs(
        case.hidden, case.weight, case.targets, foreseen=Foreseen(tk.Objective.sft(), missed=lambda: missed.append(1))
    )
    return case, out.logprobs * scale, missed


def test_a_second_backward_through_the_same_graph_is_the_first_again():
    case, logprobs, missed = make_sft()
    loss = -logprobs.mean()
    first = torch.autograd.grad(loss, case.params(), retain_graph=True)
    second = torch.autograd.grad(loss, case.params())
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)
    assert not missed


@pytest.mark.parametrize("factor", [0.0, torch.inf, torch.nan], ids=str)
def test_no_gradient_and_no_number_come_through(factor):
    case, logprobs, _ = make_sft()
    grads = torch.autograd.grad(-(logprobs * factor).sum(), case.params())
    for grad in grads:
        assert not grad.any() if factor == 0 else grad.isnan().any()


def test_no_tokens_at_all():
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.zeros(7, 4, requires_grad=True)
    out = token_outputs(
        hidden, weight, torch.zeros(0, dtype=torch.long), statistics=STATISTICS, foreseen=Foreseen(tk.Objective.sft())
    )
    assert not any(grad.any() for grad in torch.autograd.grad(out.logprobs.sum(), (hidden, weight)))


def test_what_cannot_be_foreseen_is_refused_in_one_line():
    case = make_case(4, 7, dtype=torch.float32).requires_grad()
    with pytest.raises(ValueError, match="foreseen must be of an objective that reads tokens one by one"):
        token_outputs(case.hidden, case.weight, case.targets, foreseen=Foreseen(tk.Objective.gspo()))
    with pytest.raises(TypeError, match=r"foreseen.inputs must be among advantages, .*; got rewards"):
        token_outputs(
            case.hidden, case.weight, case.targets, foreseen=Foreseen(tk.Objective.sft(), {"rewards": case.targets})
        )
