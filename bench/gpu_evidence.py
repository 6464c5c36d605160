"""Evidence about the GPU kernels from a machine without a GPU: `make gpu-evidence`.

    python -m bench.gpu_evidence [--ours] [--out bench/results/gpu_evidence.json]

Writes the JSON and, beside it, the same as Markdown tables:
- kernels: compiled for sm_80, sm_90, sm_100 and sm_120, ours (Triton's, and CUDA's where nvcc is) and, unless --ours,
  those of the peers that are installed
- traffic: bytes that the kernels ask for, counted in Triton's interpreter at a small shape
- memory: peak by accounting on fake tensors, at the shapes of the roofline
- roofline: least time by a card's published rates; bounds, nothing that a clock saw
- estimate: the same phases on an H200 at rates that are assumed; nothing that a clock saw either

Ours alone takes about three minutes on two cores. Exits with 1 if an invariant is broken (see `broken`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from bench import cuda_evidence
from bench.evidence import estimate, ours, peers, roofline
from bench.evidence.compiled import ARCHS, compile_for

__all__ = ["broken", "main"]

RESULTS = Path(__file__).parent / "results" / "gpu_evidence.json"


def kernel_rows(providers: list[str]) -> list[dict[str, Any]]:
    """Compiles every kernel for every GPU."""
    rows = []
    for config, launch in [*ours.row_launches(), *ours.target_launches()]:
        rows += [compile_for(launch, arch, ours.PROVIDER, config) for arch in ARCHS]
    for arch in ARCHS:
        rows += [compile_for(launch, arch, ours.PROVIDER, config) for config, launch in ours.tile_launches(arch)]
    for provider in providers:
        for config, launch in peers.launches(provider):
            rows += [compile_for(launch, arch, provider, config) for arch in ARCHS]
    if shutil.which("nvcc"):
        rows += cuda_evidence.rows()
    else:
        print("without the CUDA kernels: nvcc is not here")
    return rows


def counted_rows(providers: list[str]) -> dict[str, Any]:
    """Returns what needs the interpreter, counted in a process that has it."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.evidence.counts", json.dumps(providers)],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def roofline_rows() -> list[dict[str, Any]]:
    return [
        {"approach": approach, "card": card.name, "shape": dict(zip("NDV", shape, strict=True)),
         **roofline.bound(approach, shape, card)}
        for shape in roofline.SHAPES
        for card in roofline.CARDS
        for approach in roofline.APPROACHES
    ]  # fmt: skip


def arithmetic() -> dict[str, Any]:
    """Returns what needs no compiler and no run."""
    return {
        "roofline": roofline_rows(),
        "rows_for_15_percent": {card.name: roofline.rows_for_share(card) for card in roofline.CARDS},
        "estimate": estimate.table(),
        "estimate_beside_measured": estimate.checked(),
    }


def broken(evidence: dict[str, Any]) -> list[str]:
    """Returns the invariants of our own kernels that do not hold."""
    faults = cuda_evidence.broken([row for row in evidence["kernels"] if row["provider"] == cuda_evidence.PROVIDER])
    for row in evidence["kernels"]:
        if row["provider"] != ours.PROVIDER:
            continue
        where = f"{row['kernel']} {row['arch']} {row['config']}"
        if "error" in row:
            faults.append(f"{where}: {row['error']}")
            continue
        if row["spills"] or row["stack"]:
            faults.append(f"{where}: {row['spills']} spills, {row['stack']} bytes of stack")
        if row["atomics"]:
            faults.append(f"{where}: {row['atomics']} atomics")
        if row["kernel"].startswith("row_") and "128" not in row["load_bits"]:
            faults.append(f"{where}: no 128-bit load")
        if row["kernel"] == "linear_stats" and row["tensor_core"] is None:
            faults.append(f"{where}: no tensor-core instruction")
    for row in evidence["traffic"]:
        if row["provider"] != ours.PROVIDER:
            continue
        n, v = row["shape"]["N"], row["shape"]["V"]
        where, little = f"{row['kernel']} ({row['path']})", 96 / v  # per row: a dozen numbers, and 64 spare columns
        limits = {"row_stats": (1, 0), "row_grad": (1, 1), "row_fused": (2, 1), "merge_stats": (1, 0.25)}
        if row["kernel"] in limits:
            reads, writes = limits[row["kernel"]]
            if row["read"] > reads + little or row["written"] > writes + little:
                faults.append(f"{where}: {row['read']} reads, {row['written']} writes per logit")
        if row["kernel"] == "linear_stats" and row["written"] * v > 16 * 8:
            faults.append(f"{where}: writes {row['written'] * n * v * 4:.0f} bytes, more than states of rows")
        if row["atomic"]:
            faults.append(f"{where}: atomics")
    return faults


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", action="store_true", help="leave the peers out")
    parser.add_argument("--arithmetic", action="store_true", help="roofline and estimates alone; the rest stays")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.arithmetic:
        return write({**json.loads(options.out.read_text()), **arithmetic()}, options.out)
    warnings.filterwarnings("ignore")
    import torch
    import triton

    versions = {name: peers.installed(name) for name in peers.PEERS}
    providers = [] if options.ours else [name for name, version in versions.items() if version]
    evidence = {
        "versions": {"torch": torch.__version__, "triton": triton.__version__, **{p: versions[p] for p in providers}},
        "kernels": kernel_rows(providers),
        **counted_rows(providers),
        **arithmetic(),
    }
    return write(evidence, options.out)


def write(evidence: dict[str, Any], out: Path) -> int:
    """Writes the JSON and the page; returns 1 if an invariant is broken."""
    from bench.evidence.tables import markdown

    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(evidence, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(evidence))
    return cuda_evidence.status_of(broken(evidence), evidence["kernels"], out)


if __name__ == "__main__":
    raise SystemExit(main())
