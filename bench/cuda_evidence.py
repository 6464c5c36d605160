"""Evidence about csrc/cuda from a machine without a GPU, by nvcc: rows of the table of `make gpu-evidence`.

    python -m bench.cuda_evidence [--out bench/results/cuda_evidence.json]

Compiles the kernels for the GPUs of ARCHS. Registers, stack and spilled bytes are what ptxas reports, the widths of
global accesses are read from the PTX, threads, clusters and shared memory come from the table that the launches use
(plan.h), and occupancy is arithmetic over a card's published limits. Nothing here was run on a GPU. Exits with 1 if a
kernel spills or has no 128-bit access where it touches logits.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["PROVIDER", "broken", "main", "rows", "status_of"]

PROVIDER = "trapo_kernels cuda"
ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "csrc" / "cuda" / "row_kernels.cu"
RESULTS = Path(__file__).parent / "results" / "cuda_evidence.json"
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr"]


@dataclass(frozen=True)
class Arch:
    """What an SM has, by the CUDA programming guide's table of compute capabilities."""

    name: str
    code: str  # for nvcc
    number: int
    shared_per_sm: int  # bytes
    threads_per_sm: int = 2048
    registers_per_sm: int = 65536
    blocks_per_sm: int = 32


ARCHS = (
    Arch("sm_80", "80", 80, 164 * 1024),
    Arch("sm_90", "90a", 90, 228 * 1024),
    Arch("sm_100", "100a", 100, 228 * 1024),
)
DTYPES = {"bfloat16": "__nv_bfloat16", "float16": "__half", "float32": "float", "float64": "double"}
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
CONFIGS = (
    (4096, "bfloat16"), (50257, "bfloat16"), (152064, "bfloat16"), (152064, "float16"), (152064, "float32"),
    (152064, "float64"), (262144, "bfloat16"), (262144, "float32"),
)  # fmt: skip

# Prints what plan.h says of a row, from the header that the launches include.
_PLAN_PROGRAM = """
#include <cstdio>
#include "device.h"
#include "row_kernels.h"
using namespace trapo::cuda;
template <class T> void show(long vocab, int arch, int shared, int id) {
  constexpr int scratch = kScratch<Acc<T>>;
  const Plan plans[] = {streamed_plan(vocab, sizeof(T), scratch, max_threads(sizeof(T))),
                        streamed_plan(vocab, sizeof(T), 0, max_threads(sizeof(T))),
                        fused_plan(vocab, sizeof(T), scratch, {arch, shared})};
  for (const Plan& p : plans)
    std::printf("%d %d %d %d %d %d\\n", id, p.threads, p.cluster, p.stages, p.slots, p.shared);
}
int main() {
"""


def rows() -> list[dict[str, Any]]:
    """Returns a row for every verb, configuration and GPU."""
    with tempfile.TemporaryDirectory() as folder:
        plans = _plans(Path(folder))
        built = {arch: _compiled(arch, Path(folder)) for arch in ARCHS}
    out = []
    for (vocab, dtype), arch in ((config, arch) for config in CONFIGS for arch in ARCHS):
        for verb, plan in zip(("stats", "grad_", "fused_"), plans[vocab, dtype, arch], strict=True):
            out.append(_row(verb, vocab, dtype, arch, plan, built[arch]))
    return out


def _row(verb: str, vocab: int, dtype: str, arch: Arch, plan: dict[str, int], built: dict[Any, Any]) -> dict[str, Any]:
    on_chip = verb == "fused_" and plan["slots"] > 0
    function = {"stats": "stats_kernel", "grad_": "grad_kernel"}.get(
        verb, "fused_on_chip" if on_chip else "fused_streamed"
    )
    kernel = built[function, DTYPES[dtype]]
    blocks = _blocks_per_sm(arch, plan["threads"], kernel["registers"], plan["shared"])
    return {
        "provider": PROVIDER,
        "kernel": function,
        "arch": arch.name,
        "config": f"V={vocab} {dtype}",
        "warps": plan["threads"] // 32,
        "stages": plan["stages"],
        **kernel,
        "shared": plan["shared"],
        "tensor_core": None,
        "tma": 0,
        "cluster": plan["cluster"],
        "on_chip": on_chip,
        "blocks_per_sm": blocks,
        "occupancy": round(blocks * plan["threads"] / arch.threads_per_sm, 3),
    }


def _blocks_per_sm(arch: Arch, threads: int, registers: int, shared: int) -> int:
    """Registers are given to warps in units of 256, shared memory to blocks with 1 KiB on top in units of 128 bytes."""
    by_registers = arch.registers_per_sm // (-(-registers * 32 // 256) * 256 * (threads // 32))
    by_shared = arch.shared_per_sm // (-(-shared // 128) * 128 + 1024)
    return min(arch.blocks_per_sm, arch.threads_per_sm // threads, by_registers, by_shared)


def _plans(folder: Path) -> dict[Any, list[dict[str, int]]]:
    keys = [(vocab, dtype, arch) for vocab, dtype in CONFIGS for arch in ARCHS]
    lines = [
        f"  show<{DTYPES[dtype]}>({vocab}, {arch.number}, {arch.shared_per_sm}, {i});"
        for i, (vocab, dtype, arch) in enumerate(keys)
    ]
    source, program = folder / "plan.cu", folder / "plan"
    source.write_text(_PLAN_PROGRAM + "\n".join(lines) + "\n}\n")
    _output("nvcc", *FLAGS, "-arch=sm_80", f"-I{SOURCE.parent}", str(source), "-o", str(program))
    out: dict[Any, list[dict[str, int]]] = {key: [] for key in keys}
    for line in _output(str(program)).splitlines():
        i, *values = map(int, line.split())
        out[keys[i]].append(dict(zip(("threads", "cluster", "stages", "slots", "shared"), values, strict=True)))
    return out


def _compiled(arch: Arch, folder: Path) -> dict[Any, dict[str, Any]]:
    """Returns (kernel, dtype) -> what the compiler says of the kernel without a soft-cap."""
    target = f"-gencode=arch=compute_{arch.code},code=sm_{arch.code}"
    ptx = folder / f"{arch.name}.ptx"
    report = _output("nvcc", *FLAGS, target, "-Xptxas=-v", "-cubin", str(SOURCE), "-o", str(folder / "cubin"))
    _output("nvcc", *FLAGS, f"-arch=compute_{arch.code}", "-ptx", str(SOURCE), "-o", str(ptx))
    accesses = {}
    for body in ptx.read_text().split(".entry ")[1:]:
        accesses[re.match(r"\w+", body).group()] = _accesses(body)  # type: ignore[union-attr]
    out = {}
    for block in report.split("Compiling entry function '")[1:]:
        mangled = block.split("'")[0]
        found = _identity(mangled)
        if found:
            numbers = re.search(r"(\d+) bytes stack.* (\d+) bytes spill s.* (\d+) bytes", block)
            stack, stores, loads = map(int, numbers.groups())  # type: ignore[union-attr]
            registers = int(re.search(r"Used (\d+) registers", block).group(1))  # type: ignore[union-attr]
            out[found] = {"registers": registers, "stack": stack, "spills": stores + loads, **accesses[mangled]}
    return out


def _identity(mangled: str) -> tuple[str, str] | None:
    """Returns (kernel, dtype) of an instantiation without a soft-cap."""
    found = re.search(
        r"(stats_kernel|grad_kernel|fused_on_chip|fused_streamed)I(13__nv_bfloat16|6__half|f|d)Lb0E", mangled
    )
    if found is None:
        return None
    names = {"13__nv_bfloat16": "__nv_bfloat16", "6__half": "__half", "f": "float", "d": "double"}
    return found.group(1), names[found.group(2)]


def _accesses(ptx: str) -> dict[str, Any]:
    """Returns how many global accesses of which width (bits) the code has, and atomics."""
    loads, stores = Counter[int](), Counter[int]()
    for kind, vector, bits in re.findall(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bsuf](\d+)", ptx):
        (loads if kind == "ld" else stores)[int(bits) * int(vector or 1)] += 1
    loads[128] += len(re.findall(r"cp\.async\.cg\.shared\.global \[[^\n]*?, 16", ptx))
    return {
        "load_bits": {str(width): loads[width] for width in sorted(loads) if loads[width]},
        "store_bits": {str(width): stores[width] for width in sorted(stores)},
        "atomics": len(re.findall(r"\b(?:atom|red)\.\S*global", ptx)),
    }


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {done.stderr[-2000:]}")
    return done.stdout + done.stderr


def broken(found: list[dict[str, Any]]) -> list[str]:
    """Returns what does not hold of the compiled kernels. fp64 is for tests of other parts, and may spill a few
    bytes."""
    faults = []
    for row in found:
        where = f"{row['kernel']} {row['arch']} {row['config']}"
        if row["spills"] and "float64" not in row["config"]:
            faults.append(f"{where}: {row['spills']} bytes spilled")
        if "128" not in row["load_bits"]:
            faults.append(f"{where}: no 128-bit load")
        if "128" not in row["store_bits"] and row["kernel"] != "stats_kernel":
            faults.append(f"{where}: no 128-bit store")
        if row["atomics"]:
            faults.append(f"{where}: {row['atomics']} atomics")
    return faults


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    found = rows()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    nvcc = _output("nvcc", "--version").splitlines()[-1]
    options.out.write_text(json.dumps({"nvcc": nvcc, "kernels": found}, indent=1) + "\n")
    return status_of(broken(found), found, options.out)


def status_of(faults: list[str], kernels: list[dict[str, Any]], out: Path) -> int:
    """Returns the exit status of a command that left `kernels` in `out`, after it has shown the invariants that are
    broken."""
    print(f"{len(kernels)} compiled kernels, {len(faults)} broken invariants -> {out}")
    for fault in faults:
        print("  " + fault)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
