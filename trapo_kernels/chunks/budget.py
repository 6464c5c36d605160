"""This file says how many rows of logits are held at once, and where that number comes from.

Everything that grows with rows × vocabulary counts against the budget: the reused logits buffer, the row kernel's
scratch, the block in which low-precision gradients are widened. Outputs, and gradients of the size of the
inputs, do not: they are there whatever the method.

Fewer rows than a GEMM needs to run at full speed cost time; more cost memory and win nothing:
- CPU: fp32 GEMMs are at full speed from about 512 rows.
- CUDA: each chunk reads and writes d_weight once, in fp32: 8·V·D bytes against 6·rows·V·D FLOPs. By published rates
  that traffic is 15% of the GEMMs' time at 2,626 rows of an H100 (8 / 3.35e12 against 6 · rows / 989e12 seconds per
  element of d_weight), 1,361 of an A100 and 2,501 of a B200; at 8,192 rows 5% of an H100's, and beyond there is little
  left to win. So the default is 2% of the card's memory: on an H200 8,192 bf16 rows of V = 152,064. Arithmetic
  (bench/evidence/roofline.py), not a measurement.

A GPU's chunks are multiples of 128 rows, of which tiles of a GEMM are made.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["budget_mb", "chunk_rows", "get_budget_mb", "set_budget_mb"]

ENV = "TRAPO_KERNELS_BUDGET_MB"
_DEFAULT_MB = {"cpu": 144.0, "cuda": 1536.0}
_FULL_SPEED_ROWS = {"cpu": 512, "cuda": 8192}
_ROW_MULTIPLE = {"cpu": 16, "cuda": 128}

# Of a card's memory; but no less than a small card's chunks need to be worth their traffic, no more than pays.
_SHARE, _LEAST_MB, _MOST_MB = 0.02, 768, 4096

_chosen_mb: float | None = None


def get_budget_mb(device_type: str = "cpu") -> float:
    """Returns the budget in MiB: what `set_budget_mb` chose, else TRAPO_KERNELS_BUDGET_MB, else 144; on CUDA 2% of the
    card's memory, between 768 and 4096 (1536 where no card is seen)."""
    if _chosen_mb is not None:
        return _chosen_mb
    if ENV in os.environ:
        return _check(os.environ[ENV], ENV)
    if device_type == "cuda" and torch.cuda.is_available():
        return _share_of_card(torch.cuda.current_device())
    return _DEFAULT_MB.get(device_type, _DEFAULT_MB["cuda"])


@functools.cache
def _share_of_card(index: int) -> float:
    return share_of(torch.cuda.get_device_properties(index).total_memory)


def share_of(memory: int) -> float:
    """Returns the budget of a card of so many bytes, in MiB."""
    # Whole steps, so that cards of one kind agree: ranks that share a vocabulary need the same chunks.
    return float(min(max(int(_SHARE * memory / 2**20) // 64 * 64, _LEAST_MB), _MOST_MB))


def set_budget_mb(megabytes: float | None) -> None:
    """Bounds the temporaries that grow with rows × vocabulary, in MiB, for this process; None = back to the default.

    A budget below one row of logits is exceeded by that one row.

    Raises:
        ValueError: not a finite number above 0.
    """
    global _chosen_mb
    _chosen_mb = None if megabytes is None else _check(megabytes, "set_budget_mb: megabytes")


@contextmanager
def budget_mb(megabytes: float | None) -> Iterator[None]:
    """Sets the budget, as `set_budget_mb` does, for the length of a `with` block."""
    before = _chosen_mb
    set_budget_mb(megabytes)
    try:
        yield
    finally:
        set_budget_mb(before)


def chunk_rows(rows: int, row_bytes: int, scratch_bytes: int, device_type: str, most: int | None = None) -> int:
    """Returns how many rows a chunk has, so that rows · row_bytes + scratch_bytes keeps to the budget and the chunks
    are about equal.

    `most`: the number beyond which more rows win nothing; None = what is known of whole GEMMs on such a device.
    """
    room = int(get_budget_mb(device_type) * 2**20) - scratch_bytes
    most = min(room // row_bytes, most or _FULL_SPEED_ROWS.get(device_type, _FULL_SPEED_ROWS["cuda"]))
    multiple = _ROW_MULTIPLE.get(device_type, _ROW_MULTIPLE["cuda"])
    if most >= multiple:
        most -= most % multiple
    most = max(most, 1)
    even = math.ceil(rows / math.ceil(rows / most)) if rows else 1
    return min(most, math.ceil(even / multiple) * multiple)


def _check(value: float | str, name: str) -> float:
    try:
        megabytes = float(value)
    except (TypeError, ValueError):
        megabytes = math.nan
    if not (math.isfinite(megabytes) and megabytes > 0):
        raise ValueError(f"{name} must be a finite number of MiB above 0; got {value!r}")
    return megabytes
