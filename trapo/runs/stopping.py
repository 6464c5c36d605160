"""A run that gets SIGTERM, which schedulers send before they kill, SIGINT (Ctrl-C) or SIGHUP (a closed terminal), saves
and ends well.

A step changes nothing before its update, so rollouts in flight are thrown away at once; an update, a save or a line of
the log is finished first. All randomness is derived from (seed, step): a step thrown away comes out the same later.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from trapo.runs.ranks import ALONE, Ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_SHOW_CURSOR = "\x1b[?25h"


class Stopped(BaseException):
    """Says that the run was asked to stop. Not an Exception, so that no library takes it for an error of its own."""

    def __init__(self, *args: object, number: int = signal.SIGTERM) -> None:
        super().__init__(*args)
        self.number = number


class StopSignal:
    """Turns a signal into `Stopped`, raised inside the next (or the present) `abandonable`, as a context manager.

    A second Ctrl-C is not caught: it kills at once. A signal that is ignored when the run starts (nohup) stays so.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self.requested = False
        self.number: int = signal.SIGTERM
        self._abandonable = False
        self._previous: dict[int, Any] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is not threading.main_thread():  # elsewhere Python allows no handlers
            return self
        self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    @property
    def name(self) -> str:
        """Returns the signal's name, once it came."""
        return signal.Signals(self.number).name

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """Marks work that may be cut short anywhere. With several ranks it is not: they would wait for each other for
        ever; they agree here, before the work, that one of them was asked to stop."""
        asked = max(self.ranks.gather([self.number if self.requested else 0]))
        if asked:
            self.number = asked
            raise Stopped(number=asked)
        self._abandonable = self.ranks.world == 1
        try:
            yield
        finally:
            self._abandonable = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.number = number
        self.requested = True
        if number == signal.SIGINT and self.ranks.world == 1:  # torchrun may send a rank the same one twice
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if number == signal.SIGHUP:
            self._leave_terminal()
        elif number == signal.SIGINT:
            self._tell()
        if self._abandonable:
            self._abandonable = False  # a second signal must not disturb the save
            raise Stopped(number=number)

    def _tell(self) -> None:
        if 2 in self._terminals:
            cursor = _SHOW_CURSOR if sys.stdout.isatty() else ""
            with contextlib.suppress(OSError):
                os.write(2, f"{cursor}\ntrapo: stopping and saving; Ctrl-C again ends it at once\n".encode())

    def _leave_terminal(self) -> None:
        """Leaves the terminal, since what is still printed must not fail for want of the terminal."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)
