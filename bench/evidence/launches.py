"""Records what a kernel would be launched with: the host code runs on CPU tensors, and the launch itself is caught.

So ours and a peer's kernels are compiled with the very specialisation that their own host code asks for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["Launch", "recorded"]


@dataclass(frozen=True)
class Launch:
    """A caught launch: the kernel, every argument by name, and how it is to be compiled."""

    fn: Any  # JITFunction
    arguments: dict[str, Any]
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return str(self.fn.__name__)

    def source(self) -> Any:
        """Returns what Triton would compile: types of the arguments, constants, and which are divisible by 16."""
        from triton.compiler import ASTSource

        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.fn.params):
            kind = "constexpr" if parameter.is_constexpr else _kind(self.arguments[parameter.name], parameter)
            signature[parameter.name] = kind
            value = self.arguments[parameter.name]
            if kind == "constexpr":
                constants[(index,)] = getattr(value, "value", value)
            elif _divisible(value) and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
        return ASTSource(self.fn, signature, constants, attributes)


def _kind(value: Any, parameter: Any) -> str:
    """Returns Triton's name of an argument's type; "constexpr" for what it specialises away (None, and the integer
    1)."""
    import torch
    from triton.runtime.jit import mangle_type
    from triton.tools.tensor_descriptor import TensorDescriptor

    if value is None or (value == 1 if isinstance(value, int) and not isinstance(value, bool) else False):
        return "constexpr" if value is None or not parameter.do_not_specialize else "i32"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_kind(value.base, parameter)[1:]}{list(value.block_shape)}>".replace(" ", "")
    if isinstance(value, torch.Tensor) and value.dtype == torch.bool:
        return "*i1"
    return str(mangle_type(value))


def _divisible(value: Any) -> bool:
    import torch

    if isinstance(value, torch.Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and not isinstance(value, bool) and value % 16 == 0


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Catches the launches inside the block; none of them runs. Needs a process without TRITON_INTERPRET."""
    from triton.runtime.jit import JITFunction

    caught: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        options = {"num_warps": kwargs.pop("num_warps", 4), "num_stages": kwargs.pop("num_stages", 3)}
        bound = self.signature.bind_partial(*args, **{k: v for k, v in kwargs.items() if k in self.arg_names})
        bound.apply_defaults()
        caught.append(Launch(self, dict(bound.arguments), options["num_warps"], options["num_stages"]))

    original = JITFunction.run
    JITFunction.run = run  # type: ignore[method-assign]
    try:
        yield caught
    finally:
        JITFunction.run = original  # type: ignore[method-assign]
