"""This file runs inside a reward worker: one process, one item at a time, until it is told to end or its trainer dies.

A worker leads a session of its own and adopts what its descendants leave behind, so that the pool can end all of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import Any, Literal

from trapo.rewards.extract import FINAL_ANSWER
from trapo.rewards.functions import RewardFunction, resolve
from trapo.tools.imports import one_line

Status = Literal["ok", "timeout", "crash", "error"]
Bounds = tuple[float, float]

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass(frozen=True)
class Reward:
    """Is one item's outcome. `value` is 0.0 unless `status` is "ok"; `detail` is one line on what went wrong."""

    value: float
    status: Status
    detail: str = ""
    rule: str = field(default="", compare=False)  # of `math`: which of its rules decided


def serve(pipe: connection.Connection, fn: str, memory_gib: float | None, bounds: Bounds | None) -> None:
    """Lives a worker's life: prepare, say "ready" (or why not), then answer items with a Reward's fields."""
    _lead_own_session()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        function = resolve(fn)
        if fn == "math":
            function(FINAL_ANSWER.format(answer="x+1"), "1+x")  # pays the imports before the first item
        _limit_memory(memory_gib)
    except BaseException as error:
        pipe.send(("failed", one_line(error)))
        return
    pipe.send(("ready", ""))
    me = os.getpid()
    while True:
        try:
            text, answer, row = pipe.recv()
        except (EOFError, OSError):
            break
        outcome = score(function, text, answer, row, bounds)
        if os.getpid() != me:
            os._exit(0)  # a child that the function forked, and let return
        pipe.send((outcome.value, outcome.status, outcome.detail, outcome.rule))
    end_descendants(me)


def score(function: RewardFunction, text: str, answer: str, row: Any, bounds: Bounds | None) -> Reward:
    """Scores one item. Only plain data leaves the worker: an exception of the function may not unpickle in the
    trainer."""
    try:
        if function.graded is not None:
            value, rule = function.graded(text, answer)
        else:
            value, rule = function(text, answer, row), ""
    except ValueError as error:
        own = str(error).startswith(f"{function.name} must return")
        return Reward(0.0, "error", str(error) if own else one_line(error))
    except BaseException as error:  # SystemExit too: it must not end the worker
        return Reward(0.0, "error", one_line(error))
    if bounds is None:
        return Reward(value, "ok", rule=rule)
    low, high = bounds
    inside = within(value, low, high)
    if inside is None:
        return Reward(0.0, "error", f"{function.name} returned {value:g}, outside reward.range [{low:g}, {high:g}]")
    return Reward((inside - low) / (high - low), "ok", rule=rule)


def within(value: float, low: float, high: float) -> float | None:
    """Returns the value, or the bound that it passes by a rounding error of float32 sums; None for one outside."""
    slack = 1e-6 * (high - low)
    return min(max(value, low), high) if low - slack <= value <= high + slack else None


def _lead_own_session() -> None:
    """Makes a process group that is ended as one, without a share in the trainer's terminal and standard output."""
    with contextlib.suppress(OSError):  # it leads one already
        os.setsid()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    # multiprocessing forbids children to the processes that it ends at exit; the pool ends these itself.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]


def _limit_memory(memory_gib: float | None) -> None:
    if memory_gib is None or sys.platform != "linux":
        return
    import resource

    with open("/proc/self/statm") as f:
        held = int(f.read().split()[0]) * resource.getpagesize()
    limit = held + int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _end_with_parent() -> None:
    # After a kill -9 of the trainer nobody else would end a worker that is busy.
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        end_descendants(os.getpid())
        os._exit(1)


# -------------------------------------------------------------------------------------- ending whole families


def end_family(pid: int) -> None:
    """Kills a worker and all that it started, by SIGKILL. They are stopped first, so that none is started meanwhile."""
    _signal(pid, signal.SIGSTOP)
    end_descendants(pid)
    _signal(pid, signal.SIGKILL)
    with contextlib.suppress(OSError):  # its session, which also holds what a dead worker left behind
        os.killpg(pid, signal.SIGKILL)


def end_descendants(pid: int) -> None:
    for child in list(_descendants(pid)):
        _signal(child, signal.SIGKILL)


def resume_family(pid: int) -> None:
    for member in (*_descendants(pid), pid):
        _signal(member, signal.SIGCONT)


def is_stopped(pid: int) -> bool:
    """Returns whether somebody suspended the process (SIGSTOP, Ctrl-Z, a debugger)."""
    return _stat(pid)[:1] in (["T"], ["t"])


def _descendants(pid: int) -> Iterator[int]:
    """Yields the children and theirs, by /proc; none where there is no /proc."""
    children: dict[int, list[int]] = {}
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):
            if name.isdigit() and len(fields := _stat(int(name))) > 1:
                children.setdefault(int(fields[1]), []).append(int(name))
    found = list(children.get(pid, ()))
    while found:
        child = found.pop()
        found.extend(children.get(child, ()))
        yield child


def _stat(pid: int) -> list[str]:
    """Returns the fields of /proc/PID/stat from the state on: state, parent, ..."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            return f.read().rpartition(b")")[2].decode().split()
    except OSError:
        return []


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, number)
