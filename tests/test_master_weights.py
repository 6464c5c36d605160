"""An fp32 head under 16-bit hidden states: products in 16 bits, gradients of the head in fp32, never rounded."""

from __future__ import annotations

import pytest
import torch

import trapo_kernels as tk

N, D, V = 48, 16, 203
DTYPES = [torch.bfloat16, torch.float16]
BACKENDS = ["cpu", "torch", "reference"]


def case(dtype, bias=True):
    torch.manual_seed(0)
    hidden = torch.randn(N, D).to(dtype).requires_grad_()
    weight = (torch.randn(V, D) / 4).requires_grad_()
    return hidden, weight, torch.randn(V).requires_grad_() if bias else None, torch.randint(0, V, (N,))


def in_float64(hidden, weight, bias, targets, loss):
    """Gradients in float64 of the loss at the head that the products see."""
    dtype = hidden.dtype
    params = [hidden.detach().double(), weight.detach().to(dtype).double()]
    params += [] if bias is None else [bias.detach().to(dtype).double()]
    for p in params:
        p.requires_grad_()
    loss(*params, *([None] if bias is None else []), targets, "reference").backward()
    return [p.grad for p in params]


LOSSES = {
    "policy loss": lambda h, w, b, t, backend: tk.linear_policy_loss(
        h, w, t, tk.Objective.sft(), bias=b, backend=backend
    ).loss,
    "two passes": lambda h, w, b, t, backend: tk.linear_policy_loss(
        h, w, t, tk.Objective.gspo(), bias=b, advantages=torch.linspace(-1, 1, N), backend=backend,
        old_logprobs=torch.full((N,), -5.0), sequence_ids=torch.arange(N) // 8,
    ).loss,
    "logprobs": lambda h, w, b, t, backend: tk.linear_logprobs(h, w, t, bias=b, backend=backend).logprobs.mean(),
    "anchor": lambda h, w, b, t, backend: tk.linear_policy_loss(
        h, w, t, tk.Objective.asft(), bias=b, backend=backend, ref_hidden=h.detach() * 0.5, ref_weight=w.detach(),
        ref_bias=None if b is None else b.detach(),
    ).loss,
    "divergence": lambda h, w, b, t, backend: tk.linear_divergence(
        h, w, h.detach() * 0.5, w.detach(), bias=b, ref_bias=None if b is None else b.detach(),
        backend=None if backend == "cpu" else backend,
    ).loss,
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_the_head_keeps_its_dtype_and_gets_its_gradient_in_it(name, dtype, backend):
    hidden, weight, bias, targets = case(dtype)
    LOSSES[name](hidden, weight, bias, targets, backend).backward()
    assert (weight.grad.dtype, bias.grad.dtype, hidden.grad.dtype) == (torch.float32, torch.float32, dtype)
    for found, want in zip(
        (hidden, weight, bias), in_float64(hidden, weight, bias, targets, LOSSES[name]), strict=True
    ):
        assert (found.grad - want).norm() <= 2e-2 * want.norm()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_the_gradient_of_the_head_is_not_rounded_to_16_bits(backend):
    hidden, weight, _, targets = case(torch.bfloat16, bias=False)
    tk.linear_policy_loss(hidden, weight, targets, tk.Objective.sft(), backend=backend).loss.backward()
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())
    narrow = weight.detach().bfloat16().requires_grad_()
    tk.linear_policy_loss(hidden.detach(), narrow, targets, tk.Objective.sft(), backend=backend).loss.backward()
    if backend == "torch":
        assert torch.equal(weight.grad.bfloat16(), narrow.grad)  # the same sums, rounded
    else:  # the slopes that it sums are divided before they are rounded
        difference = weight.grad - narrow.grad
        assert difference.abs().max() <= 2**-7 * weight.grad.abs().max()
        assert difference.norm() <= 2**-8 * weight.grad.norm()


ids, teacher = torch.arange(4).expand(N, 4), torch.full((N, 4), -2.0)
RECOMPUTED = {
    "divergence": lambda h, w, t: LOSSES["divergence"](h, w, None, t, "torch"),
    "columns": lambda h, w, t: LOSSES["logprobs"](h, w, None, t, "triton"),
    "support": lambda h, w, t: tk.linear_support_logprobs(h, w, ids, backend="triton").tail.sum(),
    "top-k": lambda h, w, t: tk.linear_topk_divergence(h, w, ids, teacher, backend="triton").loss,
}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_nor_is_that_of_a_divergence_or_of_blocks_of_columns(name):
    if name != "divergence" and not tk.backends()["triton"].available:
        pytest.skip(tk.backends()["triton"].missing)
    hidden, weight, _, targets = case(torch.bfloat16, bias=False)
    RECOMPUTED[name](hidden, weight, targets).backward()
    narrow = weight.detach().bfloat16().requires_grad_()
    RECOMPUTED[name](hidden.detach(), narrow, targets).backward()
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())
    assert (weight.grad - narrow.grad.float()).norm() <= 4e-3 * weight.grad.norm()


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_autocast_gives_the_same(backend):
    hidden, weight, bias, targets = case(torch.bfloat16)
    tk.linear_policy_loss(hidden, weight, targets, tk.Objective.sft(), bias=bias, backend=backend).loss.backward()
    again = weight.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = tk.linear_policy_loss(
            hidden.detach(), again, targets, tk.Objective.sft(), bias=bias.detach(), backend=backend
        )
    out.loss.backward()
    assert again.grad.dtype == torch.float32
    assert torch.equal(again.grad, weight.grad)


def test_a_compiled_loss_gives_the_same():
    hidden, weight, bias, targets = case(torch.bfloat16)
    loss = lambda h, w, b: tk.linear_policy_loss(h, w, targets, tk.Objective.sft(), bias=b).loss  # noqa: E731
    params = (hidden, weight, bias)
    want = torch.autograd.grad(loss(*params), params)
    found = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*params), params)
    for a, b in zip(found, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_other_mixtures_are_refused():
    hidden, weight, _, targets = case(torch.bfloat16)
    for other in (torch.float64, torch.float16):
        with pytest.raises(TypeError, match="weight must have the dtype of hidden"):
            tk.linear_logprobs(hidden, weight.to(other), targets)
