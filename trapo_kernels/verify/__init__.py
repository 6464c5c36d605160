"""This folder finds out which compiled backends are right on this machine: what `backend=None` trusts on a GPU.

    verify(device)     tries all that are here, anew, and reports
    proven(name, ...)  what `dispatch.pick` asks: the verdict on disk, or, the first time, the one it then makes

A verdict is made in child processes (trial.py) by a few dozen cases (cases.py), and kept (keep.py).
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..backends.dispatch import backends, trust
from . import keep, trial
from .cases import ENOUGH
from .keep import Verdict

__all__ = ["Report", "Verdict", "proven", "reason", "verify", "wanted"]

ENV = "TRAPO_KERNELS_VERIFY"

# Seconds: of the trial that a pick makes, and of the one that a user asks for.
LIMIT, LIMIT_ASKED = 20.0, 180.0

_known: dict[tuple[torch.device, str], Verdict] = {}
_said: set[str] = set()
_lock = threading.RLock()


@dataclass(frozen=True)
class Report:
    """Says what became of each backend's cases on a device. It is true if none was wrong and all could be tried."""

    device: str
    verdicts: dict[str, Verdict]
    kept: Path | None  # the file; None: nothing was kept

    def __bool__(self) -> bool:
        return all(v.right for v in self.verdicts.values())

    def __str__(self) -> str:
        lines = [str(v) for v in self.verdicts.values()] or ["no compiled backend is here"]
        return "\n".join([self.device, *("  " + line for line in lines)])


def verify(device: torch.device | str | None = None) -> Report:
    """Tries every compiled backend that is here on a device, in a process of its own, and keeps the verdict for
    `backend=None`.

    It takes up to three minutes on a GPU, where Triton compiles its kernels; a second time is faster.

    Args:
        device: None: the current CUDA device, or the CPU where there is none.

    Raises:
        ValueError: there is no such device here.
    """
    try:
        where = _device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError, TypeError) as error:
        why = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"verify: device must be a device that is here, as 'cuda:0' or 'cpu'; got {device!r} ({why})"
        ) from None
    names = [
        b.name for b in backends().values()
        if b.kernel is not None and b.compiled and b.device in (None, where.type) and b.available
    ]  # fmt: skip
    with _lock, keep.locked(where, LIMIT_ASKED):
        found = trial.run(names, where, LIMIT_ASKED, ENOUGH)
        return Report(keep.machine(where)["device"], found, _remember(where, found))


def wanted() -> bool:
    """Returns whether picks ask for proof: TRAPO_KERNELS_VERIFY is not 0.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    value = os.environ.get(ENV) or "1"
    if value not in ("0", "1"):
        raise ValueError(f"{ENV} must be 0 (no backend is tried, torch is picked) or 1; got {value!r}")
    return value == "1"


def proven(name: str, device: torch.device, others: Callable[[], Sequence[str]], may_try: bool = True) -> bool:
    """Returns whether a backend may be picked unasked on a device. Without a verdict, one is made of it and of
    `others()`, unless a graph is being compiled or captured; then nothing is proved yet."""
    if not wanted():
        return False
    verdict = _known.get((device, name))
    if verdict is None:
        verdict = _find(name, _device(device), others, may_try)
        if verdict is None:
            return False
        _known[device, name] = verdict
    if not verdict.right:
        again = "" if verdict.right is False else " (verify() tries again, with more time)"
        _say(f"backend {name!r} is left out on {keep.machine(_device(device))['device']}: {verdict.reason}{again}")
    return verdict.right is True


def reason(name: str, device: torch.device) -> str | None:
    """Returns why a pick would leave the backend out, as far as it is known without trying anything; None: nothing
    is."""
    if not wanted():
        return None
    where = _device(device)
    verdict = _known.get((where, name)) or keep.read(where).get(name)
    return None if verdict is None or verdict.right else verdict.reason


def _find(name: str, device: torch.device, others: Callable[[], Sequence[str]], may_try: bool) -> Verdict | None:
    """Returns the verdict on disk, or a new one; None where none may be made now."""
    kept = keep.read(device)
    if name in kept:
        return kept[name]
    if not may_try or _capturing(device):
        what = "a compiler traces" if not may_try else "a CUDA graph is captured"
        _say(f"the GPU kernels have not been tried on this machine: 'torch' is used while {what}; call verify() before")
        return None
    with _lock, keep.locked(device, LIMIT + 10.0):
        kept = {**{n: v for (d, n), v in _known.items() if d == device}, **keep.read(device)}
        if name in kept:  # made by whoever had the lock
            return kept[name]
        names = [name, *(n for n in others() if n not in kept and n != name)]
        _say(
            f"trying {', '.join(names)} on {keep.machine(device)['device']}, once on this machine "
            f"(at most {LIMIT:g} s; {ENV}=0 does without)"
        )
        found = trial.run(names, device, LIMIT, ENOUGH)
        _remember(device, found)
    return found[name]


def _remember(device: torch.device, found: dict[str, Verdict]) -> Path | None:
    _known.update({(device, name): verdict for name, verdict in found.items()})
    try:
        return keep.write(device, found)
    except OSError as error:
        _say(f"the verdict cannot be kept, every process will make it anew: {error}")
        return None


def _device(device: torch.device | str | None) -> torch.device:
    """Returns the device, with an index if it is a CUDA device."""
    found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _say(line: str) -> None:
    """Says it on stderr, once in a process; of a node's ranks the first speaks."""
    if line not in _said:
        _said.add(line)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"trapo_kernels: {line}", file=sys.stderr, flush=True)


trust(proven, reason)
