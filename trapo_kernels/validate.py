"""Argument checks. Each error is one line: the function, the argument, what it accepts, what it got.

Checks of values read tensors on the CPU only: on an accelerator they would stall the stream, and the device's own
index assertion, or a NaN, reports a target out of range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .head import Head
from .terms import Sequences

__all__ = ["check_head", "check_linear", "check_logits", "check_normalizer", "check_targets"]
__all__ += ["check_sequences", "check_token_inputs"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_head(caller: str, **options: Any) -> Head:
    try:
        return Head(**options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{caller}: {error}") from None


def _tensor(caller: str, name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{caller}: {name} must be a tensor; got {type(value).__name__}")
    return value


def _float_tensor(caller: str, name: str, value: Any) -> None:
    if _tensor(caller, name, value).dtype not in _FLOATS:
        raise TypeError(f"{caller}: {name} must be float16, bfloat16, float32 or float64; got {_dtype(value)}")


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _same(caller: str, name: str, value: Tensor, like_name: str, like: Tensor, dtype: bool = True) -> None:
    """On the device, and of the dtype, of another argument."""
    if dtype and value.dtype != like.dtype:
        raise TypeError(
            f"{caller}: {name} must have the dtype of {like_name}; got {_dtype(value)} with {_dtype(like)} {like_name}"
        )
    if value.device != like.device:
        raise ValueError(f"{caller}: {name} must be on the device of {like_name}, {like.device}; got {value.device}")


def check_linear(caller: str, hidden: Any, weight: Any, bias: Any, sharded: bool = False, prefix: str = "") -> None:
    """hidden [..., D], weight [V, D], bias [V] or None: of one dtype, on one device. A shard may have no rows."""
    h, w, b = (f"{prefix}{name}" for name in ("hidden", "weight", "bias"))
    for name, value in ((h, hidden), (w, weight)):
        _float_tensor(caller, name, value)
    if hidden.ndim < 1 or hidden.shape[-1] < 1:
        raise ValueError(f"{caller}: {h} must be [..., D] with D >= 1; got {list(hidden.shape)}")
    if weight.ndim != 2 or (weight.shape[0] < 1 and not sharded) or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{caller}: {w} must be [V, D] with V >= 1 and D={hidden.shape[-1]} as in {h}; got {list(weight.shape)}"
        )
    _same(caller, w, weight, h, hidden)
    if bias is not None:
        _float_tensor(caller, b, bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{caller}: {b} must be [V] with V={weight.shape[0]}; got {list(bias.shape)}")
        _same(caller, b, bias, h, hidden)


def check_logits(caller: str, logits: Any) -> None:
    """logits [..., V]."""
    _float_tensor(caller, "logits", logits)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{caller}: logits must be [..., V] with V >= 1; got {list(logits.shape)}")


def check_targets(caller: str, targets: Any, like_name: str, like: Tensor) -> None:
    """int64 targets of the shape of `like` without its last dimension."""
    if _tensor(caller, "targets", targets).dtype != torch.int64:
        raise TypeError(f"{caller}: targets must be int64; got {_dtype(targets)}")
    if targets.shape != like.shape[:-1]:
        raise ValueError(
            f"{caller}: targets must be {list(like.shape[:-1])}, as {like_name} without its last dimension; "
            f"got {list(targets.shape)}"
        )
    _same(caller, "targets", targets, like_name, like, dtype=False)


def check_range(caller: str, targets: Tensor, active: Tensor, vocab: int, ignore_index: int) -> None:
    """Active targets lie in [0, V)."""
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = active & ((targets < 0) | (targets >= vocab))
    if wrong.any():
        bad = targets[wrong]
        end, worst = ("max", bad.max()) if bad.max() >= vocab else ("min", bad.min())
        raise ValueError(
            f"{caller}: targets must be int64 in [0, V) or ignore_index={ignore_index}; "
            f"got {end} {int(worst)} with V={vocab}"
        )


def check_token_inputs(
    caller: str, targets: Tensor, floats: Mapping[str, Any], masks: Mapping[str, Any], like: str = "targets"
) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    """Per-token inputs of the shape of targets; advantages may also be one per sequence, which is broadcast here."""
    out: dict[str, Tensor | None] = {}
    shape = targets.shape
    for name, value in {**floats, **masks}.items():
        if value is None:
            out[name] = None
            continue
        if name in masks and _tensor(caller, name, value).dtype != torch.bool:
            raise TypeError(f"{caller}: {name} must be bool; got {_dtype(value)}")
        if name in floats:
            _float_tensor(caller, name, value)
        _same(caller, name, value, like, targets, dtype=False)
        if name == "advantages" and value.shape == shape[:-1]:
            value = value[..., None]
        if value.shape != shape and not (name == "advantages" and value.shape == (*shape[:-1], 1)):
            also = f" or one per sequence, {list(shape[:-1])}" if name == "advantages" else ""
            raise ValueError(f"{caller}: {name} must be {list(shape)} as {like}{also}; got {list(value.shape)}")
        out[name] = value.detach().expand(shape)
    return {name: out[name] for name in floats}, {name: out[name] for name in masks}


def check_sequences(caller: str, targets: Tensor, sequence_ids: Any) -> Sequences:
    """Which sequence each token belongs to: the last dimension of targets, or what `sequence_ids` say."""
    if sequence_ids is None:
        if targets.ndim < 2:
            raise ValueError(
                f"{caller}: targets must be [B, T] or sequence_ids given, for an objective that reads sequences; "
                f"got {list(targets.shape)}"
            )
        length = targets.shape[-1]
        return Sequences(torch.arange(targets.numel(), device=targets.device), math.prod(targets.shape[:-1]), length)
    if _tensor(caller, "sequence_ids", sequence_ids).dtype != torch.int64:
        raise TypeError(f"{caller}: sequence_ids must be int64; got {_dtype(sequence_ids)}")
    _same(caller, "sequence_ids", sequence_ids, "targets", targets, dtype=False)
    if sequence_ids.shape != targets.shape:
        raise ValueError(
            f"{caller}: sequence_ids must be {list(targets.shape)} as targets; got {list(sequence_ids.shape)}"
        )
    return Sequences.of(sequence_ids.reshape(-1))


def check_normalizer(caller: str, normalizer: Any) -> None:
    """A number above 0, or a 0-dim tensor (whose value is checked on the CPU only)."""
    if isinstance(normalizer, Tensor):
        if normalizer.ndim != 0:
            raise ValueError(
                f"{caller}: normalizer must be a number above 0 or a 0-dim tensor; got shape {list(normalizer.shape)}"
            )
        if normalizer.device.type != "cpu" or torch.compiler.is_compiling():
            return
        normalizer = normalizer.item()
    number = isinstance(normalizer, (int, float)) and not isinstance(normalizer, bool)
    if not (number and normalizer > 0):
        raise ValueError(f"{caller}: normalizer must be a number above 0 or a 0-dim tensor; got {normalizer!r}")


def check_grad_tolerance(caller: str, tolerance: Any) -> float:
    """A number in [0, 1)."""
    number = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool)
    if not (number and 0 <= tolerance < 1):
        raise ValueError(f"{caller}: grad_tolerance must be a number in [0, 1); got {tolerance!r}")
    return float(tolerance)
