"""Peak memory by accounting: the real host code on fake tensors, every storage counted while it lives.

Bytes beyond the inputs, of one loss and both gradients; kernels and GEMMs compute nothing, so it takes no GPU.
Fragmentation and workspaces of cuBLAS are not in it. A build of torch for CPUs cannot run autograd on fake CUDA
tensors: they are CPU tensors, with the budget and the chunk rows of CUDA, which leaves 2 MiB of blocks too many in
ours. Liger's host code asks for the device, so its row is a formula: see `liger_bytes`. Needs a process with
TRITON_INTERPRET=1, which makes our backend selectable.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import trapo_kernels as tk
from trapo_kernels.arguments import validate
from trapo_kernels.chunks import budget
from trapo_kernels.chunks.selection import Selection

from . import peers

__all__ = ["liger_bytes", "peak", "steps"]


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


def steps(providers: list[str]) -> dict[str, Callable[[Tensor, Tensor, Tensor], None]]:
    """Returns the steps by name: ours, eager torch, and the peers asked for."""
    found: dict[str, Any] = {
        "trapo_kernels": ours,
        "trapo_kernels, recomputing": ours_recomputing,
        "trapo_kernels, forward only": ours_forward,
        "eager": eager,
        "eager with entropy": eager_entropy,
    }
    theirs = {
        "cut_cross_entropy": ("cut_cross_entropy", peers.cce_step),
        "trl": ("trl, chunked logprobs", peers.trl_step),
    }
    for provider, (name, step) in theirs.items():
        if provider in providers:
            found[name] = step
    return found


def liger_bytes(shape: tuple[int, int, int]) -> int:
    """Returns what fused linear cross-entropy holds with d_weight summed in fp32: that, both gradients, and a chunk of
    logits."""
    n, d, v = shape
    rows = min(n, 2 ** math.ceil(math.log2(math.ceil(n / math.ceil(v / d)))))
    return 4 * v * d + 2 * v * d + 2 * n * d + 2 * rows * v


@contextmanager
def _without_values() -> Iterator[None]:
    """Lets whatever reads values answer as if every token counted, since fake tensors have none."""
    from triton.runtime.interpreter import InterpretedFunction

    def choose(
        active: Tensor, live: Tensor | None = None, drop_others: bool = False, leading: object = None
    ) -> Selection:
        return Selection(active.numel(), None, active.numel(), active.numel())

    def nothing(*args: Any, **kwargs: Any) -> None:  # no Mock, which would keep every argument alive
        return None

    with (
        tk.budget_mb(budget._DEFAULT_MB["cuda"]),
        mock.patch.dict(budget._FULL_SPEED_ROWS, cpu=budget._FULL_SPEED_ROWS["cuda"]),
        mock.patch.object(Selection, "choose", choose),
        mock.patch.object(validate, "check_range", nothing),
        mock.patch.object(InterpretedFunction, "run", nothing),
        mock.patch("trl.kernels.chunked_logprob._addmm_fp32", nothing) if peers.installed("trl") else nullcontext(),
    ):
        yield


def peak(step: Callable[[Tensor, Tensor, Tensor], None], shape: tuple[int, int, int]) -> int:
    """Returns the bytes live at once beyond the inputs, in bf16."""
    n, d, v = shape
    with FakeTensorMode(), _without_values():
        hidden = torch.empty(n, d, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(v, d, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.empty(n, dtype=torch.int64)
        with _Ledger() as ledger:
            for tensor in (hidden, weight, targets):
                ledger.see(tensor)
            before = ledger.live
            ledger.peak = before
            step(hidden, weight, targets)
    return ledger.peak - before
