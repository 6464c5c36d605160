"""Backends with planted bugs, and registrations of others, for the child processes of `trapo_kernels.verify`."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

import torch

from trapo_kernels.backends import dispatch
from trapo_kernels.backends import plain as rows


def _wrong(logits, targets, stats, g_lp, g_entropy, cap):
    rows.grad_(logits, targets, stats, 1.01 * g_lp, g_entropy, cap)


def _nan(logits, targets, cap, entropy):
    return rows.stats(logits, targets, cap, entropy)._replace(target=torch.full((len(logits),), torch.nan))


def _raises(*_):
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ...")


def _dies(*_):
    os.kill(os.getpid(), signal.SIGSEGV)


def _is_killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def _hangs(*_):
    while True:
        time.sleep(1)


def _needs_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nGPU 0 has ...")


BUGS = {
    "sound": {},
    "wrong": {"grad_": _wrong},
    "nan": {"stats": _nan},
    "raises": {"stats": _raises},
    "dies": {"stats": _dies},
    "is-killed": {"stats": _is_killed},
    "hangs": {"stats": _hangs},
    "needs-memory": {"stats": _needs_memory},
}


def planted(name: str) -> dispatch.Backend:
    """Picked unasked on CPU tensors, once it has proved itself."""
    return dispatch.Backend(name, replace(rows.KERNEL, **BUGS[name]), "planted", proof=True, device="cpu")


def register() -> None:
    """All of them."""
    dispatch._BACKENDS[:0] = [planted(name) for name in BUGS]


def register_cuda_on_cpu() -> None:
    from simt import backend

    backend.register()
