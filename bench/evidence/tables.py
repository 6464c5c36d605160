"""The evidence as Markdown, for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.evidence import estimate

__all__ = ["markdown"]

_HEAD = """# Evidence about the GPU kernels, without a GPU

Written by `make gpu-evidence` ({versions}). Nothing here was run on a GPU: kernels were compiled for cards that were
not there, bytes were counted in Triton's interpreter, memory by accounting, and times are lower bounds by arithmetic.
"""


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]) + "\n"


def _shape(row: dict[str, Any]) -> str:
    return "N={N} D={D} V={V}".format(**row["shape"])


def _widest(bits: dict[str, int]) -> str:
    return max(bits, key=int) if bits else "–"


def _kernels(rows: list[dict[str, Any]]) -> str:
    head = ["provider", "kernel", "arch", "config", "warps", "registers", "spills", "shared", "tensor core",
            "widest load, store (bits)", "TMA", "atomics"]  # fmt: skip
    return _table(head, (
        [r["provider"], r["kernel"], r["arch"], r["config"], r["warps"], *(
            [r["error"]] + [""] * 6 if "error" in r else
            [r["registers"], r["spills"], r["shared"], r["tensor_core"] or "–",
             f"{_widest(r['load_bits'])}, {_widest(r['store_bits'])}", r["tma"] or "–", r["atomics"] or "–"]
        )] for r in rows
    ))  # fmt: skip


def _traffic(rows: list[dict[str, Any]]) -> str:
    head = ["provider", "path", "shape", "kernel", "reads", "writes", "atomics"]
    return _table(
        head,
        ([r["provider"], r["path"], _shape(r), r["kernel"], r["read"], r["written"], r["atomic"] or "–"] for r in rows),
    )


def _memory(rows: list[dict[str, Any]]) -> str:
    shapes = list(dict.fromkeys(_shape(r) for r in rows))
    names = list(dict.fromkeys(r["provider"] for r in rows))
    peak = {(r["provider"], _shape(r)): f"{r['peak_bytes'] / 2**30:.2f}" for r in rows}
    return _table(["provider", *shapes], ([name, *(peak[name, shape] for shape in shapes)] for name in names))


def _roofline(rows: list[dict[str, Any]]) -> str:
    cards = list(dict.fromkeys(r["card"] for r in rows))
    keys = list(dict.fromkeys((_shape(r), r["approach"]) for r in rows))
    at = {(_shape(r), r["approach"], r["card"]): r for r in rows}
    head = ["shape", "approach", "TFLOP", "GB", *(f"{card}, ms" for card in cards)]
    return _table(head, (
        [shape, approach, f"{at[shape, approach, cards[0]]['flops'] / 1e12:.1f}",
         f"{at[shape, approach, cards[0]]['bytes'] / 1e9:.1f}",
         *(f"{at[shape, approach, card]['seconds'] * 1e3:.1f}" for card in cards)]
        for shape, approach in keys
    ))  # fmt: skip


def _estimate(rows: list[dict[str, Any]]) -> str:
    shapes = list(dict.fromkeys(_shape(r) for r in rows))
    names = list(dict.fromkeys(r["approach"] for r in rows))
    ms = {(r["approach"], _shape(r)): f"{r['ms']:.1f}" for r in rows}
    return _table(["approach", *shapes], ([name, *(ms[name, shape] for shape in shapes)] for name in names))


def _checked(rows: list[dict[str, Any]]) -> str:
    head = ["approach", "shape", "measured by others, ms", "this arithmetic, ms"]
    return _table(head, ([r["approach"], _shape(r), r["measured_ms"], f"{r['estimated_ms']:.1f}"] for r in rows))


def markdown(evidence: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in evidence["versions"].items())
    rows = ", ".join(f"{card} {n}" for card, n in evidence["rows_for_15_percent"].items())
    return "\n".join([
        _HEAD.format(versions=versions),
        "## Lower bounds: forward, backward and both gradients, bf16\n",
        "FLOPs over the dense bf16 peak or bytes over the bandwidth, whichever is longer, phase by phase: no faster "
        "than this. `all filtered` drops every block of the backward: its gradients are not exact, and how many blocks "
        "it drops depends on the data.\n\n"
        f"Rows of a chunk at which d_weight's traffic is 15% of the time of its GEMMs: {rows}.\n",
        _roofline(evidence["roofline"]),
        "## Estimated milliseconds on an H200, forward, backward and both gradients, bf16\n",
        f"The same phases with GEMMs at {estimate.FLOPS / 1e12:.0f} TFLOP/s and memory at {estimate.BANDWIDTH / 1e12} "
        "TB/s, rates that are assumed (bench/evidence/estimate.py). Arithmetic, to be replaced by `make gpu`: no clock "
        "saw any of it.\n",
        _estimate(evidence["estimate"]),
        "Beside what Liger's authors measured on an H200 (liger-kernel 0.8.5, fused_linear_cross_entropy_sm90.py):\n",
        _checked(evidence["estimate_beside_measured"]),
        "## Peak memory beyond the inputs, GiB, both gradients included, by accounting\n",
        _memory(evidence["memory"]),
        "## Bytes asked for, in units of N·V·itemsize, counted in the interpreter\n",
        "Kernels alone: on the row paths the GEMMs write each logit once more and read its gradient twice. Kernels "
        "that do their own products also read hidden and weight, and CCE's backward sums both gradients in memory.\n",
        _traffic(evidence["traffic"]),
        "## Compiled\n",
        _kernels(evidence["kernels"]),
    ])  # fmt: skip
