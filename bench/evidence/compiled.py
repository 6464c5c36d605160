"""Compiles caught launches for GPUs that are not here, and reads what came out.

Registers, stack and shared memory are what cuobjdump says of the cubin; spills are the local loads and stores in its
SASS; the tensor-core instruction and the widths of global accesses are read from the PTX. A TMA copy has no width and
is counted as such.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from .launches import Launch

__all__ = ["ARCHS", "compile_for"]

ARCHS = (80, 90, 100, 120)

_TENSOR_CORE = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")


def compile_for(launch: Launch, arch: int, provider: str, config: str) -> dict[str, Any]:
    """Returns a row of the table of evidence. `error` where the compiler refuses (too much shared memory, for one)."""
    import triton
    from triton.backends.compiler import GPUTarget

    row: dict[str, Any] = {
        "provider": provider,
        "kernel": launch.name,
        "arch": f"sm_{arch}",
        "config": config,
        "warps": launch.warps,
        "stages": launch.stages,
    }
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    try:
        built = triton.compile(launch.source(), target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:
        return {**row, "error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}
    return {
        **row,
        **_resources(built.asm["cubin"]),
        "shared": built.metadata.shared,
        **_instructions(built.asm["ptx"]),
    }


def _tool(name: str) -> str:
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__file__).parent / "bin" / name)


def _resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(_tool("cuobjdump"), "--dump-resource-usage", file.name)
        sass = _output(_tool("nvdisasm"), "-c", file.name)
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    return {
        "registers": found["REG"],
        "stack": found["STACK"],
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
    }


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _instructions(ptx: str) -> dict[str, Any]:
    """Returns the tensor-core instruction, and how many global accesses of which width (bits) the code has."""
    loads, stores = Counter[int](), Counter[int]()
    for kind, vector, bits in re.findall(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bsuf](\d+)", ptx):
        (loads if kind == "ld" else stores)[int(bits) * int(vector or 1)] += 1
    for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^\n]*?, (?:0x)?(\w+)[,;]", ptx):
        loads[8 * int(size, 16 if f"0x{size}" in ptx else 10)] += 1
    return {
        "tensor_core": next((name for name in _TENSOR_CORE if name in ptx), None),
        "load_bits": {str(width): loads[width] for width in sorted(loads)},
        "store_bits": {str(width): stores[width] for width in sorted(stores)},
        "tma": len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        "atomics": len(re.findall(r"\b(?:atom|red)\.\S*global", ptx)),
    }
