"""This adapter makes verl's fused head this package's, by keys of verl's configuration:

    actor_rollout_ref.model.use_fused_kernels=True
    actor_rollout_ref.model.fused_kernel_options.impl_backend=trapo

verl passes over a backend that it does not know in silence. Importing the plugin (verl.py) teaches it this one: verl's
own forward of each family runs, and its `FusedLinearForPPO` is ours in it. Beside verl's: the head's bias, soft-cap
and logit scale are those of the model's configuration, and Σπ² (`calculate_sum_pi_squared`) goes with it, which verl's
fused heads refuse. FSDP engines; other engines have forwards of their own.

Imported by verl.py.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from verl.models.transformers import monkey_patch
from verl.utils import tensordict_utils
from verl.utils.experimental import torch_functional

from ..foreseen import token_outputs

__all__ = ["BACKEND", "FusedLinearForPPO", "use_fused_head"]

BACKEND = "trapo"
SQUARES = "calculate_sum_pi_squared"  # verl's name, in a batch's data and here in the arguments of a forward

_patch_of_verl = monkey_patch.patch_forward_with_backends
_head_of_verl = torch_functional.FusedLinearForPPO


@dataclass
class Asked:
    """Holds what a forward of the model wants of its head beside verl's arguments, and Σπ² once it is there."""

    options: dict[str, Any] = field(default_factory=dict)
    squares: bool = False
    sum_pi_squared: Tensor | None = None


_asked: ContextVar[Asked | None] = ContextVar("trapo_verl_head", default=None)


class FusedLinearForPPO(nn.Module):
    """Does what verl's class of this name does: (log-probabilities, entropies) of the labels, without the logits."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = BACKEND) -> None:
        super().__init__()

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Takes hidden_states [..., D], vocab_weights [V, D] and input_ids [...]."""
        asked = _asked.get() or Asked()
        out = token_outputs(
            hidden_states, vocab_weights, input_ids.long(), temperature=float(temperature), entropy=True,
            statistics=("sum_sq",) if asked.squares else (), **asked.options,
        )  # fmt: skip
        asked.sum_pi_squared = out.statistics.get("sum_sq")
        assert out.entropy is not None
        return out.logprobs, out.entropy


def use_fused_head() -> None:
    """Makes verl's patched forwards (use_fused_kernels, backend "torch") use this package's head from here on, without
    what `impl_backend=trapo` adds."""
    torch_functional.FusedLinearForPPO = FusedLinearForPPO


def _head(chunk_size: int = 512, impl_backend: str = "torch") -> nn.Module:
    """Returns the head of this backend, ours or verl's."""
    kind = FusedLinearForPPO if impl_backend == BACKEND else _head_of_verl
    return kind(chunk_size, impl_backend)


def patch_forward_with_backends(
    model: Any, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
) -> None:
    """Does what verl's function of this name does, for one backend more.

    Raises:
        TypeError: the output head is not a plain `nn.Linear`.
    """
    if not (use_fused_kernels and fused_kernels_backend == BACKEND):
        _patch_of_verl(model, use_fused_kernels=use_fused_kernels, fused_kernels_backend=fused_kernels_backend)
        return
    from .heads import linear_head

    linear_head(model)
    _patch_of_verl(model, use_fused_kernels=True, fused_kernels_backend="torch")
    family: Any = type(model)
    forward_of_verl = family.forward

    @functools.wraps(forward_of_verl)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = Asked(linear_head(self).options, squares=kwargs.pop(SQUARES, False))
        before = _asked.set(asked)
        try:
            outputs = forward_of_verl(self, *args, **kwargs)
        finally:
            _asked.reset(before)
        kind: Any = type(outputs)
        return _with_squares(kind)(**outputs, sum_pi_squared=asked.sum_pi_squared)

    family.forward = forward
    model._verl_fused_kernels_backend = BACKEND
    torch_functional.FusedLinearForPPO = _head
    _teach_engine()


@functools.cache
def _with_squares(kind: Any) -> Any:
    """Returns verl's dataclass of a forward's outputs with a field more: FSDP makes them anew from their fields."""
    return dataclass(type(kind.__name__, (kind,), {"__annotations__": {"sum_pi_squared": Any}, "sum_pi_squared": None}))


@functools.cache
def _teach_engine() -> None:
    """Makes verl's FSDP engine ask for Σπ² and hand it on."""
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead as Engine

    inputs_of_verl, outputs_of_verl = Engine.prepare_model_inputs, Engine.prepare_model_outputs

    def prepare_model_inputs(self: Any, micro_batch: Any) -> Any:
        inputs, given = inputs_of_verl(self, micro_batch)
        if _of(micro_batch, SQUARES) and _of(micro_batch, "use_fused_kernels"):
            inputs[SQUARES] = True
        return inputs, given

    def prepare_model_outputs(self: Any, output: Any, output_args: Any, micro_batch: Any, processor: Any) -> Any:
        squares = getattr(output, "sum_pi_squared", None)
        if squares is None or not _of(micro_batch, SQUARES):
            return outputs_of_verl(self, output, output_args, micro_batch, processor)
        found = outputs_of_verl(self, output, output_args, _but(micro_batch, {SQUARES: False}), processor)
        # It goes the way of the entropies: gathered over ranks, without padding.
        instead = SimpleNamespace(log_probs=output.log_probs, entropy=squares)
        settings = {SQUARES: False, "calculate_entropy": True, "distillation_use_topk": False}
        again = outputs_of_verl(self, instead, output_args, _but(micro_batch, settings), processor)
        return {**found, "sum_pi_squared": again["entropy"]}

    functools.update_wrapper(prepare_model_inputs, inputs_of_verl)
    functools.update_wrapper(prepare_model_outputs, outputs_of_verl)
    Engine.prepare_model_inputs, Engine.prepare_model_outputs = prepare_model_inputs, prepare_model_outputs


def _of(micro_batch: Any, name: str) -> bool:
    return bool(tensordict_utils.get_non_tensor_data(data=micro_batch, key=name, default=False))


def _but(micro_batch: Any, settings: dict[str, Any]) -> Any:
    """Returns the batch with other settings."""
    other = micro_batch.copy()
    for name, value in settings.items():
        tensordict_utils.assign_non_tensor_data(other, name, value)
    return other


monkey_patch.patch_forward_with_backends = patch_forward_with_backends
