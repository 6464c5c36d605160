"""This file multiplies few rows with weights that were laid out for them once.

MKL lays a weight out anew in each call, which costs as much as a product of a few rows; oneDNN takes a layout that was
made before. Measured, float32, one thread, packed against plain (`bench/decode.py` has whole steps):

    rows                          1      2      4      8      12     32     64     90
    head [49152, 576], AVX2       1.3    2.5    2.2    1.9    1.7    1.3    1.3    1.2
    [1536, 576], AVX2             1.2    1.6    1.4    1.3    1.2    1.05   0.93   1.0
    [576, 576], AVX2              1.0    1.35   1.2    1.2    1.1    1.0    0.96   0.9
    [192, 576], AVX2              0.3    0.8    0.7    0.7    0.7    0.8    1.0    0.95
    whole model, AVX-512          0.8    -      1.4    -      1.7    1.6    -      -

`pays` is a rule of these, not a measurement of the moment: both products round differently in their last bits, and a
run that is begun again must take the same ones.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

import torch
from torch import nn
from torch.nn.modules import module as modules

FEWEST, MOST = 3, 32  # rows
MOST_OF_LARGE = 128
SMALL, LARGE = 2**18, 2**23  # elements of a weight
MEMORY = 1 / 8  # of the machine's, for packed copies
LAID_OUT_FOR = 16  # rows: what oneDNN is told; the layout serves all


def pays(rows: int, elements: int) -> bool:
    """Returns whether a product of so many rows is faster with a packed weight of so many elements."""
    return elements >= SMALL and FEWEST <= rows <= (MOST_OF_LARGE if elements >= LARGE else MOST)


class PackedLinear:
    """Computes the forward of an nn.Linear, y = x Wᵀ + b, for inputs of `dtype` and row counts that a packed weight
    pays for; the linear's own for others. The weight is packed when first needed."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        self.linear, self.dtype = linear, dtype
        self.elements = linear.weight.numel()
        self.packed: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None

    def __call__(self, input: torch.Tensor) -> torch.Tensor:  # as nn.Linear.forward calls it
        if _computed_in(input.dtype) is not self.dtype or not pays(input.numel() // input.shape[-1], self.elements):
            return nn.Linear.forward(self.linear, input)
        if self.packed is None:
            weight, bias = self.linear.weight.detach(), self.linear.bias
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(self.dtype), LAID_OUT_FOR)
            self.bias = None if bias is None else bias.detach().to(self.dtype)
        x = input if input.dtype is self.dtype else input.to(self.dtype)
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "none", [], "")
        return product


class PackedLinears:
    """Holds the packed linears of a model; `clear` when its weights have changed. Products are in autocast's dtype, in
    the weights' own without it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.stand_ins: list[PackedLinear] | None = None

    def clear(self) -> None:
        self.stand_ins = None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Lets the linears compute with packed weights. A forward in a module's own __dict__ hides its class's:
        parameters, state_dict and what looks at the modules see nothing of it."""
        if self.stand_ins is None:
            self.stand_ins = self._made()
        for stand_in in self.stand_ins:
            stand_in.linear.__dict__["forward"] = stand_in
        try:
            yield
        finally:
            for stand_in in self.stand_ins:
                del stand_in.linear.__dict__["forward"]

    def _made(self) -> list[PackedLinear]:
        """Packs the linears that can be packed, the largest first, within the bound of memory."""
        left = _memory() * MEMORY
        made: list[PackedLinear] = []
        linears = {m for m in self.model.modules() if packable(m)} if can_pack(self.model) else set()
        for linear in sorted(linears, key=lambda m: -m.weight.numel()):
            dtype = _computed_in(linear.weight.dtype)
            size = linear.weight.numel() * dtype.itemsize
            if dtype_is_fast(dtype) and linear.weight.numel() >= SMALL and size <= left:
                made.append(PackedLinear(linear, dtype))
                left -= size
        return made


def can_pack(model: nn.Module) -> bool:
    """Returns whether this machine has the packed products, and nobody compiled the model or watches every module's
    calls."""
    return (
        platform.machine().lower() in ("x86_64", "amd64")  # where it was measured
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and not (modules._global_forward_hooks or modules._global_forward_pre_hooks)
        and all(m._compiled_call_impl is None for m in model.modules())
    )


def packable(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Returns whether this is a linear that nothing else has its hands on: no subclass (adapters, quantised,
    parametrised), no tensor of another kind, no hook, no forward of its own, on the CPU."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.weight.device.type == "cpu"
        and not (module._forward_hooks or module._forward_pre_hooks)
        and "forward" not in module.__dict__
    )


def dtype_is_fast(dtype: torch.dtype) -> bool:
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else dtype


def _memory() -> int:
    """Returns the bytes of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
