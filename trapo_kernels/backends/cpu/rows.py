"""The row kernels for CPUs are in C++ (csrc/cpu): AVX-512, AVX2 or neither, as torch itself would choose.

Here is what Python has to know of them: which library to load, why it may be missing, and the shapes that the operators
`torch.ops.trapo_kernels_cpu.*` return.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .. import native
from ..base import FusedTerms, RowInputs, RowState, RowStats, stats_dtype
from .operands import BLOCK, PANEL

__all__ = ["fused_", "grad_", "library", "missing", "stats"]

_CAPABILITIES = ("AVX512", "AVX2", "DEFAULT")


def library() -> Path | None:
    """Returns the compiled library for this machine, or None."""
    best = torch.backends.cpu.get_cpu_capability()
    # A capability that is none of these is served by the last one.
    usable = _CAPABILITIES[_CAPABILITIES.index(best) if best in _CAPABILITIES else len(_CAPABILITIES) - 1 :]
    folder = Path(__file__).parents[2]
    return next((path for name in usable for path in folder.glob(f"_cpu_{name.lower()}.so")), None)


@cache
def missing() -> str | None:
    """Loads the library; returns why it cannot be here, or None."""
    found = library()
    if found is None:
        return f"the C++ extension is not compiled; where there is a C++17 compiler, `{native.REINSTALL}` does it"
    return native.misfit("C++", found, _register_fakes)


def stats(logits: Tensor, targets: Tensor, cap: float | None, entropy: bool) -> RowState:
    top, rest, dot, target = torch.ops.trapo_kernels_cpu.row_stats(logits, targets, cap, entropy)
    return RowState(top, rest, dot if entropy else None, target)


def grad_(
    logits: Tensor,
    targets: Tensor,
    stats: RowStats,
    g_lp: Tensor,
    g_entropy: Tensor | None,
    cap: float | None,
) -> None:
    torch.ops.trapo_kernels_cpu.row_grad_(
        logits, targets, stats.logprobs, stats.max, stats.log_sum, stats.entropy, g_lp, g_entropy, cap
    )


def fused_(
    logits: Tensor, targets: Tensor, inputs: RowInputs, terms: FusedTerms, scale: float, cap: float | None
) -> RowStats:
    expert, policy, *numbers = terms
    return RowStats(
        *torch.ops.trapo_kernels_cpu.row_fused_(logits, targets, *inputs, expert, policy, numbers, scale, cap)
    )


def _register_fakes() -> None:
    def four_vectors(logits: Tensor, *_: object) -> tuple[Tensor, ...]:
        return tuple(logits.new_empty(logits.shape[0], dtype=stats_dtype(logits.dtype)) for _ in range(4))

    def panel_stats(
        hidden: Tensor,
        weight: Tensor,
        bias: object,
        targets: object,
        scale: float,
        cap: object,
        entropy: bool,
        products: int,
        at_once: int,
        keep_in_weight: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        blocks = 0 if keep is None else keep.shape[1]
        if keep_in_weight is not None:
            blocks += keep_in_weight.shape[1] * keep_in_weight.dtype.itemsize // (BLOCK * 2)
        blocks = 0 if weight.dtype == torch.float32 else min(blocks, -(-hidden.shape[0] // BLOCK))
        vectors = [hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(4)]
        return *vectors, hidden.new_empty(blocks, -(-weight.shape[0] // PANEL), BLOCK, dtype=torch.float32)

    torch.library.register_fake("trapo_kernels_cpu::row_stats", four_vectors)

    def masses(hidden: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        vocab, wide = weight.shape[0], torch.float32
        by_row = hidden.new_empty(vocab, dtype=wide)
        return by_row, hidden.new_empty(-(-vocab // PANEL), hidden.shape[0], dtype=wide)

    torch.library.register_fake("trapo_kernels_cpu::panel_stats", panel_stats)
    torch.library.register_fake("trapo_kernels_cpu::panel_mass", masses)
    for nothing in ("panel_grad_", "advise_huge_pages"):
        torch.library.register_fake(f"trapo_kernels_cpu::{nothing}", lambda *_: None)
    torch.library.register_fake("trapo_kernels_cpu::row_fused_", four_vectors)
    torch.library.register_fake("trapo_kernels_cpu::row_grad_", lambda *_: None)
