"""FSDP2 shards the model: each rank keeps a part of every weight, gradient and optimizer state; and their checkpoints
(DCP).

A unit is a decoder layer; embedding, last norm and head are the root's. A unit's weights are gathered for its forward
and again for its backward; the root's stay from the forward to the backward, so the fused loss has the whole head.
Gradients are added up over ranks, never averaged: every loss is already divided by the global normalizer.

With train.precision=bfloat16 weights are gathered and computed with in bfloat16, gradients reduced in float32, and the
shards, which the optimizer works on, stay float32.

The functions take unsharded models too and do nothing to them, without importing torch.distributed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from trapo.runs.ranks import Ranks

T = TypeVar("T")
SHARDS = "shards"  # folder in a checkpoint: trained weights and optimizer state by parameter name, for any world size
HALF_SHARDS = f".tmp-step-{SHARDS}"  # its name until then


def shard(
    model: PreTrainedModel,
    mesh: Any,
    precision: str,
    before: Callable[[nn.Module], None] = lambda unit: None,
    after: Callable[[nn.Module], None] = lambda unit: None,
) -> None:
    """Shard a model in place over a one-dimensional DeviceMesh. precision: float32 or bfloat16. before, after: are
    called with each unit before and after it is sharded."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    low = None if precision == "float32" else getattr(torch, precision)
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32 if low else None)
    for unit in [*decoder_layers(model), model]:
        before(unit)
        fully_shard(unit, mesh=mesh, mp_policy=policy)
        after(unit)
    for unit in _units(model):
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def shard_over(
    model: PreTrainedModel,
    ranks: Ranks,
    precision: str,
    device: torch.device,
    before: Callable[[nn.Module], None],
    after: Callable[[nn.Module], None],
) -> None:
    """Calls `shard` over all ranks of a run of several."""
    from torch.distributed.device_mesh import init_device_mesh

    shard(model, init_device_mesh(device.type, (ranks.world,)), precision, before, after)
    # The model must be the first of its units that FSDP2 sees running, or a layer takes itself for the root. It does so
    # here, without a forward, which would gather embedding and head on every rank.
    model._get_fsdp_state()._lazy_init()  # type: ignore[operator]


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the repeated blocks of a decoder."""
    names = set(model._no_split_modules or ())
    # FSDP2 gives a module a class of its own, derived from the one that has the name.
    return [m for m in model.modules() if any(kind.__name__ in names for kind in type(m).__mro__)]


def is_sharded(model: nn.Module) -> bool:
    return hasattr(model, "set_gradient_divide_factor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor with the parts of all ranks; all must ask for it."""
    full = getattr(tensor, "full_tensor", None)
    return full() if full else tensor


def as_forward(model: PreTrainedModel, function: Callable[[], T]) -> T:
    """Returns function(), called as if it were the model's forward: the root's weights are whole in it and for its
    backward."""
    if not is_sharded(model):
        return function()
    if not hasattr(model, "trapo_forward"):
        from torch.distributed.fsdp import register_fsdp_forward_method

        model.trapo_forward = _call  # type: ignore[assignment]
        register_fsdp_forward_method(model, "trapo_forward")
    return model.trapo_forward(function)  # type: ignore[operator]


def reshard(model: nn.Module | None) -> None:
    """Makes shards again of the root's weights, which a forward without a backward leaves whole."""
    if model is not None and is_sharded(model):
        model.reshard()  # type: ignore[operator]


def _call(function: Callable[[], T]) -> T:
    return function()


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Makes all weights whole on all ranks, so that each can run as many forwards as it likes by itself."""
    units = _units(model) if is_sharded(model) else []
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not model, recurse=False)


def _units(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if is_sharded(module)]


Optimizers = Mapping[str, torch.optim.Optimizer]  # by the region of tokens whose gradients they step by


def save_shards(folder: Path, model: PreTrainedModel, optimizers: Optimizers, ranks: Ranks) -> Path | None:
    """Write trained weights and optimizer state from all ranks; returns the temporary folder, which is to be moved into
    the checkpoint. None for a model that is not sharded: its state is in the checkpoint's own file. Raises on all ranks
    what one of them could not write."""
    if not is_sharded(model):
        return None
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    path = folder / HALF_SHARDS
    if ranks.first:
        shutil.rmtree(path, ignore_errors=True)
    ranks.barrier()
    try:
        dcp.save(_state(model, optimizers), checkpoint_id=path)
    except CheckpointException as error:  # no Exception, and its first line says only on which ranks
        raise next(iter(error.failures.values()))[0] from error
    return path


def load_shards(path: Path, model: PreTrainedModel, optimizers: Optimizers) -> None:
    """Loads what `save_shards` wrote, on however many ranks, into a model that is sharded over as many as there are
    now."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

    state = _state(model, optimizers)
    dcp.load(state, checkpoint_id=path, no_dist=not is_sharded(model))
    set_model_state_dict(model, state["model"], options=_options())
    for name, optimizer in optimizers.items():
        set_optimizer_state_dict(model, optimizer, state[_PLACES[name]], options=_options())


_PLACES = {"own": "optimizer", "expert": "expert_optimizer"}  # in a checkpoint


def _state(model: PreTrainedModel, optimizers: Optimizers) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    found: dict[str, Any] = {"model": get_model_state_dict(model, options=_options())}
    for name, optimizer in optimizers.items():
        found[_PLACES[name]] = get_optimizer_state_dict(model, optimizer, options=_options())
    return found


def _options() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(ignore_frozen_params=True, strict=False)


def scatter_optimizer_state(state: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """Returns the state_dict of an optimizer over whole parameters, for one over `parameters`, the same ones
    sharded."""
    from torch.distributed.tensor import distribute_tensor

    def scatter(value: Any, parameter: Any) -> Any:
        if not torch.is_tensor(value) or value.shape != parameter.shape:
            return value
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    return {
        **state,
        "state": {
            i: {key: scatter(value, parameters[i]) for key, value in values.items()}
            for i, values in state["state"].items()
        },
    }
