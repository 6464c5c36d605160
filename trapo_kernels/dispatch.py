"""Which implementations exist here, and which one does a call."""

from __future__ import annotations

import os
from dataclasses import dataclass

from .rows import torch as torch_rows
from .rows.base import RowKernel

__all__ = ["Backend", "backends", "default_backend", "pick", "set_backend"]

ENV = "TRAPO_KERNELS_BACKEND"


@dataclass(frozen=True)
class Backend:
    """An implementation. `kernel` None: materialise the logits (the oracle)."""

    name: str
    kernel: RowKernel | None
    detail: str
    automatic: bool = True  # may be picked when the caller names none
    missing: str | None = None  # why it does not exist here

    @property
    def available(self) -> bool:
        return self.missing is None

    def __str__(self) -> str:
        return f"{self.name}: {self.detail}" if self.missing is None else f"{self.name}: not here: {self.missing}"


# Fastest first.
_BACKENDS = [
    Backend("torch", torch_rows, "streamed in plain torch, any device"),
    Backend("reference", None, "materialises the logits; the oracle, any float dtype", automatic=False),
]

_chosen: str | None = None


def backends() -> dict[str, Backend]:
    """Every backend of this version by name: `.available`, `.missing` (why not, one line) and `.detail`."""
    return {backend.name: backend for backend in _BACKENDS}


def set_backend(name: str | None) -> None:
    """Use this backend in this process where a call names none; None = the fastest that can do the call.

    Without it the environment variable TRAPO_KERNELS_BACKEND decides.

    Raises:
        ValueError: there is no such backend, or it does not exist on this machine; the message says why.
    """
    global _chosen
    if name is not None:
        _named(name, "set_backend: name")
    _chosen = name


def default_backend() -> str:
    """Name of the backend that does a call which names none."""
    return pick(None, "default_backend").name


def pick(name: str | None, caller: str) -> Backend:
    """The backend for a call: the one named by argument, `set_backend` or environment, else the fastest."""
    if name is not None:
        return _named(name, f"{caller}: backend")
    if _chosen is not None:
        return _named(_chosen, f"{caller}: backend (set_backend)")
    if os.environ.get(ENV):
        return _named(os.environ[ENV], f"{caller}: backend ({ENV})")
    return next(backend for backend in _BACKENDS if backend.available and backend.automatic)


def _named(name: str, argument: str) -> Backend:
    known = backends()
    if name not in known:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, known))} or None; got {name!r}")
    if not known[name].available:
        raise ValueError(f"{argument} {name!r} does not exist here: {known[name].missing}")
    return known[name]
