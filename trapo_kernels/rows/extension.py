"""Loading a compiled library of operators, or saying why it is not to be had."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

__all__ = ["load", "misfit"]


@cache
def load(library: Path, register_fakes: Callable[[], None]) -> None:
    """Registers the operators of a library, once, and their fakes."""
    torch.ops.load_library(library)
    register_fakes()


def misfit(name: str, library: Path, register_fakes: Callable[[], None]) -> str | None:
    """Loads a library; why that fails, or None. It may be of another torch, or of another version of this package."""
    try:
        load(library, register_fakes)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        return f"the {name} extension does not fit torch {torch.__version__} and this version; reinstall ({reason})"
    return None
