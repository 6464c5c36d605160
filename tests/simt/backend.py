"""Backend `cuda-on-cpu`: the operators of csrc/cuda for CPU tensors, on tests/simt's device. Never picked unasked."""

from __future__ import annotations

from functools import cache

from simt import build

from trapo_kernels.backends import cuda, dispatch, native

NAME = "cuda-on-cpu"


@cache
def _look() -> str | None:
    """Compiles the library when it is first asked for."""
    reason = build.missing()
    if reason is None:
        native.load(build.library(), cuda.register_fakes)
    return reason


def available() -> bool:
    """Whether the operators can be called; compiles and loads them."""
    return _look() is None


def register() -> list[str]:
    """Its name, where it can run."""
    if build.missing() is not None:
        return []
    if NAME not in dispatch.backends():
        detail = "csrc/cuda on fibers, for tests"
        dispatch._BACKENDS.append(
            dispatch.Backend(NAME, cuda.KERNEL, detail, automatic=False, device="cpu", look=_look)
        )
    return [NAME]
