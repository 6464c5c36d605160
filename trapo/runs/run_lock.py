"""One process at a time works in a run's folder: a lock that ends with the process, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from trapo.errors import TrapoError

NAME = ".lock"
_held: set[int] = set()


class RunLock:
    """Holds flock on `folder/.lock`, as a context manager. Raises TrapoError when another process has it; where the
    file system has no locks it says so and goes on."""

    def __init__(self, folder: Path, log: Callable[[str], None]) -> None:
        self.path, self.log = folder / NAME, log
        self.descriptor: int | None = None

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.descriptor)
            raise in_use(self.path.parent) from None
        except OSError as error:  # some network file systems
            self.log(f"run_dir: {self.path.parent} cannot be locked ({error.strerror}): keep other runs out of it")
        _held.add(self.descriptor)
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self.descriptor is not None:
            _held.discard(self.descriptor)
            with contextlib.suppress(OSError):
                os.ftruncate(self.descriptor, 0)  # nobody's any more
            os.close(self.descriptor)
            self.descriptor = None


def refuse_busy(folder: Path) -> None:
    """Raises TrapoError when a process holds the lock. Changes nothing."""
    try:
        descriptor = os.open(folder / NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return  # there is none, or it cannot be read: `RunLock` will say
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise in_use(folder) from None
    except OSError:
        pass
    finally:
        os.close(descriptor)


def in_use(folder: Path) -> TrapoError:
    """Returns the error for a folder that another process holds."""
    try:
        holder = (folder / NAME).read_text().strip()[:100] or "another process"
    except OSError:
        holder = "another process"
    return TrapoError(f"run_dir: {folder} is in use by {holder}; wait for it, or choose another run_dir")


def _forget() -> None:
    """Lets go of the lock in a child process that was forked, which must not keep the lock after its parent's end."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
