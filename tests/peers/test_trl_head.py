"""TRL's chunked head: the parametrisation of its kernel tests, and its function as second oracle (its torch path)."""

from __future__ import annotations

import pytest
import torch
from peer_cases import close, leaves, logits_of, logprobs_and_entropy, peer

import trapo_kernels as tk

chunked = peer("trl.kernels.chunked_logprob")
N, H, V = 64, 32, 128
HEADS = [(1.0, None), (0.5, None), (1.0, 30.0), (0.5, 30.0)]
temperatures = pytest.mark.parametrize("temperature", [1.0, 0.7])


def make(dtype=torch.float32, seed=42, bias=False):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(rows, H, generator=g).to(dtype) for rows in (N, V))
    targets = torch.randint(0, V, (N,), generator=g)
    return hidden, weight, torch.randn(V, generator=g).to(dtype) if bias else None, targets


def trl(hidden, weight, bias, targets, temperature, softcap=None, logit_scale=1.0):
    """(log-probabilities, entropies) of the installed function, over tiles that the vocabulary does not fill."""
    out = chunked.ChunkedLogProbFunction.apply(
        hidden, weight, bias, targets, temperature, 48, softcap, logit_scale, ("entropy",)
    )
    return out[0], out[1]


def ours(hidden, weight, bias, targets, temperature, softcap=None, logit_scale=1.0):
    return tk.linear_logprobs(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
        entropy=True,
    )  # fmt: skip


@temperatures
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("logit_scale", "softcap"), HEADS)
def test_forward(temperature, bias, logit_scale, softcap):
    hidden, weight, b, targets = make(bias=bias)
    found = ours(hidden, weight, b, targets, temperature, softcap, logit_scale)
    plain = logprobs_and_entropy(logits_of(hidden, weight, b, softcap, logit_scale, temperature), targets)
    for a, e, t in zip(found, plain, trl(hidden, weight, b, targets, temperature, softcap, logit_scale), strict=True):
        close(a, e, 1e-5, 1e-5)
        close(a, t, 1e-5, 1e-5)


COTANGENTS = {"logprobs": (1.0, 0.0), "entropy": (0.0, 1.0), "both": (2.0, 0.5)}
TOLERANCE = {"logprobs": 1e-5, "entropy": 1e-4, "both": 1e-4}


@temperatures
@pytest.mark.parametrize("which", COTANGENTS)
@pytest.mark.parametrize(("logit_scale", "softcap"), HEADS)
def test_backward(temperature, which, logit_scale, softcap):
    g_lp, g_entropy = COTANGENTS[which]
    tensors = make(bias=True)
    grads = []
    for fn in ("ours", "plain", "trl"):
        hidden, weight, bias = leaves(*tensors[:3])
        if fn == "plain":
            logits = logits_of(hidden, weight, bias, softcap, logit_scale, temperature)
            logprobs, entropy = logprobs_and_entropy(logits, tensors[3])
        else:
            head = ours if fn == "ours" else trl
            logprobs, entropy = head(hidden, weight, bias, tensors[3], temperature, softcap, logit_scale)
        (g_lp * logprobs + g_entropy * entropy).sum().backward()
        grads.append((hidden.grad, weight.grad, bias.grad))
    for a, plain, peer_grad in zip(*grads, strict=True):
        close(a, plain, TOLERANCE[which], TOLERANCE[which])
        close(a, peer_grad, TOLERANCE[which], TOLERANCE[which])


@temperatures
def test_backward_in_bfloat16(temperature):
    tensors = make(torch.bfloat16)
    grads = []
    for fn in ("ours", "trl", "plain", "exact"):
        hidden, weight, _ = leaves(*((t.double() if fn == "exact" else t) for t in tensors[:2]), None)
        if fn in ("ours", "trl"):
            head = ours if fn == "ours" else trl
            logprobs = head(hidden, weight, None, tensors[3], temperature)[0]
        elif fn == "plain":
            logprobs, _ = logprobs_and_entropy(logits_of(hidden, weight, temperature=temperature), tensors[3])
        else:
            logprobs, _ = logprobs_and_entropy(hidden @ weight.T / temperature, tensors[3])
        logprobs.sum().backward()
        grads.append((hidden.grad, weight.grad))
    for ours_grad, peer_grad, plain, exact in zip(*grads, strict=True):
        # Theirs rounds logits to bfloat16, ours does not round those of targets: their tolerance between two results
        # in bfloat16 cannot tell that from a mistake. The exact result can.
        errors = [(g.double() - exact).square().mean().sqrt() for g in (ours_grad, peer_grad, plain)]
        assert errors[0] <= min(errors[1:])


LOGIT_GRADIENTS = [(2.0, None, True), (None, 0.5, True), (2.0, 0.5, True), (2.0, 0.5, False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("g_lp", "g_entropy", "masked"), LOGIT_GRADIENTS)
def test_sharply_different_blocks_of_given_logits(dtype, g_lp, g_entropy, masked):
    """Their test of the row kernel: blocks of the vocabulary 40 apart, strided views, a masked row."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(2, 5, 2053, generator=g).to(dtype)
    base[..., :1024].add_(20)
    base[..., 1024:2048].sub_(20)
    targets = torch.randint(2053, (2, 5), generator=g)[:, 1:4]
    targets[0, 0] = 2052
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=torch.bool) if masked else torch.ones(2, 3, dtype=torch.bool)
    results = []
    for fn in ("ours", "plain"):
        (logits,) = leaves(base)
        if fn == "ours":
            given = targets.masked_fill(~mask, -100)
            logprobs, entropy = tk.logprobs_from_logits(logits[:, 1:4], given, temperature=0.7, entropy=True)
        else:
            found = logprobs_and_entropy(logits[:, 1:4].float() / 0.7, targets)
            logprobs, entropy = (x.masked_fill(~mask, 0) for x in found)
        ((g_lp or 0) * logprobs.sum() + (g_entropy or 0) * entropy.sum()).backward()
        results.append((logprobs, entropy, logits.grad))
    for (a, e), tolerance in zip(zip(*results, strict=True), (1e-5, 1e-5, 1e-3), strict=True):
        close(a, e, tolerance, tolerance)


def test_no_target_at_all_still_has_a_gradient_of_zero():
    hidden, weight, _ = leaves(*make()[:3])
    found = tk.linear_logprobs(hidden, weight, torch.full((N,), -100), entropy=True)
    (found.logprobs.sum() + found.entropy.sum()).backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()
