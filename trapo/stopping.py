"""SIGTERM: what schedulers and preempted machines send before they kill. The run saves and ends well.

A step changes nothing before its update, so rollouts in flight are thrown away at once; an update, a save or a line of
the log is finished first. All randomness is derived from (seed, step): a step thrown away comes out the same later.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from trapo.ranks import ALONE, Ranks


class Stopped(BaseException):
    """The run was asked to stop. Not an Exception, so that no library takes it for an error of its own."""


class StopSignal:
    """Context manager that turns SIGTERM into `Stopped`, raised inside the next (or the present) `abandonable`."""

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self.requested = False
        self._abandonable = False
        self._previous: Any = None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """Work that may be cut short anywhere. With several ranks it is not: they would wait for each other for ever;
        they agree here, before the work, that one of them was asked to stop."""
        if self.ranks.any(self.requested):
            raise Stopped
        self._abandonable = self.ranks.world == 1
        try:
            yield
        finally:
            self._abandonable = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self._abandonable:
            self._abandonable = False  # a second signal must not disturb the save
            raise Stopped
