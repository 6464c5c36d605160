"""Where the time of a chunk goes on a CPU: the parts of csrc/cpu/panels.h beside the bare GEMMs they contain.

python -m bench.profile_cpu [--rounds 5]        writes bench/results/cpu_profile.json and .md
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch

import trapo_kernels as tk
from bench.measure import RESULTS, Shape, interleaved, machine

# Chunks of the shapes of docs/results.md, whose logits wait in a buffer.
CHUNKS = [Shape(576, 576, 49152), Shape(736, 576, 49152), Shape(896, 896, 151936), Shape(512, 3584, 65536)]


def parts(shape: Shape) -> dict[str, Callable[[], Any]]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape.tokens, shape.width, generator=g)
    weight = torch.randn(shape.vocab, shape.width, generator=g) / shape.width**0.5
    targets = torch.randint(0, shape.vocab, (shape.tokens,), generator=g)
    keep = torch.empty(-(-shape.vocab // 256), -(-shape.tokens // 64), 256, 64)
    logits = torch.empty(shape.tokens, shape.vocab)
    d_hidden, d_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
    ops = torch.ops.trapo_kernels_cpu

    def stats(kept: torch.Tensor | None, entropy: bool = True) -> Any:
        return ops.panel_stats(hidden, weight, None, targets, 1.0, None, entropy, 0, 2048, None, kept)

    top, rest, dot, target, references = stats(keep)
    log_sum = rest.log1p()
    found = (target - top - log_sum, top, log_sum, log_sum - dot / (1 + rest))
    slope, entropy_slope = torch.randn(shape.tokens, generator=g), torch.full((shape.tokens,), -0.001)

    def grad(d_hidden: torch.Tensor | None, d_weight: torch.Tensor | None) -> None:
        ops.panel_grad_(
            hidden, weight, None, targets, 1.0, None, *found, slope, entropy_slope, 0, 2048, 4, False, keep, references,
            d_hidden, d_weight, None, True, False,
        )  # fmt: skip

    return {
        "GEMM 1 alone": lambda: torch.mm(hidden, weight.t(), out=logits),
        "GEMM 2 alone": lambda: torch.mm(logits, weight, out=d_hidden),
        "GEMM 3 alone": lambda: d_weight.addmm_(logits.t(), hidden),
        "GEMM 1 + softmax, nothing kept": lambda: stats(None),
        "GEMM 1 + softmax, logits kept": lambda: stats(keep),
        "logit gradient alone": lambda: grad(None, None),
        "logit gradient + GEMM 2": lambda: grad(d_hidden, None),
        "logit gradient + GEMM 3": lambda: grad(None, d_weight),
        "logit gradient + GEMMs 2 and 3": lambda: grad(d_hidden, d_weight),
    }


def _timed(run: Callable[[], Any]) -> Callable[[], float]:
    def seconds() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return seconds


def markdown(results: dict[str, Any]) -> str:
    m = results["machine"]
    names = list(next(iter(results["seconds"].values())))
    lines = [
        "# Profile of a chunk on a CPU", "",
        f"Written by `python -m bench.profile_cpu`. {m['cpu']}, {m['capability']}, {m['threads']} threads, torch "
        f"{m['versions']['torch']}, {m['date']}; milliseconds, best of {results['rounds']} in turns (GFLOP/s).", "",
        "| | " + " | ".join(results["seconds"]) + " |", "| --- |" + " --- |" * len(results["seconds"]),
    ]  # fmt: skip
    for name in names:
        cells = []
        for shape, seconds in results["seconds"].items():
            n, d, v = (int(part.split("=")[1]) for part in shape.split())
            gemms = 2 if "GEMMs" in name else name.count("GEMM")
            rate = f" ({2 * n * d * v * gemms / seconds[name] / 1e9:.0f})" if gemms else ""
            cells.append(f"{1e3 * seconds[name]:.0f}{rate}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    assert tk.backends()["cpu"].available, tk.backends()["cpu"]
    seconds = {
        str(shape): interleaved({name: _timed(run) for name, run in parts(shape).items()}, rounds) for shape in CHUNKS
    }
    results = {"machine": machine(), "rounds": rounds, "seconds": seconds}
    (RESULTS / "cpu_profile.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "cpu_profile.md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
