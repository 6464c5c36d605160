"""Peak memory by accounting: the real host code on fake CUDA tensors, every storage counted while it lives.

Bytes beyond the inputs, of one loss and both gradients; kernels and GEMMs compute nothing, so it takes no GPU.
Fragmentation and workspaces of cuBLAS are not in it. Needs a process with TRITON_INTERPRET=1 (which makes the backend selectable).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import trapo_kernels as tk
from trapo_kernels.stream import Rows

from . import peers

__all__ = ["peak", "providers"]


class _Ledger(TorchDispatchMode):
    """Adds up the storages that operators return, and takes them off when they die."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(Tensor, self.see, out)
        return out

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone() -> None:
            self.live -= size
            self.known.pop(key, None)

        self.known[key] = weakref.finalize(storage, gone)


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    out = tk.linear_policy_loss(
        hidden, weight, targets, tk.Objective.trapo(entropy_coef=0.001), backend="triton",
        advantages=torch.ones_like(targets, dtype=torch.float32), normalizer=1.0,
    )  # fmt: skip
    torch.autograd.grad(out.loss, (hidden, weight))


def ours_recomputing(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    out = tk.linear_logprobs(hidden, weight, targets, entropy=True, backend="triton")
    torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), (hidden, weight))


def ours_forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    with torch.no_grad():
        tk.linear_logprobs(hidden, weight, targets, entropy=True, backend="triton")


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    logprobs = F.log_softmax(F.linear(hidden, weight).float(), -1)
    taken = logprobs.gather(-1, targets[:, None])
    torch.autograd.grad(taken.sum(), (hidden, weight))


def eager_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    logprobs = F.log_softmax(F.linear(hidden, weight).float(), -1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    torch.autograd.grad(logprobs.gather(-1, targets[:, None]).sum() + entropy.sum(), (hidden, weight))


def providers() -> dict[str, Callable[[Tensor, Tensor, Tensor], None]]:
    """Name -> step of everything that is installed."""
    found: dict[str, Any] = {
        "trapo_kernels": ours,
        "trapo_kernels, recomputing": ours_recomputing,
        "trapo_kernels, forward only": ours_forward,
        "eager": eager,
        "eager with entropy": eager_entropy,
    }
    steps = {
        "liger_kernel": ("liger_kernel, fused linear CE", peers.liger_step),
        "cut_cross_entropy": ("cut_cross_entropy", peers.cce_step),
        "trl": ("trl, chunked logprobs", peers.trl_step),
    }
    for provider, (name, step) in steps.items():
        if peers.installed(provider):
            found[name] = step
    return found


@contextmanager
def _without_values() -> Iterator[None]:
    """What reads values answers as if every token counted: fake tensors have none."""
    from triton.runtime.interpreter import InterpretedFunction

    def choose(active: Tensor, live: Tensor | None = None, drop_others: bool = False) -> Rows:
        return Rows(active.numel(), None, active.numel(), active.numel())

    with (
        mock.patch.object(Rows, "choose", choose),
        mock.patch.object(InterpretedFunction, "run", return_value=None),
        mock.patch.object(Tensor, "item", return_value=1),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
    ):
        yield


def peak(step: Callable[[Tensor, Tensor, Tensor], None], shape: tuple[int, int, int]) -> int:
    """Bytes live at once beyond the inputs, in bf16."""
    n, d, v = shape
    with FakeTensorMode(), _without_values():
        hidden = torch.empty(n, d, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        weight = torch.empty(v, d, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        targets = torch.empty(n, dtype=torch.int64, device="cuda")
        with _Ledger() as ledger:
            for tensor in (hidden, weight, targets):
                ledger.see(tensor)
            before = ledger.live
            ledger.peak = before
            step(hidden, weight, targets)
    return ledger.peak - before
