"""The row kernels for CUDA are in C++ (csrc/cuda): a block or a cluster of blocks a row, the row on chip where it fits.

Here is what Python has to know of them: which library to load, why it may be missing, and the shapes that the operators
`torch.ops.trapo_kernels_cuda.*` return.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..chunks import products
from . import native
from .base import FusedTerms, RowInputs, RowKernel, RowState, RowStats, stats_dtype

_LIBRARY = "_cuda.so"


@cache
def missing() -> str | None:
    """Loads the library; returns why it cannot be here, or None."""
    library = Path(__file__).parents[1] / _LIBRARY
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not built for CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the device is of compute capability {major}.{minor}; 8.0 is needed"
    if not library.is_file():
        return "the CUDA extension is not compiled; reinstall with nvcc, TRAPO_KERNELS_CUDA=1 and --no-build-isolation"
    return native.misfit("CUDA", library, register_fakes, stable=True) or unresolved()


def unresolved() -> str | None:
    """Returns what the loaded library does not find in torch, or None."""
    if torch.ops.trapo_kernels_cuda.stream_symbol():
        return None
    return f"torch {torch.__version__} shows no CUDA streams to extensions (aoti_torch_get_current_cuda_stream)"


def stats(logits: Tensor, targets: Tensor, cap: float | None, entropy: bool) -> RowState:
    top, rest, dot, target = torch.ops.trapo_kernels_cuda.row_stats(logits, targets.contiguous(), cap, entropy)
    return RowState(top, rest, dot if entropy else None, target)


def grad_(
    logits: Tensor,
    targets: Tensor,
    stats: RowStats,
    g_lp: Tensor,
    g_entropy: Tensor | None,
    cap: float | None,
) -> None:
    given = (stats.logprobs, stats.max, stats.log_sum, stats.entropy, g_lp, g_entropy)
    vectors = [_vector(t, logits) for t in given]
    torch.ops.trapo_kernels_cuda.row_grad_(logits, targets.contiguous(), *vectors, cap)


def fused_(
    logits: Tensor, targets: Tensor, inputs: RowInputs, terms: FusedTerms, scale: float, cap: float | None
) -> RowStats:
    expert, policy, *numbers = terms
    is_expert, *others = inputs
    assert is_expert is not None
    vectors = [_vector(t, logits) for t in others]
    return RowStats(
        *torch.ops.trapo_kernels_cuda.row_fused_(
            logits, targets.contiguous(), is_expert.contiguous(), *vectors, expert, policy, numbers, scale, cap
        )
    )


def target_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float) -> Tensor:
    if weight.stride(1) != 1:
        return products.target_logits(hidden, weight, bias, targets, scale)
    bias = None if bias is None else bias.contiguous()
    found: Tensor = torch.ops.trapo_kernels_cuda.target_logits(
        hidden.contiguous(), weight, bias, targets.contiguous(), scale
    )
    return found


def _vector(t: Tensor | None, logits: Tensor) -> Tensor | None:
    return None if t is None else t.to(stats_dtype(logits.dtype)).contiguous()


def register_fakes() -> None:
    def four_vectors(logits: Tensor, *_: object) -> tuple[Tensor, ...]:
        return tuple(logits.new_empty(logits.shape[0], dtype=stats_dtype(logits.dtype)) for _ in range(4))

    def one_vector(hidden: Tensor, *_: object) -> Tensor:
        return hidden.new_empty(hidden.shape[0], dtype=torch.float32)

    torch.library.register_fake("trapo_kernels_cuda::target_logits", one_vector)
    torch.library.register_fake("trapo_kernels_cuda::row_stats", four_vectors)
    torch.library.register_fake("trapo_kernels_cuda::row_fused_", four_vectors)
    torch.library.register_fake("trapo_kernels_cuda::row_grad_", lambda *_: None)


KERNEL = RowKernel(stats, grad_, fused_=fused_, target_logits=target_logits)
