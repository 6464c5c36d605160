"""A backend's cases run in a process of their own: a crash, a hang or a broken CUDA context ends that process and is a
verdict.

The child is started with the parent's sys.path and runs `child` below; it never imports the user's __main__. It says
what it does in lines of JSON, each before and after it is done, so that the last line names the case in which it ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

import torch

from . import keep
from .keep import Verdict

__all__ = ["child", "interpreter", "run"]

# What a child calls before its cases: "module:function". For tests, whose backends and bugs are not this package's.
PRELOAD: tuple[str, ...] = ()

# No case is begun in the last seconds of the limit: one that is still running when it ends hangs.
LAST_CASE = 6.0

_FROM_OUTSIDE = tuple(-s for s in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGKILL", 9)))

_BOOT = (
    "import json, sys; options = json.loads(sys.argv[1]); sys.path[:] = options.pop('path');"
    "from trapo_kernels.verify.trial import child; child(**options)"
)


def interpreter() -> str | None:
    """Returns a Python that can be started with this one's packages; None inside a program that embeds one and has no
    other."""
    base = getattr(sys, "_base_executable", None)
    for path in (sys.executable, os.path.join(sys.exec_prefix, "bin", "python3"), base):
        if path and re.match(r"(python|pypy)", os.path.basename(path)) and os.access(path, os.X_OK):
            return str(path)
    return shutil.which(f"python{sys.version_info.major}.{sys.version_info.minor}")


@dataclass
class _Child:
    backend: str
    process: subprocess.Popen[bytes]
    said: IO[bytes]
    errors: IO[bytes]
    started: float  # of time.time

    def kill(self) -> None:
        """Ends it and everything that it started."""
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        else:
            self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that waits inside a driver dies later
            self.process.wait(2)


def run(
    names: Sequence[str], device: torch.device, limit: float, enough: int, cases: Sequence[str] | None = None
) -> dict[str, Verdict]:
    """Returns the verdict on each backend, all tried at the same time, after `limit` seconds at the latest.

    Args:
        enough: a backend that got fewer cases right before the time was over has not proved itself.
        cases: names of those to run; None: all.
    """
    python = interpreter()
    if python is None:
        reason = "there is no Python interpreter to start a process with (sys.executable is not one)"
        return {name: Verdict(name, None, reason, 0, 0.0) for name in names}
    children: list[_Child] = []
    end = time.monotonic() + limit
    found: dict[str, Verdict] = {}
    try:
        for name in names:
            try:
                children.append(_start(python, name, device, limit, cases))
            except OSError as error:
                found[name] = Verdict(name, None, f"its process could not be started: {error}", 0, 0.0)
        for one in children:
            late = False
            try:
                one.process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                late = True
            one.kill()
            found[one.backend] = _judge(one, limit, late, enough)
    finally:
        for one in children:
            if one.process.poll() is None:
                one.kill()
            one.said.close()
            one.errors.close()
    return found


def _start(python: str, name: str, device: torch.device, limit: float, cases: Sequence[str] | None) -> _Child:
    options = {
        "path": [p for p in sys.path if isinstance(p, str)],
        "backend": name,
        "device": str(device),
        "until": time.time() + max(limit - LAST_CASE, limit / 2),
        "expected": keep.machine(device),
        "cases": None if cases is None else list(cases),
        "preload": list(PRELOAD),
    }
    environment = {k: v for k, v in os.environ.items() if k != "TRAPO_KERNELS_BACKEND"}
    environment["TRAPO_KERNELS_VERIFY"] = "0"
    said, errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
    try:
        process = subprocess.Popen(
            [python, "-c", _BOOT, json.dumps(options)], stdin=subprocess.DEVNULL, stdout=said, stderr=errors,
            env=environment, start_new_session=True,
        )  # fmt: skip
    except OSError:
        said.close()
        errors.close()
        raise
    return _Child(name, process, said, errors, time.time())


def _lines(file: IO[bytes]) -> list[dict[str, Any]]:
    """Returns what the child said; other lines on its stdout are of libraries."""
    file.seek(0)
    found = []
    for line in file.read().splitlines():
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict) and "trapo_kernels" in value:
                found.append(value)
    return found


def _judge(one: _Child, limit: float, late: bool, enough: int) -> Verdict:
    lines = _lines(one.said)
    seconds = limit if late or not lines else lines[-1]["time"] - one.started
    right = sum(line["trapo_kernels"] == "right" for line in lines)
    last = lines[-1] if lines else {"trapo_kernels": "nothing"}
    event, case = last["trapo_kernels"], last.get("case")

    def verdict(is_right: bool | None, reason: str | None) -> Verdict:
        return Verdict(one.backend, is_right, reason, right, round(seconds, 3))

    if event == "wrong":
        return verdict(False, f"case {case}: {last['reason']}")
    if event == "unable":
        return verdict(None, last["reason"])
    if event == "end":
        if right >= min(enough, last["of"]):
            return verdict(True, None)
        return verdict(None, f"there was time for {right} of the {min(enough, last['of'])} cases that it takes")
    if event == "nothing":
        what = f"its process did not start within {limit:g} s" if late else f"its process ended{_how(one)} at the start"
        return verdict(None, what)
    where = f"case {case}" if case else "loading it"
    if not late and one.process.returncode in _FROM_OUTSIDE:  # the kernel's, where memory is short
        return verdict(None, f"{where}: its process was ended{_how(one)}")
    if late:
        return verdict(False, f"{where}: no answer, its process was killed after {limit:g} s")
    return verdict(False, f"{where}: its process ended{_how(one)}")


def _how(one: _Child) -> str:
    """Says by which signal or status it ended, and the last thing that it wrote on stderr."""
    code = one.process.returncode
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f" by {signal.Signals(-code).name}"
    one.errors.seek(0)
    lines = one.errors.read().decode(errors="replace").strip().splitlines()
    return f" with status {code}" + (f" ({lines[-1].strip()[:200]})" if lines else "")


# The child's side --------------------------------------------------------------------------------------------------


def _say(event: str, **fields: Any) -> None:
    line = json.dumps({"trapo_kernels": event, "time": time.time(), **fields})
    print("\n" + line, flush=True)  # a library may have left its own line open


def child(
    backend: str,
    device: str,
    until: float,
    expected: dict[str, str],
    cases: Sequence[str] | None,
    preload: Sequence[str],
) -> None:
    """Runs the cases of a backend and says what comes of each, until the first that is wrong or `until` (of
    `time.time`)."""
    import importlib

    where = torch.device(device)
    try:
        torch.zeros(1, device=where).item()
        if (here := keep.machine(where)) != expected:
            key = next(k for k in expected if here.get(k) != expected[k])
            return _say("unable", reason=f"its process sees {key} {here.get(key)!r}, not {expected[key]!r}")
    except Exception as error:
        return _say("unable", reason=f"its process cannot use {device}: {_one_line(error)}")
    _say("ready")
    from .cases import CASES, fault

    for text in preload:
        module, function = text.split(":")
        getattr(importlib.import_module(module), function)()
    chosen = [case for case in CASES if cases is None or case.name in cases]
    for case in chosen:
        if time.time() > until:
            break
        _say("begin", case=case.name)
        try:
            reason = fault(case, backend, where)
        except torch.OutOfMemoryError as error:
            return _say("unable", reason=f"case {case.name}: {_one_line(error)}")
        except Exception as error:
            reason = _one_line(error)
        if reason is not None:
            return _say("wrong", case=case.name, reason=reason)
        _say("right", case=case.name)
    _say("end", of=len(chosen))


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
