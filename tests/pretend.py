"""`--device pretend`: a device that is none. Its tensors say pretend:0 and compute on the CPU, and no operator takes
one of them together with one of the CPU's. It shows, without a GPU, which tensors the suite and the package make where.

Numbers are those of a CPU; what a GPU does with kernels, streams and precision is not in here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretend"
CPU = torch.device("cpu")


class Pretend(torch.Tensor):
    """A tensor of the device; `inner` has its numbers."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Pretend:
        like = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        self = torch.Tensor._make_wrapper_subclass(cls, inner.size(), device=f"{NAME}:0", **like)
        self.inner = inner
        return self

    def __repr__(self, **_: Any) -> str:
        return f"Pretend({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        flat, spec = tree_flatten((args, kwargs))
        here = [t for t in flat if isinstance(t, Pretend)]
        moves = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        for t in flat:
            if isinstance(t, torch.Tensor) and not isinstance(t, Pretend) and t.dim() > 0 and not moves:
                raise RuntimeError(f"Expected all tensors to be on the same device, but got {NAME} and cpu: {func}")
        to_cpu = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
        values, kwargs = tree_unflatten([t.inner if isinstance(t, Pretend) else t for t in flat], spec)
        if kwargs.get("device") is not None:
            kwargs["device"] = CPU
        out = func(*values, **kwargs)
        if to_cpu:
            return out
        # An operator that writes into its argument returns that one.
        given = {id(t.inner): t for t in here}
        wrapped = lambda t: given[id(t)] if id(t) in given else cls(t) if isinstance(t, torch.Tensor) else t  # noqa: E731
        return tree_map(wrapped, out)


def _is_here(device: Any) -> bool:
    return device is None or torch.device(device).type == NAME


class PretendMode(TorchFunctionMode):
    """Tensors are made on the pretended device where it is named, or where none is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _device_constructors() and kwargs.get("out") is None and _is_here(kwargs.get("device")):
            return self._made(func, args, kwargs)
        if func is torch.Tensor.tolist and isinstance(args[0], Pretend):
            return args[0].inner.tolist()
        if func is torch.Tensor.to and not isinstance(args[0], Pretend):
            named = [a for a in (*args[1:], kwargs.get("device")) if isinstance(a, (str, torch.device))]
            if named and _is_here(named[0]):
                kwargs.pop("device", None)
                others = [a for a in args[1:] if not isinstance(a, (str, torch.device))]
                return Pretend(args[0].to(*others, **kwargs) if others or kwargs else args[0].clone())
        return func(*args, **kwargs)

    def _made(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is torch.as_tensor and isinstance(args[0], Pretend):
            return args[0] if kwargs.get("dtype") is None else args[0].to(kwargs["dtype"])
        grad = kwargs.pop("requires_grad", False)
        return Pretend(func(*args, **{**kwargs, "device": CPU})).requires_grad_(grad)


class Module(_DummyBackendModule):
    """torch.pretend."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_LIBRARY, _FALLBACK = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")


def _made(op: str, *args: Any, dtype: Any = None, **_: Any) -> torch.Tensor:
    return (torch.empty if op.startswith("empty.") else torch.empty_strided)(*args, dtype=dtype, device=CPU)


def activate() -> None:
    """From here on, whatever is made without a device is made there."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    for op in ("empty.memory_format", "empty_strided"):  # what operators make of their own in C++
        _LIBRARY.impl(op, lambda *args, _op=op, **kwargs: Pretend(_made(_op, *args, **kwargs)), "PrivateUse1")
    _FALLBACK.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    PretendMode().__enter__()
