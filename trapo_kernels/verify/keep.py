"""Verdicts are kept on disk: where they are, for which machine they hold, and the lock under which they are made.

A verdict holds for a device, its driver, torch, Triton and this package down to the last byte of its code: the name of
its file is a digest of them, and the file repeats them. A file that cannot be read or does not fit is no verdict.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

try:
    import fcntl
except ImportError:  # Windows: everybody makes the verdict
    fcntl = None  # type: ignore[assignment]

__all__ = ["Verdict", "digest", "folder", "locked", "machine", "read", "write"]

# Who could not be tried may be tried again after so many seconds; those who waited for the lock need not.
RETRY_AFTER = 600.0


@dataclass(frozen=True)
class Verdict:
    """Says what became of a backend's cases. `right` None: they could not be run, which says nothing of the backend."""

    backend: str
    right: bool | None
    reason: str | None  # why not, in one line
    cases: int  # that it got right
    seconds: float

    def __str__(self) -> str:
        if self.right:
            return f"{self.backend}: right in {self.cases} cases ({self.seconds:.1f} s)"
        return f"{self.backend}: {'wrong' if self.right is False else 'could not be tried'}: {self.reason}"


@functools.cache
def machine(device: torch.device) -> dict[str, str]:
    """Returns what a verdict depends on."""
    found = {
        "device": _device_name(device),
        "driver": _driver() if device.type == "cuda" else "",
        "torch": f"{torch.__version__} CUDA {torch.version.cuda} HIP {torch.version.hip}",
        "triton": _version("triton"),
        "interpreted": os.environ.get("TRITON_INTERPRET", "0"),
        "trapo_kernels": _build(),
    }
    return found


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} ({major}.{minor})"
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0].strip()
    except (OSError, IndexError):
        ask = getattr(torch._C, "_cuda_getDriverVersion", None)
        return str(ask()) if ask else "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _build() -> str:
    """Returns a digest of this package's code: sources and compiled libraries."""
    root, hashed = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted([*root.rglob("*.py"), *root.glob("_c*.so")]):
        hashed.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return hashed.hexdigest()[:16]


def digest(device: torch.device) -> str:
    """Returns a name for `machine(device)`."""
    return hashlib.sha256(json.dumps(machine(device), sort_keys=True).encode()).hexdigest()[:16]


def folder() -> Path:
    """Returns XDG_CACHE_HOME/trapo_kernels, or ~/.cache/trapo_kernels.

    Raises:
        OSError: there is no home.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "trapo_kernels"
    try:
        return Path.home() / ".cache" / "trapo_kernels"
    except RuntimeError as error:
        raise OSError(str(error)) from None


def _file(device: torch.device) -> Path:
    return folder() / f"verify-{digest(device)}.json"


def read(device: torch.device) -> dict[str, Verdict]:
    """Returns the verdicts that hold now; none where no file can be read."""
    try:
        kept: Any = json.loads(_file(device).read_text())
        if kept["machine"] != machine(device):
            return {}
        fresh = 0 <= time.time() - kept["time"] < RETRY_AFTER
        found = {name: Verdict(**fields) for name, fields in kept["verdicts"].items()}
        sound = all(v.right in (True, False, None) and v.backend == name for name, v in found.items())
        return {name: v for name, v in found.items() if v.right is not None or fresh} if sound else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def write(device: torch.device, verdicts: dict[str, Verdict]) -> Path:
    """Keeps verdicts beside those that are there, whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    path = _file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {name: asdict(v) for name, v in {**read(device), **verdicts}.items()}
    text = json.dumps({"machine": machine(device), "time": time.time(), "verdicts": known}, indent=1)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text + "\n")
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    return path


@contextmanager
def locked(device: torch.device, patience: float) -> Iterator[bool]:
    """Holds the machine's lock, which others wait for; False where it cannot be had, or not within `patience` seconds.
    It ends with its process, whatever becomes of that."""
    file: IO[str] | None = None
    held = False
    try:
        file = _lock_file(device)
        until = time.monotonic() + patience
        while file is not None and not (held := _try_lock(file)) and time.monotonic() < until:
            time.sleep(0.05)
    except OSError:  # a folder that cannot be written, or a file system without locks
        held = False
    try:
        yield held
    finally:
        if file is not None:
            file.close()


def _lock_file(device: torch.device) -> IO[str] | None:
    if fcntl is None:
        return None
    path = _file(device).with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a")


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
