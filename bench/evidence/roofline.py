"""Lower bounds from published rates: FLOPs and bytes of each approach over a card's peaks. Bounds, never times.

A phase (one GEMM over one chunk, one kernel) takes at least max(FLOPs / peak, bytes / bandwidth); phases of one stream
follow one another, so an approach takes at least the sum. Bytes are the least that DRAM must move: each phase reads its
operands once and writes its results once, whatever a cache could do on top. Everybody is counted by the same rules, in
bf16: forward + backward of one loss over all N tokens, gradients of hidden and weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from trapo_kernels.chunks.budget import budget_mb, chunk_rows, share_of
from trapo_kernels.chunks.columns import block_columns

__all__ = ["APPROACHES", "CARDS", "SHAPES", "Card", "Phase", "bound", "rows_for_share"]


@dataclass(frozen=True)
class Card:
    """Dense bf16 tensor-core peak, memory bandwidth and memory, as the maker publishes them."""

    name: str
    flops: float  # FLOP/s
    bandwidth: float  # bytes/s
    memory: float  # bytes

    @property
    def budget_mb(self) -> float:
        """Our default there."""
        return float(share_of(int(self.memory)))


CARDS = (
    Card("A100-80GB SXM", 312e12, 2.039e12, 80e9),
    Card("H100 SXM", 989.4e12, 3.35e12, 80e9),
    Card("H200 SXM", 989.4e12, 4.8e12, 141e9),
    Card("B200", 2_250e12, 8.0e12, 180e9),
)
SHAPES = (
    (4_096, 4_096, 131_072), (8_192, 3_584, 152_064), (16_384, 4_096, 128_256), (32_768, 2_048, 151_936)
)  # fmt: skip


@dataclass(frozen=True)
class Phase:
    name: str
    flops: float
    bytes: float

    def seconds(self, card: Card) -> float:
        return max(self.flops / card.flops, self.bytes / card.bandwidth)


def _gemm(name: str, m: int, n: int, k: int, out_bytes: float = 2, reads_out: bool = False) -> Phase:
    """Returns the phase of a product [m, k] × [k, n] of bf16 operands; `reads_out`: adds to what is there."""
    return Phase(name, 2.0 * m * n * k, 2.0 * (m * k + k * n) + out_bytes * m * n * (2 if reads_out else 1))


def _chunks(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def _row_chunks(n: int, d: int, v: int, rows: int, d_weight_bytes: float) -> list[Phase]:
    """Returns three GEMMs per chunk of rows, d_weight accumulated over chunks."""
    phases = []
    for i, c in enumerate(_chunks(n, rows)):
        phases += [
            _gemm("logits", c, v, d),
            Phase("row kernel", 0, 4.0 * c * v),  # one read from DRAM, one write
            _gemm("d_hidden", c, d, v),
            _gemm("d_weight", v, d, c, d_weight_bytes, reads_out=i > 0),
        ]
    return phases


def ours(n: int, d: int, v: int) -> list[Phase]:
    """Returns targets' logits in fp32, chunks of the budget, fused row kernel, d_weight in fp32, one pass at the end
    that scales and converts it."""
    rows = chunk_rows(n, 2 * v, 0, "cuda")
    targets = Phase("target logits", 0, 4.0 * n * d)  # a row of hidden and one of the weight each
    return [targets, *_row_chunks(n, d, v, rows, 4), Phase("d_weight to bf16", 0, 6.0 * v * d)]


def ours_recomputing(n: int, d: int, v: int) -> list[Phase]:
    """Returns linear_logprobs: the tile kernel forward, blocks of columns backward: a fourth GEMM."""
    columns = block_columns(n, v, 2, "cuda")
    phases = [Phase("tile kernel", 2.0 * n * d * v, 2.0 * (n * d + d * v))]
    for i, c in enumerate(_chunks(v, columns)):
        phases += [
            _gemm("logits", n, c, d),
            Phase("row kernel", 0, 4.0 * n * c),
            _gemm("d_weight", c, d, n),
            _gemm("d_hidden", n, d, c, 4, reads_out=i > 0),
        ]
    return [*phases, Phase("d_hidden to bf16", 0, 6.0 * n * d)]


def eager(n: int, d: int, v: int) -> list[Phase]:
    """Returns F.linear, .float(), log_softmax, gather, and their backwards: no entropy."""
    return [
        _gemm("logits", n, v, d),
        Phase("float, log_softmax", 0, (2 + 4 + 4 + 4) * n * v),
        Phase("backward of both", 0, (4 + 4 + 4 + 4 + 4 + 2) * n * v),
        _gemm("d_hidden", n, d, v),
        _gemm("d_weight", v, d, n),
    ]


def trl(n: int, d: int, v: int, columns: int = 32_768) -> list[Phase]:
    """Returns tiles of 4096 tokens by `columns` (TRL 1.16's), which the backward computes again; both gradients in
    fp32."""
    phases = []
    for rows in _chunks(n, 4096):
        for c in _chunks(v, columns):
            phases += [
                _gemm("logits", rows, c, d),
                Phase("forward kernel", 0, 2.0 * rows * c),
                _gemm("logits again", rows, c, d),
                Phase("backward kernel", 0, 4.0 * rows * c),
                _gemm("d_hidden", rows, d, c, 4, reads_out=True),
                _gemm("d_weight", c, d, rows, 4, reads_out=True),
            ]
    return [*phases, Phase("gradients to bf16", 0, 6.0 * (n * d + v * d))]


def liger(n: int, d: int, v: int) -> list[Phase]:
    """Returns fused linear cross-entropy at its defaults: chunks of about N·D / V rows, d_weight summed in bf16."""
    rows = min(n, 2 ** math.ceil(math.log2(math.ceil(n / math.ceil(v / d)))))
    return _row_chunks(n, d, v, rows, 2)


def liger_hopper(n: int, d: int, v: int) -> list[Phase]:
    """Returns Liger's CuTe kernels for sm_90, plain cross-entropy (Liger 0.8.5): all [N, V] logits at once, each GEMM
    once; the scale of the gradient is in the epilogue of d_weight's."""
    return [
        _gemm("logits", n, v, d),
        Phase("row kernel", 0, 4.0 * n * v),
        _gemm("d_hidden", n, d, v),
        _gemm("d_weight", v, d, n),
        Phase("d_hidden scaled", 0, 4.0 * n * d),
    ]


def liger_hopper_entropy(n: int, d: int, v: int) -> list[Phase]:
    """Returns Liger's Hopper head with entropy: a forward that writes no logits, a backward that computes them again in
    waves of 1024 tokens and adds each wave's d_weight in memory. Four GEMMs."""
    phases = [Phase("forward", 2.0 * n * d * v, 2.0 * (n * d + d * v))]
    for i, c in enumerate(_chunks(n, 1024)):
        phases += [
            _gemm("logits again, to their gradient", c, v, d),
            _gemm("d_hidden", c, d, v),
            _gemm("d_weight", v, d, c, 2, reads_out=i > 0),
        ]
    return phases


def cce(n: int, d: int, v: int, kept: float = 1.0) -> list[Phase]:
    """Returns a forward without logits; the backward computes them again in registers. `kept`: share of blocks that the
    gradient filter leaves (1: exact gradients). Its sums of dE and dC through locks are left out: this is a bound."""
    flops = 2.0 * n * d * v
    operands = 2.0 * (n * d + v * d)
    return [
        Phase("forward", flops, operands),
        Phase("backward", flops + 2 * kept * flops, 2 * operands),
    ]


def cce_filtered(n: int, d: int, v: int) -> list[Phase]:
    """Returns the phases of `cce` where the filter drops every block: gradients are no longer exact, and it depends on
    the data."""
    return cce(n, d, v, kept=0.0)


def quack(n: int, d: int, v: int) -> list[Phase]:
    """Returns quack's base pipeline (quack 0.6.5): chunks of 4096 rows, the row on chip; d_weight in fp32, and the last
    chunk's GEMM, put off to the backward, adds, scales and converts."""
    phases = _row_chunks(n, d, v, 4096, 4)
    last = phases.pop()
    several = n > 4096
    converts = Phase(
        "d_weight, last", last.flops, last.bytes - (8 if several else 4) * v * d + (6 if several else 2) * v * d
    )
    return [*phases, converts, Phase("d_hidden scaled", 0, 4.0 * n * d)]


def quack_scaled_exp(n: int, d: int, v: int) -> list[Phase]:
    """Returns quack's pipeline for sm_90, bf16, V a multiple of 128, plain cross-entropy: GEMM 1 writes E = 2^(z·log2 e
    − k) and partial sums instead of logits, a small kernel makes scales [C, V / 64] of them, and the other two GEMMs
    scale E as they read it. No pass over the logits."""
    phases = []
    for i, c in enumerate(_chunks(n, 4096)):
        strips = 2.0 * c * v / 64
        logits, d_hidden = _gemm("E", c, v, d), _gemm("d_hidden", c, d, v)
        d_weight = _gemm("d_weight", v, d, c, 4, reads_out=i > 0)
        phases += [
            Phase("E", logits.flops, logits.bytes + 8.0 * c * v / 192),
            Phase("scales", 0, 8.0 * c * v / 192 + strips + 4.0 * c * d),
            Phase("d_hidden", d_hidden.flops, d_hidden.bytes + strips),
            Phase("d_weight", d_weight.flops, d_weight.bytes + strips),
        ]
    return [*phases, Phase("gradients scaled, to bf16", 0, 6.0 * v * d + 4.0 * n * d)]


APPROACHES: dict[str, Callable[[int, int, int], list[Phase]]] = {
    "trapo_kernels": ours,
    "trapo_kernels, recomputing": ours_recomputing,
    "eager": eager,
    "trl": trl,
    "liger_kernel": liger,
    "liger_kernel, Hopper, no entropy": liger_hopper,
    "liger_kernel, Hopper, entropy": liger_hopper_entropy,
    "cut_cross_entropy, exact": cce,
    "cut_cross_entropy, all filtered": cce_filtered,
    "quack, base, no entropy": quack,
    "quack, scaled exp, no entropy": quack_scaled_exp,
}


def phases_on(approach: str, shape: tuple[int, int, int], card: Card) -> list[Phase]:
    with budget_mb(card.budget_mb):
        return APPROACHES[approach](*shape)


def bound(approach: str, shape: tuple[int, int, int], card: Card) -> dict[str, float]:
    """Returns FLOPs, bytes and the least seconds of an approach; ours with its default budget on the card."""
    phases = phases_on(approach, shape, card)
    return {
        "flops": sum(p.flops for p in phases),
        "bytes": sum(p.bytes for p in phases),
        "seconds": sum(p.seconds(card) for p in phases),
    }


def rows_for_share(card: Card, share: float = 0.15) -> int:
    """Returns the rows of a chunk at which d_weight's 8·V·D bytes are this share of the time of its 6·rows·V·D
    FLOPs."""
    return math.ceil(8 / card.bandwidth / (share * 6 / card.flops))
