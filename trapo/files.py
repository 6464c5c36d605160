"""Writing files so that a reader never sees half of one, whatever kills the writer or fills the disk."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomic(path: Path, text: str) -> None:
    """Write a text file through a temporary neighbour, fsync and rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON; NaN and infinities are refused, since most readers refuse them too."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def append_line(path: Path, line: str) -> None:
    """Append a line and fsync. A failure leaves the file as it was: half a line would spoil the next one too."""
    with open(path, "ab") as file:
        size = file.seek(0, os.SEEK_END)
        try:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), size)
            # What is still buffered would be written by close(), and fail again.
            with contextlib.suppress(OSError):
                file.close()
            os.truncate(path, size)
            raise


def write_folder_atomic(path: Path, fill: Callable[[Path], None]) -> None:
    """`fill` a temporary folder, fsync all that is in it, then give it its name (replacing an older one).

    A failure removes what was written (its space may be what the disk lacks) and leaves the older one.
    """
    temporary, replaced = path.with_name(f".tmp-{path.name}"), path.with_name(f".tmp-old-{path.name}")
    for leftover in (temporary, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        sync_tree(temporary)
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        raise
    sync_folder(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Make all files in a folder, and the folder's own entries, durable."""
    for path in folder.rglob("*"):
        sync_folder(path) if path.is_dir() else _sync_file(path)
    sync_folder(folder)


def sync_folder(path: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_file(path: Path) -> None:
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())
