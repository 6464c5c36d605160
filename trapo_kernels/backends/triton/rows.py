"""This file launches the row kernels in Triton, for CUDA devices, and for CPU tensors under TRITON_INTERPRET=1.
Kernels: row_kernels.py.

Sizes come from the one table here, chosen offline by bytes of a row; nothing is tuned at a user's call. The arithmetic
behind it: one program per row reads the row twice, and the second read should come from L2. A row of V = 152,064 in
bf16 has 297 KiB; with one program per multiprocessor (32 warps, at most 64 registers a thread) an H100 has
132 · 297 KiB = 38 MiB of rows in flight in its 50 MB of L2, an A100 31 of 40 MB, a B200 43 of 126 MB. Smaller rows take
fewer warps, and several programs share a multiprocessor. A block holds two 16-byte accesses per thread: 132 · 1024 · 32
bytes = 4.1 MiB in flight, which covers 3.35 TB/s · 1 µs of latency.

The operators are registered with torch.library, with fake kernels, so that torch.compile and FakeTensorMode see them.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base import FusedTerms, RowInputs, RowState, RowStats, stats_dtype

__all__ = ["Sizes", "fused_", "grad_", "interpreted", "missing", "sizes", "stats", "target_logits"]


class Sizes(NamedTuple):
    """Holds a program's block [R, K] and its warps."""

    R: int
    K: int
    warps: int


# (rows up to this many bytes, warps, 16-byte accesses per thread and block)
_TABLE = ((4_096, 4, 1), (32_768, 8, 2), (131_072, 16, 2), (2**62, 32, 2))


# Columns of hidden and weight that a program of `target_logits` takes at once: 16 bytes a thread of each.
_TARGET_BLOCK = 1024


def sizes(vocab: int, dtype: torch.dtype, capped: bool = False) -> Sizes:
    """Returns the table's entry for the bytes of a row. At 64 registers a thread a soft-cap leaves room for one access
    in flight."""
    _, warps, accesses = next(entry for entry in _TABLE if vocab * dtype.itemsize <= entry[0])
    if capped and warps >= 16:
        accesses = 1
    return Sizes(32 * warps * accesses, 16 // dtype.itemsize, warps)


def interpreted() -> bool:
    """Returns whether Triton runs its kernels in Python on CPU tensors: TRITON_INTERPRET was set when it was first
    imported."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def missing() -> str | None:
    """Returns why this backend does not exist here; None: it does."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device (on CPU tensors it runs interpreted alone: TRITON_INTERPRET=1)"
    return None


@functools.cache
def _kernels() -> ModuleType:
    from . import row_kernels

    return row_kernels


@functools.cache
def _wide(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


def _vectors(logits: Tensor, count: int) -> list[Tensor]:
    return [logits.new_empty(logits.shape[0], dtype=stats_dtype(logits.dtype)) for _ in range(count)]


def _common(logits: Tensor, cap: float | None) -> dict[str, Any]:
    """Returns the keyword arguments of every kernel."""
    size = sizes(logits.shape[1], logits.dtype, cap is not None)
    return {"cap": cap, "WIDE": _wide(logits.dtype), "R": size.R, "K": size.K, "num_warps": size.warps}


@torch.library.custom_op("trapo_kernels::triton_row_stats", mutates_args=())
def _stats(logits: Tensor, targets: Tensor, cap: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, vocab = logits.shape
    out = _vectors(logits, 4)
    if rows:
        with torch.cuda.device_of(logits):
            _kernels().row_stats[(rows,)](logits, targets, *out, vocab, logits.stride(0), **_common(logits, cap))
    return out[0], out[1], out[2], out[3]


@_stats.register_fake
def _(logits: Tensor, targets: Tensor, cap: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = _vectors(logits, 4)
    return out[0], out[1], out[2], out[3]


def stats(logits: Tensor, targets: Tensor, cap: float | None, entropy: bool) -> RowState:
    top, rest, dot, target = _stats(logits, targets.contiguous(), cap)
    return RowState(top, rest, dot if entropy else None, target)


@torch.library.custom_op("trapo_kernels::triton_row_grad_", mutates_args=("logits",))
def _grad_(
    logits: Tensor,
    targets: Tensor,
    logprobs: Tensor,
    top: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    g_lp: Tensor,
    g_entropy: Tensor | None,
    cap: float | None,
) -> None:
    rows, vocab = logits.shape
    if rows:
        with torch.cuda.device_of(logits):
            _kernels().row_grad[(rows,)](
                logits, targets, logprobs, top, log_sum, entropy, g_lp, g_entropy, vocab, logits.stride(0),
                ENTROPY=g_entropy is not None, **_common(logits, cap),
            )  # fmt: skip


@_grad_.register_fake
def _(*_: Any) -> None:
    return None


def grad_(
    logits: Tensor,
    targets: Tensor,
    stats: RowStats,
    g_lp: Tensor,
    g_entropy: Tensor | None,
    cap: float | None,
) -> None:
    stats = stats.map(Tensor.contiguous)
    g_entropy = None if g_entropy is None else g_entropy.contiguous()
    _grad_(
        logits, targets.contiguous(), stats.logprobs, stats.max, stats.log_sum,
        None if g_entropy is None else stats.entropy, g_lp.contiguous(), g_entropy, cap,
    )  # fmt: skip


@torch.library.custom_op("trapo_kernels::triton_target_logits", mutates_args=())
def _target_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float) -> Tensor:
    rows, width = hidden.shape
    out = hidden.new_empty(rows, dtype=torch.float32)
    if rows:
        with torch.cuda.device_of(hidden):
            _kernels().target_logits[(rows,)](
                hidden, weight, bias, targets, out, weight.shape[0], width, *hidden.stride(), *weight.stride(), scale,
                BLOCK=_TARGET_BLOCK, num_warps=4,
            )  # fmt: skip
    return out


@_target_logits.register_fake
def _(hidden: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32)


def target_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float) -> Tensor:
    bias = None if bias is None else bias.contiguous()
    found: Tensor = _target_logits(hidden, weight, bias, targets.contiguous(), scale)
    return found


@torch.library.custom_op("trapo_kernels::triton_row_fused_", mutates_args=("logits",))
def _fused_(
    logits: Tensor,
    targets: Tensor,
    expert: Tensor,
    advantages: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    weights: Tensor,
    target_logits: Tensor | None,
    terms: Sequence[float],
    scale: float,
    cap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, vocab = logits.shape
    out = _vectors(logits, 4)
    t = FusedTerms(int(terms[0]), int(terms[1]), *terms[2:])
    if rows:
        with torch.cuda.device_of(logits):
            _kernels().row_fused[(rows,)](
                logits, targets, expert, advantages, old_logprobs, ref_logprobs, rollout_logprobs, weights,
                target_logits, *out,
                vocab, logits.stride(0), scale, t.expert_coef, t.alpha, t.luffy_gamma, t.clip_low, t.clip_high,
                t.dual_clip, t.entropy_coef, t.kl_coef, t.tis_cap,
                EXPERT=t.expert, POLICY=t.policy, ADVANTAGES=advantages is not None, OLD=old_logprobs is not None,
                TIS=t.tis_cap != 0, KL=t.kl_coef != 0, ENTROPY=t.entropy_coef != 0, EXACT=target_logits is not None,
                **_common(logits, cap),
            )  # fmt: skip
    return out[0], out[1], out[2], out[3]


@_fused_.register_fake
def _(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = _vectors(logits, 4)
    return out[0], out[1], out[2], out[3]


def fused_(
    logits: Tensor, targets: Tensor, inputs: RowInputs, terms: FusedTerms, scale: float, cap: float | None
) -> RowStats:
    if inputs.weights is None:
        # Calls with weights and without, inside a graph capture and before it, launch the same kernel.
        inputs = inputs._replace(weights=logits.new_ones(logits.shape[0], dtype=stats_dtype(logits.dtype)))
    given = (None if t is None else t.contiguous() for t in inputs)
    return RowStats(*_fused_(logits, targets.contiguous(), *given, [float(x) for x in terms], scale, cap))
