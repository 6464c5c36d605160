"""Apple's cut-cross-entropy: the parametrisation of its forward and backward tests, and its function as second oracle.

Its tests hold an error against that of plain torch in the same dtype: |ours − fp32| ≤ |torch − fp32| + tolerance.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from peer_cases import leaves, logits_of, peer
from torch.nn import functional as F

import trapo_kernels as tk

cce = peer("cut_cross_entropy")
SHAPES = [(256, 512, 128), (252, 507, 128), (252, 507, 123)]
FORWARD = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
BACKWARD = {torch.float16: 1e-3, torch.bfloat16: 1e-2}
# A seed per case makes each a case of its own, whatever runs before.
CASES = list(itertools.product([None, 20.0], [False, True], [False, True]))


def name(dtype):
    return str(dtype).removeprefix("torch.")


def make(shape, dtype, has_bias, invalids, seed=0):
    g = torch.Generator().manual_seed(seed)
    n, vocab, width = shape
    hidden = (torch.randn(n, width, generator=g) / width**0.5).to(dtype)
    weight = torch.randn(vocab, width, generator=g).to(dtype)
    weight[: min(n, vocab) // 2] = hidden[: min(n, vocab) // 2]
    targets = torch.randint(0, vocab, (n,), generator=g)
    if invalids:
        targets[torch.randperm(n, generator=g)[: int(0.2 * n)]] = -100
    bias = (torch.randn(vocab, generator=g) * 0.02).to(dtype) if has_bias else None
    return hidden.view(4, -1, width), weight, bias, targets.view(4, -1)


def shifted(hidden, targets, shift):
    return (hidden[:, :-shift], targets[:, shift:]) if shift else (hidden, targets)


def plain(hidden, weight, bias, targets, softcap, reduction="none"):
    """Cross-entropy of logits in the inputs' dtype."""
    logits = hidden.flatten(0, -2) @ weight.T
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return F.cross_entropy(logits.float(), targets.flatten(), ignore_index=-100, reduction=reduction)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FORWARD, ids=name)
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize(("softcap", "has_bias", "invalids"), CASES)
def test_losses(shape, dtype, shift, softcap, has_bias, invalids):
    hidden, weight, bias, targets = make(shape, dtype, has_bias, invalids)
    hidden, targets = shifted(hidden, targets, shift)
    wide = [None if t is None else t.float() for t in (hidden, weight, bias)]
    exact, same = plain(*wide, targets, softcap), plain(hidden, weight, bias, targets, softcap)
    ours = -tk.linear_logprobs(hidden, weight, targets, bias=bias, softcap=softcap).logprobs.flatten()
    assert ((ours - exact).abs() <= (same - exact).abs() + FORWARD[dtype]).all()


def gradients(loss, tensors):
    return [g.float() for g in torch.autograd.grad(loss, [t for t in tensors if t is not None])]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", BACKWARD, ids=name)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("softcap", "has_bias", "invalids"), CASES)
def test_gradients_of_the_mean(shape, dtype, shift, softcap, has_bias, invalids):
    tensors = make(shape, dtype, has_bias, invalids)
    targets = tensors[3]
    losses = []
    for convert in (lambda t: t.float(), lambda t: t):
        hidden, weight, bias = leaves(*(None if t is None else convert(t) for t in tensors[:3]))
        h, t = shifted(hidden, targets, shift)
        losses.append(gradients(plain(h, weight, bias, t, softcap, "mean"), (hidden, weight, bias)))
    hidden, weight, bias = leaves(*tensors[:3])
    h, t = shifted(hidden, targets, shift)
    out = tk.linear_policy_loss(h, weight, t, tk.Objective.sft(), bias=bias, softcap=softcap)
    exact, same, ours = *losses, gradients(out.loss, (hidden, weight, bias))
    for a, b, c in zip(exact, same, ours, strict=True):
        assert ((c - a).abs() <= (b - a).abs() + BACKWARD[dtype]).all()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_its_own_function_agrees_in_float32(shape, softcap, reduction):
    tensors = make(shape, torch.float32, False, True)  # the release on PyPI takes no bias
    targets, results = tensors[3], []
    for which in ("cce", "ours"):
        hidden, weight = leaves(*tensors[:2])
        if which == "cce":
            with torch.compiler.set_stance("force_eager"):  # its plain path; compiling says nothing more about numbers
                loss = cce.linear_cross_entropy(
                    hidden, weight, targets, softcap=softcap, reduction=reduction, impl="torch_compile"
                )
        else:
            loss = -tk.linear_logprobs(hidden, weight, targets, softcap=softcap).logprobs
            loss = {"none": loss, "sum": loss.sum(), "mean": loss.sum() / (targets != -100).sum()}[reduction]
        loss.sum().backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wanted", [(True, False, True), (False, True, False), (False, False, True)], ids=str)
def test_gradients_are_computed_for_what_asks_for_them(wanted):
    hidden, weight, bias, targets = make(SHAPES[0], torch.bfloat16, True, False)
    for t, needs in zip((hidden, weight, bias), wanted, strict=True):
        t.requires_grad_(needs)
    tk.linear_policy_loss(hidden, weight, targets, tk.Objective.sft(), bias=bias).loss.backward()
    assert [t.grad is not None for t in (hidden, weight, bias)] == list(wanted)
    exact = leaves(hidden.float(), weight.float(), bias.float())
    F.cross_entropy(logits_of(*exact).flatten(0, -2), targets.flatten()).backward()
    for t, e in zip((hidden, weight, bias), exact, strict=True):
        if t.grad is not None:
            torch.testing.assert_close(t.grad.float(), e.grad, atol=1e-2, rtol=0)
