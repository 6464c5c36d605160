"""This file loads a compiled library of operators, or says why it is not to be had."""

from __future__ import annotations

import importlib.metadata
import json
import mmap
import re
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch

__all__ = ["REINSTALL", "built_for", "load", "misfit"]

_COMMAND = "pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation"


def _origin(root: Path) -> str:
    """Returns what this package can be installed from again, as a word for pip: the checkout that it is imported from
    (`root`), the folder, archive or repository that pip took it from and noted, else its name."""
    if (root / "setup.py").is_file() and (root / "csrc").is_dir():
        return f"-e {shlex.quote(str(root))}"
    try:
        noted = json.loads(importlib.metadata.distribution("trapo-kernels").read_text("direct_url.json") or "{}")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return "trapo-kernels"
    url, vcs = noted.get("url", ""), noted.get("vcs_info", {})
    if vcs:
        return shlex.quote(f"{vcs['vcs']}+{url}@{vcs['commit_id']}")
    path = url2pathname(urlsplit(url).path)
    here = url.startswith("file:") and not url.endswith(".whl") and Path(path).exists()
    return shlex.quote(path) if here else "trapo-kernels"


# What builds the extensions for the torch that is here. pip would take a wheel that it has built before from its cache.
REINSTALL = f"{_COMMAND} {_origin(Path(__file__).resolve().parents[2])}"

_MARK = rb"trapo_kernels_built_for:(\d+)\.(\d+);"  # csrc/built_for.h


@cache
def load(library: Path, register_fakes: Callable[[], None]) -> None:
    """Registers the operators of a library, once, and their fakes."""
    torch.ops.load_library(library)
    register_fakes()


def built_for(library: Path) -> tuple[int, int] | None:
    """Returns the torch (major, minor) that a library was compiled for, read from the file; None: it does not say."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = re.search(_MARK, content)
        return None if found is None else (int(found[1]), int(found[2]))


def misfit(name: str, library: Path, register_fakes: Callable[[], None], stable: bool = False) -> str | None:
    """Loads a library; returns why that fails, or None. It may be of another torch, or of another version of this
    package.

    A library that uses torch's stable ABI serves the torch that it was compiled for and newer ones; another, whose
    structs are those of one torch, serves that minor version alone, and is not even loaded under another.
    """
    here = torch.__version__
    try:
        built, now = built_for(library), _numbers(here)
        if built is not None and (now < built if stable else now != built):
            wanted = "{}.{}".format(*built) + (" and newer" if stable else "")
            again = f"`{REINSTALL}` compiles it again"
            return f"the {name} extension was compiled for torch {wanted}, this is torch {here}; {again}"
        if built is None:
            raise RuntimeError("it does not say for which torch it was compiled")
        load(library, register_fakes)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        return f"the {name} extension does not fit torch {here} and this version; `{REINSTALL}` ({reason})"
    return None


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
