"""This file gives freed memory back to the machine, which other processes may wait for."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Returns freed memory to the operating system. glibc keeps blocks of up to 32 MiB for itself once it has seen
    some freed; other C libraries have no such call, and nothing is done."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim(0)
