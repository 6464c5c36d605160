"""Stage: what the card can do at most: copy, each GEMM of the stream by chunk rows, alignment and beta, and the row
kernels alone in GB/s of the logits' own bytes."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

import trapo_kernels as tk
from bench.gpu.rows import Rows, one_line, options, seconds_of
from trapo_kernels.backends.base import RowInputs

__all__ = ["main"]

# (chunk rows, D, V): waves of 132 multiprocessors, then ragged vocabularies
GEMMS = {
    "cuda": [
        *[(4096, 4096, 131072), (4096, 3584, 152064), (8192, 3584, 152064), (4736, 3584, 152064)],
        *[(4096, 4096, 128256), (8192, 4096, 128256), (4096, 2048, 151936), (8192, 2048, 151936)],
        *[(4096, 4096, 128257), (4096, 4096, 50257)],
    ],
    "cpu": [(64, 32, 640), (64, 32, 257)],
}
VOCABS = {"cuda": (32000, 50257, 128256, 152064, 262144), "cpu": (257,)}
OBJECTIVE = tk.Objective.trapo(entropy_coef=0.001)


def main(arguments: list[str] | None = None) -> int:
    chosen = options(__doc__, arguments)
    rows, device = Rows(chosen.rows), chosen.device
    copy(rows, device)
    for shape in GEMMS[device]:
        try:
            gemms(rows, device, *shape)
        except Exception as error:  # a shape that does not fit
            rows.add(what="GEMM", shape=shape, failed=one_line(error))
    for vocab in VOCABS[device]:
        row_kernels(rows, device, vocab)
    return 0


def copy(rows: Rows, device: str) -> None:
    source = torch.empty(2**31 if device == "cuda" else 2**22, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), device, 0.1)
    rows.add(what="copy", bytes=source.numel(), tb_per_s=round(2 * source.numel() / seconds / 1e12, 3))


def gemms(rows: Rows, device: str, chunk: int, width: int, vocab: int) -> None:
    """Measures TFLOP/s of the three products as the stream calls them: rows of logits side by side, and begun at 128
    bytes."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(chunk, width, device=device).to(dtype)
    weight = (torch.randn(vocab, width, device=device) / width**0.5).to(dtype)
    d_weight = torch.zeros(vocab, width, device=device)
    flop = 2.0 * chunk * width * vocab
    for stride in dict.fromkeys((vocab, -(-vocab // 64) * 64)):
        logits = torch.empty(chunk, stride, device=device, dtype=dtype)[:, :vocab].normal_()
        d_hidden = torch.empty_like(hidden)
        runs = {
            "logits": lambda z=logits: torch.mm(hidden, weight.t(), out=z),
            "d_hidden": lambda z=logits, d=d_hidden: torch.mm(z, weight, out=d),
            "d_weight, first": lambda z=logits: _add(d_weight, z, hidden, 0.0),
            "d_weight, added": lambda z=logits: _add(d_weight, z, hidden, 1.0),
            "d_weight in the operands' dtype": lambda z=logits: torch.mm(z.t(), hidden),
        }
        for name, run in runs.items():
            seconds = seconds_of(run, device, 0.05)
            rows.add(
                what="GEMM", gemm=name, shape=(chunk, width, vocab), stride=stride, ms=round(seconds * 1e3, 4),
                tflops=round(flop / seconds / 1e12, 3),
            )  # fmt: skip
        del logits
    scale = torch.ones((), device=device)
    low = torch.empty(vocab, width, device=device, dtype=torch.bfloat16)
    finishes: dict[str, Any] = {
        "mul, then to": lambda: d_weight.mul_(scale).to(torch.bfloat16),
        "mul into bf16": lambda: torch.mul(d_weight, scale, out=low),
    }
    for name, run in finishes.items():
        ms = round(1e3 * seconds_of(run, device, 0.03), 4)
        rows.add(what="finish of d_weight", how=name, shape=(width, vocab), ms=ms)


def _add(d_weight: Tensor, logits: Tensor, hidden: Tensor, beta: float) -> Tensor:
    if logits.dtype == torch.float32:
        return d_weight.addmm_(logits.t(), hidden, beta=beta)
    return torch.addmm(d_weight, logits.t(), hidden, out_dtype=torch.float32, beta=beta, out=d_weight)


def row_kernels(rows: Rows, device: str, vocab: int) -> None:
    """Times each verb of each backend on a chunk of logits that lies in memory."""
    n = 16 if device == "cpu" else 4096 if vocab < 200_000 else 2048
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for name, backend in tk.backends().items():
        if backend.kernel is None or backend.device not in (None, device) or not backend.available:
            continue
        logits = torch.randn(n, -(-vocab // 64) * 64, device=device).to(dtype)[:, :vocab]
        try:
            for verb, run, passes in _verbs(backend.kernel, logits):
                seconds = seconds_of(run, device, 0.05)
                rate = round(passes * n * vocab * dtype.itemsize / seconds / 1e9, 2)
                rows.add(
                    what="row kernel", backend=name, verb=verb, rows=n, vocab=vocab, ms=round(1e3 * seconds, 4),
                    gb_per_s=rate,
                )  # fmt: skip
        except Exception as error:
            rows.add(what="row kernel", backend=name, rows=n, vocab=vocab, failed=one_line(error))
        del logits


def _verbs(kernel: Any, logits: Tensor) -> list[tuple[str, Any, int]]:
    """Yields (verb, call, bytes moved at least, in units of the logits' own)"""
    n, vocab = logits.shape
    device = logits.device
    targets, ones = torch.randint(0, vocab, (n,), device=device), torch.ones(n, device=device)
    stats = kernel.stats(logits, targets, None, True).finish()
    verbs: list[tuple[str, Any, int]] = [
        ("stats", lambda: kernel.stats(logits, targets, None, True), 1),
        ("grad_", lambda: kernel.grad_(logits, targets, stats, ones, ones, None), 2),
    ]
    if kernel.fused_ is not None:
        terms = OBJECTIVE.fused()
        expert = torch.rand(n, device=device) < 0.3
        inputs = RowInputs(expert, torch.randn(n, device=device), *[None] * (len(RowInputs._fields) - 2))
        verbs.append(("fused_", lambda: kernel.fused_(logits, targets, inputs, terms, 1.0, None), 2))
    return verbs


if __name__ == "__main__":
    sys.exit(main())
