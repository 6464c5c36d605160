"""The same questions put to other people's kernels, from their PyPI packages: launches, and steps that do the work.

A step is a function of (hidden [N, D], weight [V, D], targets [N]) that makes a loss and both gradients through the
provider's own host code; `kernel_steps` are what runs its Triton kernels on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench import providers

from .launches import Launch, recorded

__all__ = ["PEERS", "installed", "launches", "steps"]

# The module of each peer -> its package on PyPI.
PEERS = {providers.MODULES[package]: package for package in ("liger-kernel", "cut-cross-entropy", "trl")}

Step = Callable[[Tensor, Tensor, Tensor], Any]


def installed(provider: str) -> str | None:
    """Returns the version of a peer that is here, or None."""
    return providers.installed(PEERS[provider])


def liger_step(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Runs fused linear cross-entropy at its defaults: the logits become their gradient in one kernel."""
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

    fused_linear_cross_entropy_forward(
        hidden, weight, targets, compute_gradients=True, weight_requires_grad=True, accum_dtype=torch.float32
    )


def liger_grpo_step(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Runs GRPO from logits that exist: forward and backward kernels."""
    from liger_kernel.ops.grpo_loss import GrpoLossFunction

    n = hidden.shape[0]
    logits = torch.mm(hidden, weight.t())[None].requires_grad_()
    old, ref = (torch.zeros(1, n - 1, device=hidden.device) for _ in range(2))
    mask, advantages = torch.ones(1, n - 1, device=hidden.device), torch.ones(1, device=hidden.device)
    out = GrpoLossFunction.apply(
        logits, old, ref, targets[None, : n - 1].contiguous(), advantages, mask, 0.9, 0.04, 0.2, 0.28, True
    )
    torch.autograd.grad(out[0], logits)


def cce_step(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Runs cut cross-entropy: log-sum-exp without logits; the backward computes blocks of logits again."""
    from cut_cross_entropy.cce_backward import cce_backward_kernel
    from cut_cross_entropy.cce_lse_forward import cce_lse_forward_kernel
    from cut_cross_entropy.indexed_dot import indexed_neg_dot_forward_kernel

    lse, average = cce_lse_forward_kernel(hidden, weight, None, softcap=None, return_logit_avg=True)
    indexed_neg_dot_forward_kernel(hidden, weight, targets, False, None, None, lse.dtype)
    ordering = torch.argsort(average).to(torch.int32)
    upstream = torch.ones((), device=hidden.device)
    weight = weight.detach().requires_grad_()
    # Exact gradients: no filter.
    cce_backward_kernel(
        upstream, hidden, weight, lse, None, None, None, targets=targets, shift=False, vocab_ordering=ordering,
        grad_scale=1.0 / hidden.shape[0],
    )  # fmt: skip


def trl_step(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 8192) -> None:
    """Runs chunked logprobs and entropy, and differentiates both."""
    from trl.kernels import chunked_logprob

    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    with mock.patch.object(chunked_logprob, "_use_triton", return_value=True):
        logprobs, entropy, *_ = chunked_logprob.ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, min(chunk, weight.shape[0]), None, 1.0, ("entropy",)
        )
        with mock.patch.dict("sys.modules", {"trl.trainer.utils": _gather_nothing()}):
            torch.autograd.grad(logprobs.sum() + entropy.sum(), (hidden, weight))


def _gather_nothing() -> Any:
    """Returns a stand-in for trl.trainer.utils, which the backward asks for a context that gathers sharded heads."""
    import types
    from contextlib import nullcontext

    module = types.ModuleType("trl.trainer.utils")
    module.maybe_gather_lm_head_ctx = lambda *_: nullcontext()  # type: ignore[attr-defined]
    return module


def trl_logits_step(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Runs logprobs and entropy from logits that exist, and differentiates both."""
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    logits = torch.mm(hidden, weight.t()).requires_grad_()
    logprobs, entropy = selective_log_softmax_and_entropy(logits, targets)
    torch.autograd.grad(logprobs.sum() + entropy.sum(), logits)


def steps(provider: str) -> dict[str, Step]:
    """Returns the steps by the name of their path."""
    return {
        "liger_kernel": {"fused linear CE": liger_step, "GRPO from logits": liger_grpo_step},
        "cut_cross_entropy": {"linear CE, exact": cce_step},
        "trl": {"chunked logprobs": trl_step, "from logits": trl_logits_step},
    }[provider]


@contextmanager
def _cheap_gemms() -> Iterator[None]:
    """Makes matrix products that only have shapes: the launches that follow do not depend on values."""
    mm, addmm = torch.mm, torch.addmm

    def fake_mm(a: Tensor, b: Tensor, *, out: Tensor | None = None, **_: Any) -> Tensor:
        return a.new_zeros(a.shape[0], b.shape[1]) if out is None else out

    with mock.patch.object(torch, "mm", fake_mm), mock.patch.object(torch, "addmm", lambda c, *a, **k: c):
        yield
    assert (torch.mm, torch.addmm) == (mm, addmm)


def launches(provider: str) -> Iterator[tuple[str, Launch]]:
    """Yields (config, launch) of the provider's kernels at V = 152064, D = 3584, bf16: each specialisation once."""
    rows, vocab, width = 256, 152_064, 3_584
    for path, step in steps(provider).items():
        n = rows if provider == "cut_cross_entropy" else 16
        hidden = torch.zeros(n, width, dtype=torch.bfloat16)
        weight = torch.zeros(vocab, width, dtype=torch.bfloat16)
        with recorded() as caught, _cheap_gemms():
            step(hidden, weight, torch.zeros(n, dtype=torch.int64))
        seen = set()
        for launch in caught:
            source = launch.source()
            key = (launch.name, str(source.signature), str(source.constants), str(source.attrs))
            if launch.name not in seen and key not in seen:
                seen |= {launch.name, key}
                yield f"{path}: V={vocab} D={width} bfloat16", launch
