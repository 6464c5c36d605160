"""Counts the bytes that kernels ask memory for, by running them in Triton's interpreter: exact, the same for all.

Every load, store and atomic goes through the interpreter's builder; its active lanes times their size are added up
under the kernel's argument whose memory they touch. These are requests: what a cache serves is among them. Needs a
process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Traffic", "counted"]


@dataclass
class Traffic:
    """Bytes by (kernel, argument, "read" | "written" | "atomic")."""

    bytes: dict[tuple[str, str, str], int] = field(default_factory=lambda: defaultdict(int))

    def of(self, kind: str, **only: str) -> int:
        """Returns the sum over everything of this kind; `kernel` and `argument` narrow it down."""
        return sum(
            count
            for (kernel, argument, what), count in self.bytes.items()
            if what == kind and kernel == only.get("kernel", kernel) and argument == only.get("argument", argument)
        )

    @property
    def kernels(self) -> list[str]:
        return sorted({kernel for kernel, _, _ in self.bytes})


def _ranges(arguments: dict[str, Any]) -> list[tuple[int, int, str]]:
    """Returns (first byte, end, name) of every tensor among a kernel's arguments."""
    found = []
    for name, value in arguments.items():
        tensor = getattr(value, "base", None) if type(value).__name__ == "TensorDescriptor" else value
        if hasattr(tensor, "data_ptr"):
            span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            first = tensor.data_ptr()
            found.append((first, first + span * tensor.element_size() if tensor.numel() else first, name))
    return found


@contextmanager
def counted() -> Iterator[Traffic]:
    """Counts everything that interpreted kernels do inside the block."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    traffic = Traffic()
    current: dict[str, Any] = {"kernel": "", "ranges": []}

    def add(kind: str, pointers: Any, mask: Any) -> None:
        active = (
            np.broadcast_to(mask, np.shape(pointers.data)) if mask is not None else np.ones_like(pointers.data, bool)
        )
        lanes = int(active.sum())
        if not lanes:
            return
        address = int(np.asarray(pointers.data)[active].flat[0])
        name = next((name for low, high, name in current["ranges"] if low <= address < high), "?")
        size = pointers.get_element_ty().primitive_bitwidth // 8
        traffic.bytes[current["kernel"], name, kind] += lanes * max(1, size)

    def wrapped(kind: str, mask_at: int) -> Any:
        def wrap(original: Any) -> Any:
            def method(self: Any, pointers: Any, *args: Any, **kwargs: Any) -> Any:
                add(kind, pointers, args[mask_at].data if mask_at >= 0 else None)
                return original(self, pointers, *args, **kwargs)

            return method

        return wrap

    hooks = {
        "create_masked_load": wrapped("read", 0),  # plain and descriptor loads end here too
        "create_masked_store": wrapped("written", 1),
        "create_atomic_rmw": _wrapped_rmw(add),
        "create_atomic_cas": wrapped("atomic", -1),
    }
    saved = {name: getattr(InterpreterBuilder, name) for name in hooks}
    launch = GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        import inspect

        names = list(inspect.signature(self.fn).parameters)
        bound = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        current.update(kernel=self.fn.__name__, ranges=_ranges(bound))
        return launch(self, *args, **kwargs)

    try:
        for name, wrap in hooks.items():
            setattr(InterpreterBuilder, name, wrap(saved[name]))
        GridExecutor.__call__ = call
        yield traffic
    finally:
        GridExecutor.__call__ = launch
        for name, original in saved.items():
            setattr(InterpreterBuilder, name, original)


def _wrapped_rmw(add: Any) -> Any:
    def wrap(original: Any) -> Any:
        def method(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            add("atomic", pointers, mask.data)
            return original(self, op, pointers, value, mask, *rest)

        return method

    return wrap
