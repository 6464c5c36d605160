"""Files are written here so that a reader never sees half of one, whatever kills the writer or fills the disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trapo.errors import TrapoError


def temporary(path: Path) -> Path:
    """Returns a neighbour to write first; of a long name it has the digest, so that its own is not too long."""
    name = path.name if len(os.fsencode(path.name)) <= 200 else hashlib.sha256(os.fsencode(path.name)).hexdigest()
    return path.with_name(f".tmp-{name}")


def write_atomic(path: Path, text: str) -> None:
    """Write a text file through a temporary neighbour, fsync and rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = temporary(path)
    remove(half)
    try:
        # Neither a file nor a link that somebody else has put there meanwhile is written to.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(half, flags, 0o666), "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        half.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            half.unlink(missing_ok=True)
        name_file(error, path)
        raise
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Delete a file, a link (not what it points to) or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raises OSError when no file can be made in the folder, which need not be there yet. Leaves nothing behind."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".tmp-probe-{os.getpid()}"
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        probe.unlink()
    finally:
        for made in missing:
            with contextlib.suppress(OSError):
                made.rmdir()


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds. Raises TrapoError in one line for one that is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise TrapoError(f"{path}: damaged: not JSON") from error


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON as `write_atomic` does; NaN and infinities are refused, since most readers refuse them
    too."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def append_line(path: Path, line: str) -> None:
    """Append a line and fsync. A failure leaves the file as it was: half a line would spoil the next one too."""
    with open(path, "ab") as file:
        size = file.seek(0, os.SEEK_END)
        try:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            name_file(error, path)
            os.ftruncate(file.fileno(), size)
            # What is still buffered would be written by close(), and fail again.
            with contextlib.suppress(OSError):
                file.close()
            os.truncate(path, size)
            raise


def name_file(error: BaseException, path: Path) -> None:
    """Gives a write's error the file that it is of, which an open file's has not."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(path)


def write_folder_atomic(path: Path, fill: Callable[[Path], None]) -> None:
    """Lets `fill` fill a temporary folder, fsync all that is in it, then give it its name (replacing an older one).

    A failure removes what was written (its space may be what the disk lacks) and leaves the older one.
    """
    half, replaced = temporary(path), temporary(path.with_name(f"old-{path.name}"))
    for leftover in (half, replaced):
        remove(leftover)
    half.mkdir(parents=True)
    try:
        fill(half)
        sync_tree(half)
        if path.exists():
            path.rename(replaced)
        half.rename(path)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
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
