"""This file checks arguments. Each error is one line: the function, the argument, what it accepts, what it got.

Checks of values read tensors on the CPU only: on an accelerator they would stall the stream, and the device's own
index assertion, or a NaN, reports a target out of range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..head import Head
from ..objective import Objective
from ..tokens import Sequences
from .graph import can_look, refuse_in_graph, tracing
from .scalars import filled, number, shown

__all__ = [
    "check_flag",
    "check_head",
    "check_ids",
    "check_linear",
    "check_logits",
    "check_of_ids",
    "check_reference",
    "check_targets",
    "divisor",
]
__all__ += ["check_sequence_ids", "check_token_inputs", "refuse_batched", "sequences", "under_autocast"]
__all__ += ["one_dtype", "weight_grad"]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_head(caller: str, **options: Any) -> Head:
    try:
        return Head(**options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{caller}: {error}") from None


def _tensor(caller: str, name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{caller}: {name} must be a tensor; got {type(value).__name__}")
    if not tracing() and (value.layout != torch.strided or value.is_nested):
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{caller}: {name} must be a dense tensor; got a {kind} one")
    return value


def check_flag(caller: str, name: str, value: Any) -> None:
    """Checks that a value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{caller}: {name} must be True or False; got {shown(value)}")


def under_autocast(hidden: Any, *of_head: Any) -> tuple[Any, ...]:
    """Returns hidden states, and the weight and bias of a head, as torch.autocast asks for on their device where their
    dtypes differ: float64 stays, and so does what is of one dtype, as its caller chose it.

    A float32 weight or bias beside 16-bit hidden states stays as it is: the loss rounds it to their dtype itself, so
    that its gradient comes from the fp32 sums and is never rounded.
    """
    if len({t.dtype for t in (hidden, *of_head) if isinstance(t, Tensor)}) < 2:
        return hidden, *of_head
    hidden = _cast(hidden)
    return hidden, *(t if _is_master(t, hidden) else _cast(t) for t in of_head)


def one_dtype(hidden: Any, *of_head: Any) -> tuple[Any, ...]:
    """Returns the same with a head in the dtype of the hidden states; gradients come back in the parameters' own."""
    hidden, *of_head = under_autocast(hidden, *of_head)  # type: ignore[assignment]
    return hidden, *(t.to(hidden.dtype) if _is_master(t, hidden) else t for t in of_head)


def _is_master(value: Any, hidden: Any) -> bool:
    """Returns whether this is a float32 parameter of 16-bit products."""
    if not isinstance(value, Tensor) or not isinstance(hidden, Tensor):
        return False
    return value.dtype == torch.float32 and hidden.dtype in (torch.float16, torch.bfloat16)


def _cast(tensor: Any) -> Any:
    if not isinstance(tensor, Tensor):
        return tensor
    kind = tensor.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return tensor
    eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(kind)) if eligible else tensor


def refuse_batched(caller: str, *incoming: Tensor | None) -> None:
    """Refuses a batch of gradients: a backward is for one at a time."""
    # By name: is_grads_batched has a key of its own, which Python does not know.
    if any(g is not None and "Batched" in str(torch._C._dispatch_keys(g)) for g in incoming):
        raise RuntimeError(
            f"{caller}: is_grads_batched must be False, a streamed loss takes one gradient; use backend='reference'"
        )


def refuse_mapped(caller: str, inputs: Mapping[str, Any]) -> None:
    """Refuses torch.func.vmap, since which tokens take part is read before anything is computed."""
    if tracing():
        return
    for name, value in inputs.items():
        if isinstance(value, Tensor) and torch._C._functorch.is_batchedtensor(value):
            raise RuntimeError(
                f"{caller}: {name} must not be mapped by torch.func.vmap; give it [B, T] tokens at once in its place"
            )


def _float_tensor(caller: str, name: str, value: Any) -> None:
    if _tensor(caller, name, value).dtype not in _FLOATS:
        raise TypeError(f"{caller}: {name} must be float16, bfloat16, float32 or float64; got {_dtype(value)}")


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _same(caller: str, name: str, value: Tensor, like_name: str, like: Tensor, dtype: bool = True) -> None:
    """Checks that a tensor is on the device, and of the dtype, of another argument."""
    if dtype and value.dtype != like.dtype:
        raise TypeError(
            f"{caller}: {name} must have the dtype of {like_name}; got {_dtype(value)} with {_dtype(like)} {like_name}"
        )
    if value.device != like.device:
        raise ValueError(f"{caller}: {name} must be on the device of {like_name}, {like.device}; got {value.device}")


def check_linear(caller: str, hidden: Any, weight: Any, bias: Any, sharded: bool = False, prefix: str = "") -> None:
    """Checks hidden [..., D], weight [V, D], bias [V] or None: on one device, and of one dtype unless the hidden states
    have 16 bits and the parameters 32. A shard may have no rows."""
    h, w, b = (f"{prefix}{name}" for name in ("hidden", "weight", "bias"))
    for name, value in ((h, hidden), (w, weight)):
        _float_tensor(caller, name, value)
    if hidden.ndim < 1 or hidden.shape[-1] < 1:
        raise ValueError(f"{caller}: {h} must be [..., D] with D >= 1; got {list(hidden.shape)}")
    if weight.ndim != 2 or (weight.shape[0] < 1 and not sharded) or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{caller}: {w} must be [V, D] with V >= 1 and D={hidden.shape[-1]} as in {h}; got {list(weight.shape)}"
        )
    _same(caller, w, weight, h, hidden, dtype=not _is_master(weight, hidden))
    if bias is not None:
        _float_tensor(caller, b, bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{caller}: {b} must be [V] with V={weight.shape[0]}; got {list(bias.shape)}")
        _same(caller, b, bias, h, hidden, dtype=not _is_master(bias, hidden))


def weight_grad(caller: str, value: Any, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Checks a dense tensor like weight, of the accumulators' dtype, which others may add to as well; or None."""
    if value is None:
        return None
    refuse_in_graph(caller, "weight_grad", value)
    if _tensor(caller, "weight_grad", value).shape != weight.shape or value.dtype != dtype:
        wanted = f"{str(dtype).removeprefix('torch.')} {list(weight.shape)} as weight"
        raise ValueError(f"{caller}: weight_grad must be {wanted}; got {_dtype(value)} {list(value.shape)}")
    if not value.is_contiguous() or value.requires_grad:
        got = "one that requires grad" if value.requires_grad else f"strides {list(value.stride())}"
        raise ValueError(f"{caller}: weight_grad must be contiguous and require no grad; got {got}")
    _same(caller, "weight_grad", value, "weight", weight, dtype=False)
    return value


def check_reference(caller: str, ref: tuple[Any, Any, Any], targets: Tensor, needed: bool, vocab: int) -> None:
    """Checks ref_hidden [..., D'], ref_weight [V, D'] and ref_bias [V] or None of a reference head, where needed or
    given."""
    for name, value in zip(("ref_hidden", "ref_weight"), ref[:2], strict=True):
        if value is None and needed:
            raise ValueError(f"{caller}: {name} must be a tensor, which expert='asft' needs; got None")
    if ref[0] is None or ref[1] is None:
        return
    check_linear(caller, *ref, prefix="ref_")
    if ref[0].shape[:-1] != targets.shape:
        got = list(ref[0].shape)
        raise ValueError(f"{caller}: ref_hidden must be [..., D'] with {list(targets.shape)} tokens; got {got}")
    if ref[1].shape[0] != vocab:
        raise ValueError(f"{caller}: ref_weight must have V={vocab} rows as weight; got {ref[1].shape[0]}")
    _same(caller, "ref_hidden", ref[0], "targets", targets, dtype=False)


def check_logits(caller: str, logits: Any, name: str = "logits") -> None:
    """Checks logits [..., V]."""
    _float_tensor(caller, name, logits)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{caller}: {name} must be [..., V] with V >= 1; got {list(logits.shape)}")


def check_targets(caller: str, targets: Any, like_name: str, like: Tensor) -> None:
    """Checks int64 targets of the shape of `like` without its last dimension."""
    if _tensor(caller, "targets", targets).dtype != torch.int64:
        raise TypeError(f"{caller}: targets must be int64; got {_dtype(targets)}")
    if targets.shape != like.shape[:-1]:
        raise ValueError(
            f"{caller}: targets must be {list(like.shape[:-1])}, as {like_name} without its last dimension; "
            f"got {list(targets.shape)}"
        )
    _same(caller, "targets", targets, like_name, like, dtype=False)


def check_ids(caller: str, ids: Any, hidden: Tensor, vocab: int | None) -> None:
    """Checks int64 ids [..., K] in [0, V), or -1 for none; `vocab` None: they are looked at later."""
    if _tensor(caller, "ids", ids).dtype != torch.int64:
        raise TypeError(f"{caller}: ids must be int64; got {_dtype(ids)}")
    if ids.ndim != hidden.ndim or ids.shape[:-1] != hidden.shape[:-1]:
        tokens = ", ".join(map(str, [*hidden.shape[:-1], "K"]))
        raise ValueError(f"{caller}: ids must be [{tokens}] for the tokens of hidden; got {list(ids.shape)}")
    _same(caller, "ids", ids, "hidden", hidden, dtype=False)
    if vocab is not None and can_look(ids) and ids.numel():
        least, most = ids.min(), ids.max()
        if least < -1 or most >= vocab:
            end, worst = ("max", most) if most >= vocab else ("min", least)
            raise ValueError(
                f"{caller}: ids must be int64 in [0, V) or -1 for none; got {end} {int(worst)} with V={vocab}"
            )


def check_of_ids(caller: str, name: str, value: Any, ids: Tensor) -> None:
    """Checks numbers of the shape of ids [..., K]."""
    _float_tensor(caller, name, value)
    _same(caller, name, value, "ids", ids, dtype=False)
    if value.shape != ids.shape:
        raise ValueError(f"{caller}: {name} must be {list(ids.shape)} as ids; got {list(value.shape)}")


def check_logprobs(caller: str, logprobs: Any, entropy: Any) -> None:
    """Checks logprobs [...], and entropy of its shape or None."""
    _float_tensor(caller, "logprobs", logprobs)
    if entropy is None:
        return
    _float_tensor(caller, "entropy", entropy)
    if entropy.shape != logprobs.shape:
        raise ValueError(f"{caller}: entropy must be {list(logprobs.shape)} as logprobs; got {list(entropy.shape)}")
    _same(caller, "entropy", entropy, "logprobs", logprobs, dtype=False)


def check_reads_logprobs(caller: str, objective: Objective, entropy: Tensor | None) -> None:
    """Checks that the objective is a function of log-probabilities, and of entropies where those are given."""
    more = {
        "a reference head": objective.reference_head,
        "target logits": objective.reads_logit,
        "statistics of a row": bool(objective.statistics),
    }
    wanted = [what for what, needed in more.items() if needed]
    if wanted:
        raise ValueError(
            f"{caller}: objective must read log-probabilities and entropies of tokens alone; got one that reads "
            + " and ".join(wanted)
        )
    if entropy is None and objective.reads_entropy:
        raise ValueError(f"{caller}: entropy must be a tensor, which {objective.reads_entropy} needs; got None")


def check_range(caller: str, targets: Tensor, active: Tensor, vocab: int, ignore_index: int) -> None:
    """Checks that active targets lie in [0, V)."""
    if not can_look(targets):
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
    """Checks per-token inputs of the shape of targets; advantages and policy_weights may also be one per sequence,
    which is broadcast here. Masks may be 0 and 1 of any integer dtype."""
    refuse_mapped(caller, {like: targets, **floats, **masks})
    out: dict[str, Tensor | None] = {}
    shape = targets.shape
    for name, value in {**floats, **masks}.items():
        if value is None:
            out[name] = None
            continue
        if name in masks:
            value = _mask(caller, name, value)
        if name in floats:
            _float_tensor(caller, name, value)
        _same(caller, name, value, like, targets, dtype=False)
        by_sequence = name in ("advantages", "policy_weights") and len(shape) > 0
        if by_sequence and value.shape == shape[:-1]:
            value = value[..., None]
        if value.shape != shape and not (by_sequence and value.shape == (*shape[:-1], 1)):
            also = f" or one per sequence, {list(shape[:-1])}" if by_sequence else ""
            why = f" ({like} [N] are one sequence)" if by_sequence and len(shape) == 1 else ""
            raise ValueError(f"{caller}: {name} must be {list(shape)} as {like}{also}; got {list(value.shape)}{why}")
        out[name] = value.detach().expand(shape)
    return {name: out[name] for name in floats}, {name: out[name] for name in masks}


def policy_weights(caller: str, values: Tensor, own: Tensor) -> Tensor:
    """Returns the weights of the policy term [n], at least 0 at `own` tokens [n]: the clip goes by the sign of the
    advantage alone, and kernels take the two as one. Where values cannot be looked at, a weight below 0 becomes NaN,
    and so the loss."""
    if not can_look(values):
        return values.masked_fill(values < 0, torch.nan)
    wrong = own & (values < 0)
    if wrong.any():
        least = values[wrong].min().item()
        raise ValueError(f"{caller}: policy_weights must be at least 0 at own tokens; got min {least:g}")
    return values


def _mask(caller: str, name: str, value: Any) -> Tensor:
    if _tensor(caller, name, value).dtype == torch.bool:
        return value
    if value.dtype not in _INTEGERS:
        raise TypeError(f"{caller}: {name} must be bool; got {_dtype(value)} (0 and 1 of an integer dtype do as well)")
    if can_look(value):
        other = value[(value != 0) & (value != 1)]
        if other.numel():
            raise ValueError(f"{caller}: {name} must be bool, or 0 and 1; got {int(other[0])}")
    return value != 0


def check_sequence_ids(caller: str, targets: Tensor, sequence_ids: Any, like: str = "targets") -> None:
    """Checks that ids are int64 of the shape of targets, or None."""
    if sequence_ids is None:
        return
    if _tensor(caller, "sequence_ids", sequence_ids).dtype != torch.int64:
        raise TypeError(f"{caller}: sequence_ids must be int64; got {_dtype(sequence_ids)}")
    _same(caller, "sequence_ids", sequence_ids, like, targets, dtype=False)
    if sequence_ids.shape != targets.shape:
        raise ValueError(
            f"{caller}: sequence_ids must be {list(targets.shape)} as {like}; got {list(sequence_ids.shape)}"
        )


def sequences(caller: str, targets: Tensor, sequence_ids: Tensor | None, like: str = "targets") -> Sequences:
    """Returns which sequence each token belongs to: the last dimension of targets, or what `sequence_ids` say."""
    if sequence_ids is not None:
        return Sequences.of(sequence_ids.reshape(-1))
    if targets.ndim < 2:
        raise ValueError(
            f"{caller}: {like} must be [B, T] or sequence_ids given, for an objective that reads sequences; "
            f"got {list(targets.shape)}"
        )
    return Sequences.of_rows(math.prod(targets.shape[:-1]), targets.shape[-1], targets.device)


def divisor(caller: str, name: str, normalizer: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns what a sum of token losses is divided by (0-dim), a constant; `name` is the argument that gives it. A
    tensor may be a count of 0, of a batch without a token, which counts as 1; it is looked at on the CPU, and elsewhere
    the device asserts that it is in range.
    """
    accepted = "a number above 0 or a 0-dim tensor"
    if not isinstance(normalizer, Tensor):
        found = _finite(number(normalizer))
        if found is None or not 0 < found < math.inf:
            raise ValueError(f"{caller}: {name} must be {accepted}; got {shown(normalizer)}")
        return filled(found, dtype, device)
    if normalizer.ndim != 0 or normalizer.is_complex():
        kind = f"shape {list(normalizer.shape)}" if normalizer.ndim else _dtype(normalizer)
        raise ValueError(f"{caller}: {name} must be {accepted}; got {kind}")
    value = filled(normalizer.detach(), dtype, device)
    inside = (value >= 0) & (value < math.inf)
    if not can_look(normalizer):
        torch._assert_async(inside, f"{caller}: {name} must be {accepted}, finite and not negative")
    elif not inside:
        raise ValueError(f"{caller}: {name} must be {accepted}; got {normalizer.item()!r}")
    return value.masked_fill(value == 0, 1)


def _finite(value: Any) -> Any:
    """Returns the number, or None where a float cannot hold it."""
    try:
        return None if value is None else value * 1.0
    except OverflowError:
        return None


def check_grad_tolerance(caller: str, tolerance: Any) -> float:
    """Returns a number in [0, 1)."""
    found = number(tolerance)
    if found is None or not 0 <= found < 1:
        raise ValueError(f"{caller}: grad_tolerance must be a number in [0, 1); got {shown(tolerance)}")
    return float(found)
