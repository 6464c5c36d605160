"""This file says what this machine has of what the package can use, for people: `python -m trapo_kernels`, `trapo
doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys

import torch

from . import __version__
from .backends.dispatch import ENV, backends
from .backends.native import REINSTALL

__all__ = ["describe"]

# Packages that an adapter or the trainer works with, by their names on PyPI.
_OTHERS = ("triton", "transformers", "trl", "liger-kernel", "verl", "vllm", "peft", "math-verify")


def describe() -> str:
    """Says which versions, devices, compilers and backends there are, and what would make calls faster."""
    parts = {
        "environment": _environment(),
        "backends": [str(backend) for backend in backends().values()],
        "compilers, for an install from source": _compilers(),
        "what to do": _advice() or ["nothing: the fastest backend for each device here is in use"],
    }
    return "\n\n".join("\n".join([name, *(f"  {line}" for line in lines)]) for name, lines in parts.items())


def _environment() -> list[str]:
    here = f"{platform.system()} {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    lines = [
        f"trapo-kernels {__version__} in {os.path.dirname(__file__)}",
        f"Python {platform.python_version()} ({sys.executable})",
        f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        f"CPU: {here}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch",
    ]
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        lines.append(f"GPU {i}: {found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB")
    others = [f"{name} {version}" for name in _OTHERS if (version := _version(name))]
    lines.append(f"beside it: {', '.join(others) or 'none of ' + ', '.join(_OTHERS)}")
    lines += [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("TRAPO_KERNELS_")]
    return lines


def _compilers() -> list[str]:
    return [f"C++: {_compiler() or 'none found (CXX, c++, g++, clang++)'}", f"CUDA: {_nvcc() or 'no nvcc'}"]


def _compiler() -> str | None:
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")


def _advice() -> list[str]:
    """Returns what stands between this machine and its fastest backends, a line each."""
    lines = []
    found = backends()
    if (reason := found["cpu"].missing) is not None:
        first = "" if _compiler() else "install a C++17 compiler, then "
        lines.append(
            f"losses on CPUs go by plain torch, which takes 1.1 to 1.3 times as long ({reason}): {first}install again "
            f"where torch is installed: `{REINSTALL}`"
        )
    if name := os.environ.get(ENV):
        lines.append(f"{ENV}={name} names the backend of every call: without it the fastest one is picked")
    if torch.cuda.is_available():
        for name in ("cuda", "triton"):
            if (reason := found[name].missing) is not None:
                lines.append(f"backend {name} is not here: {reason}")
            elif (reason := found[name].left_out) is not None:
                lines.append(f"backend {name} is not picked: {reason}; `python -m trapo_kernels.verify` tries it again")
    elif torch.version.cuda is not None:
        lines.append("torch is built for CUDA and sees no GPU: `nvidia-smi` says whether the driver does")
    return lines


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
