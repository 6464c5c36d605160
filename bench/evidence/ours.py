"""Launches of our kernels, as their own host code asks for them, at the shapes of the evidence."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from trapo_kernels.backends.base import RowInputs, RowStats
from trapo_kernels.backends.triton import rows, tiles
from trapo_kernels.chunks.buffers import logits_buffer
from trapo_kernels.objective import Objective

from .launches import Launch, recorded

__all__ = ["PROVIDER", "row_launches", "target_launches", "tile_launches"]

PROVIDER = "trapo_kernels"

# Vocabularies: a whole number of blocks, ragged, and the largest; heads: plain, and with a soft-cap.
_ROWS = (
    (152_064, torch.bfloat16, None),
    (152_064, torch.float32, None),
    (262_144, torch.bfloat16, 30.0),
    (50_257, torch.float16, 30.0),
    (1_000, torch.bfloat16, None),
)
_EVERYTHING = Objective(
    clip_low=0.2, clip_high=0.28, dual_clip=3.0, entropy_coef=0.05, kl_coef=0.1, tis_cap=2.0, expert_coef=0.7
)


def row_launches() -> Iterator[tuple[str, Launch]]:
    """Yields (config, launch) of stats, grad_ and fused_ with every term."""
    for vocab, dtype, cap in _ROWS:
        logits = logits_buffer(16, vocab, dtype, torch.device("cpu"))
        targets, vector = torch.zeros(16, dtype=torch.int64), torch.zeros(16)
        given = RowStats(vector, vector, vector, vector)
        terms = _EVERYTHING.fused()
        assert terms is not None
        with recorded() as launches:
            rows.stats(logits, targets, cap, True)
            rows.grad_(logits, targets, given, vector, vector, cap)
            rows.grad_(logits, targets, given, vector, None, cap)
            inputs = RowInputs(torch.zeros(16, dtype=torch.bool), vector, vector, vector, vector)
            if dtype.itemsize == 2:
                inputs = inputs._replace(target_logits=vector)
            rows.fused_(logits, targets, inputs, terms, 1.5, cap)
        options = ["", " with entropy", "", " with every term"]
        for launch, option in zip(launches, options, strict=True):
            head = "" if cap is None else f" softcap={cap:g}"
            yield f"V={vocab} {str(dtype).removeprefix('torch.')}{head}{option}", launch


def target_launches() -> Iterator[tuple[str, Launch]]:
    """Yields (config, launch) of the targets' logits, which heads in 16 bits take by themselves."""
    for width, dtype, with_bias in ((3_584, torch.bfloat16, False), (1_001, torch.float16, True)):
        hidden, weight = torch.empty(16, width, dtype=dtype), torch.empty(32, width, dtype=dtype)
        bias = torch.empty(32, dtype=dtype) if with_bias else None
        with recorded() as launches:
            rows.target_logits(hidden, weight, bias, torch.zeros(16, dtype=torch.int64), 1.0)
        for launch in launches:
            yield f"D={width} {str(dtype).removeprefix('torch.')}{' with a bias' if with_bias else ''}", launch


def tile_launches(arch: int) -> Iterator[tuple[str, Launch]]:
    """Yields (config, launch) of the tile kernel for one architecture, by descriptors and by pointers, and of the
    merge."""
    shapes = ((152_064, 3_584, torch.bfloat16, None), (262_144, 2_304, torch.bfloat16, 30.0),
              (152_064, 3_584, torch.float32, None), (50_257, 1_001, torch.float16, 30.0))  # fmt: skip
    for vocab, width, dtype, cap in shapes:
        hidden, weight = torch.empty(256, width, dtype=dtype), torch.empty(vocab, width, dtype=dtype)
        targets = torch.zeros(256, dtype=torch.int64)
        descriptors = tiles.tile(arch, dtype.itemsize, width, width * dtype.itemsize % 16 == 0)
        for option in dict.fromkeys((descriptors, tiles.tile(arch, dtype.itemsize, width, False))):
            with recorded() as launches:
                tiles.launch(hidden, weight, None, targets, 1.0, cap, option, 4)
            for launch in launches:
                if launch.name == "merge_stats" and (vocab, dtype, option.descriptors) != (
                    152_064,
                    torch.bfloat16,
                    False,
                ):
                    continue
                head = "" if cap is None else f" softcap={cap:g}"
                way = "TMA descriptors" if option.descriptors else "pointers"
                block = f"{option.BM}x{option.BN}x{option.BK}"
                yield f"V={vocab} D={width} {str(dtype).removeprefix('torch.')}{head} {block} {way}", launch
