"""Compiles csrc/cuda for the CPU (tests/simt/simt.h), with or without sanitizers; the results are kept in build/simt by
the content of what went into them."""

from __future__ import annotations

import fcntl
import hashlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CUDA = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "simt"
COMPILER = "g++"

CHECKERS = {
    "plain": [],
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-fsanitize=thread"],
}


def missing() -> str | None:
    """Why the harness cannot run here, or None."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"tests/simt switches fibers on x86-64 only; this is {platform.machine()}"
    return None if shutil.which(COMPILER) else f"{COMPILER} is not installed"


def flags(source: Path = CUDA) -> list[str]:
    """Of every compilation; `source`: the folder of row_kernels.cu and what it includes."""
    include = [f"-I{HERE / 'include'}", f"-I{source}"]
    return ["-std=c++17", "-g1", "-DTRAPO_SIMT", "-fPIC", "-fno-strict-aliasing", "-Wno-unknown-pragmas", *include]


def check(checker: str = "plain", source: Path = CUDA, options: Sequence[str] = ()) -> Path:
    """The program check.cpp with the kernels in `source`."""
    build = ["-O1", *CHECKERS[checker], *options]
    parts = [
        *(_object(part, [*flags(source), *build]) for part in sorted(source.glob("*.cu"))),
        _object(HERE / "check.cpp", [*flags(), *build]),
    ]
    return _linked(f"check-{checker}", parts, CHECKERS[checker])


def traffic() -> Path:
    """The program traffic.cpp: the kernels tell it of every access, through the hooks of ThreadSanitizer."""
    build = [*flags(), "-O2", "-DSIMT_TRAFFIC"]
    hooked = [*build, "-fsanitize=thread", "-fno-threadsafe-statics"]
    parts = [_object(CUDA / "row_kernels.cu", hooked), _object(HERE / "traffic.cpp", build)]
    return _linked("traffic", parts, [])


def library() -> Path:
    """The operators of csrc/cuda/operators.cpp for CPU tensors, on fibers."""
    import torch

    torch_home = Path(torch.__file__).parent
    torch_flags = [f"-isystem{torch_home / 'include'}", "-DTRAPO_DISPATCH_KEY=CPU", f"-DTORCH_IS='{torch.__version__}'"]
    parts = [
        *(_object(source, [*flags(), "-O2"]) for source in sorted(CUDA.glob("*.cu"))),
        _object(CUDA / "operators.cpp", [*flags(), "-O1", *torch_flags]),
    ]
    return _linked("_cuda_on_cpu.so", parts, ["-shared", f"-L{torch_home / 'lib'}", "-ltorch_cpu"])


def _object(source: Path, options: Sequence[str]) -> Path:
    kernels = CUDA if source.parent == HERE else source.parent
    known = [*kernels.glob("*.h"), *HERE.glob("*.h"), *HERE.glob("include/*.h"), kernels.parent / "row_math.h", source]
    content = hashlib.sha256(repr(options).encode())
    for path in sorted(known):
        content.update(path.read_bytes())
    out = BUILD / f"{source.stem}-{content.hexdigest()[:16]}.o"
    if not out.exists():
        _run([COMPILER, *options, "-x", "c++", "-c", str(source), "-o"], out)
    return out


def _linked(name: str, parts: Sequence[Path], options: Sequence[str]) -> Path:
    stem, _, suffix = name.partition(".")
    key = hashlib.sha256(repr([*map(str, parts), *options]).encode()).hexdigest()[:16]
    out = BUILD / f"{stem}-{key}{'.' + suffix if suffix else ''}"
    if not out.exists():
        _run([COMPILER, *map(str, parts), *options, "-o"], out)
    return out


def _run(command: list[str], out: Path) -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    # Two processes of a test run want the same part at once, and a compilation takes a dozen seconds: one waits.
    with open(BUILD / f".{out.name}.lock", "w") as lock, tempfile.TemporaryDirectory(dir=BUILD) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if out.exists():
            return
        unfinished = Path(folder) / out.name
        done = subprocess.run([*command, str(unfinished)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{COMPILER} failed:\n{done.stderr[-4000:]}")
        unfinished.rename(out)
