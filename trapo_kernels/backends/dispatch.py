"""This file knows which implementations exist here, and which one does a call."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ..arguments.scalars import shown
from . import cpu, cuda, plain, triton
from .base import RowKernel

__all__ = ["Backend", "backend_name", "backends", "check_backend", "default_backend", "pick", "set_backend", "trust"]

ENV = "TRAPO_KERNELS_BACKEND"
_ENV_NAMED = f"backend ({ENV})"


@dataclass
class _Trust:
    """Says whom `pick` asks about backends that need proof. Without anybody none of them is picked."""

    # (backend, device, the backends that are tried with it, whether any may be tried now) -> it has been found right
    proven: Callable[[str, torch.device, Callable[[], Sequence[str]], bool], bool] = lambda *_: False
    # (backend, device) -> why it is left out, as far as is known
    reason: Callable[[str, torch.device], str | None] = lambda *_: None


_trust = _Trust()


def trust(proven: Any, reason: Any) -> None:
    """Makes `pick` ask these two from here on. `verify` needs the backends, so it comes to them and not they to it."""
    _trust.proven, _trust.reason = proven, reason


@dataclass(frozen=True)
class Backend:
    """Is an implementation. `kernel` None: materialise the logits (the oracle)."""

    name: str
    kernel: RowKernel | None
    detail: str
    automatic: bool = True  # may be picked when the caller names none
    proof: bool = False  # and then only where `verify` has found it right
    compiled: bool = True  # what `verify` tries
    device: str | None = None  # the one type of device whose tensors it takes; None: any
    look: Callable[[], str | None] = lambda: None  # finds out whether it exists here

    @property
    def missing(self) -> str | None:
        """Returns why it does not exist here, in one line; None: it does."""
        return self.look()

    @property
    def available(self) -> bool:
        return self.missing is None

    @property
    def left_out(self) -> str | None:
        """Returns why it is not picked unasked though it exists here: what `verify` found on the current device, as far
        as is known; None: nothing."""
        if not (self.automatic and self.proof) or self.missing is not None:
            return None
        return _trust.reason(self.name, torch.device(self.device or "cpu"))

    def __str__(self) -> str:
        if self.missing is not None:
            return f"{self.name}: not here: {self.missing}"
        reason = self.left_out
        return f"{self.name}: {self.detail}" + (f"; not picked unasked: {reason}" if reason else "")


# Fastest first.
_BACKENDS = [
    Backend(
        "cuda",
        cuda.KERNEL,
        "CUDA C++: rows on chip, sm_80 and newer",
        proof=True,
        device="cuda",
        look=cuda.missing,
    ),
    Backend(
        "triton",
        triton.KERNEL,
        "Triton kernels on CUDA devices; interpreted, to test them, on CPU tensors",
        automatic=not triton.interpreted(),
        proof=True,
        device=None if triton.interpreted() else "cuda",
        look=triton.missing,
    ),
    Backend("cpu", cpu.KERNEL, "C++ for CPU tensors: AVX-512, AVX2 or neither", device="cpu", look=cpu.missing),
    Backend("torch", plain.KERNEL, "streamed in plain torch, any device", compiled=False),
    Backend("reference", None, "materialises the logits; the oracle, any float dtype", automatic=False, compiled=False),
]

_chosen: str | None = None


def backends() -> dict[str, Backend]:
    """Returns every backend of this version by name: `.available`, `.missing` (why not, one line), `.left_out` (why it
    is not picked unasked, as far as `verify` has found out) and `.detail`."""
    return {backend.name: backend for backend in _BACKENDS}


def set_backend(name: str | None) -> None:
    """Use this backend in this process where a call names none; None = the fastest that can do the call.

    Without it the environment variable TRAPO_KERNELS_BACKEND decides.

    Raises:
        ValueError: there is no such backend, or it does not exist on this machine; the message says why.
    """
    global _chosen
    if name is not None:
        _find(name, "set_backend: name")
    _chosen = name


def default_backend(device: torch.device | str = "cpu") -> str:
    """Returns the name of the backend that does a call on this device which names none."""
    device = torch.device(device)
    chosen = _ask("default_backend", device)
    return (_fastest(device) if chosen is None else chosen).name


def pick(name: str | None, caller: str, device: torch.device, may_try: bool = True) -> Backend:
    """Returns the backend for a call on tensors of a device: the one named by argument, `set_backend` or environment,
    else the fastest that can be trusted. On a GPU the first such pick on a machine tries the kernels, if it
    `may_try`."""
    chosen = _ask(caller, device, name)
    if chosen is not None:
        return chosen
    fastest, cpu = _fastest(device, may_try), backends().get("cpu")
    if device.type == "cpu" and cpu is not None and cpu.missing is not None:
        _say_slower(fastest.name, cpu.missing)
    return fastest


def _ask(caller: str, device: torch.device, name: str | None = None) -> Backend | None:
    check_backend(caller, name)
    for chosen, argument in ((name, "backend"), (_chosen, "backend (set_backend)"), (os.environ.get(ENV), _ENV_NAMED)):
        if chosen:
            return _check_device(_find(chosen, f"{caller}: {argument}"), f"{caller}: {argument}", device)
    return None


def _fastest(device: torch.device, may_try: bool = True) -> Backend:
    able = (b for b in _BACKENDS if b.automatic and b.device in (None, device.type) and b.available)
    return next(b for b in able if not b.proof or _trust.proven(b.name, device, lambda: _to_prove(device), may_try))


def _to_prove(device: torch.device) -> list[str]:
    return [b.name for b in _BACKENDS if b.automatic and b.proof and b.device in (None, device.type) and b.available]


@cache
def _say_slower(name: str, reason: str) -> None:
    """Says once why calls on a CPU are slower than they could be: an install without the C++ backend is no error."""
    warnings.warn(
        f"trapo_kernels: losses on CPUs take 1.1 to 1.3 times as long in backend {name!r} as in C++: {reason} "
        "(naming a backend silences this)",
        RuntimeWarning,
        stacklevel=2,
    )


def _check_device(backend: Backend, argument: str, device: torch.device) -> Backend:
    if backend.device not in (None, device.type):
        raise ValueError(f"{argument} {backend.name!r} takes {backend.device} tensors; got {device.type}")
    return backend


def check_backend(caller: str, name: Any) -> None:
    """Returns the name of a backend of this version, or None."""
    if name is not None and not (isinstance(name, str) and name in backends()):
        raise ValueError(f"{caller}: backend must be one of {_names()} or None; got {shown(name)}")


def _names() -> str:
    return ", ".join(map(repr, backends()))


def _find(name: str, argument: str) -> Backend:
    known = backends()
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{argument} must be one of {_names()} or None; got {shown(name)}")
    if not known[name].available:
        raise ValueError(f"{argument} {name!r} does not exist here: {known[name].missing}")
    return known[name]


def backend_name(name: str | None, caller: str, device: torch.device) -> str:
    """Returns the name of what `pick` picks, as a constant of a compiled graph."""
    return _constant_name(name, _chosen, caller, device)  # what is chosen is read here, and so guards the graph


@torch.compiler.assume_constant_result
def _constant_name(name: str | None, chosen: str | None, caller: str, device: torch.device) -> str:
    return pick(name, caller, device, may_try=False).name
