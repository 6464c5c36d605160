"""This file gives the weights of a model as everyone else knows them: gathered from shards, adapters merged, under the
usual names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trapo.errors import TrapoError
from trapo.models import lora
from trapo.models.sharding import is_sharded, whole
from trapo.models.weight_file import stored, write_weights

Writer = Callable[[Path], None]


def full_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, value) of every weight of the model that `model` amounts to, one at a time; a tied head comes once,
    under the embedding's name. Detached; a weight that is neither sharded nor adapted is the model's own memory.

    On a sharded model all ranks must go through it together, and each gets every weight. Raises TrapoError before the
    first where the model computes something else with its adapters merged.
    """
    if lora.has_adapter(model):
        lora.check_merged(cast(PreTrainedModel, model))
    for name, value in stored(model):
        found = lora.merged(model, name, whole(value))
        if found is not None:
            yield found


def writer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, final: bool, scratch: Path | None = None
) -> Writer:
    """Returns what writes the model into a folder, in transformers' layout: with adapters, `final` writes the merged
    model and the adapter in adapter/, else the adapter alone.

    All ranks of a sharded model must ask for it; the one that has a scratch file uses it. scratch: a path where that
    folder will be, for the weights of a sharded model until then. Raises OSError where it cannot be written.
    """
    adapter = lora.adapter_weights(model) if lora.has_adapter(model) else None
    if adapter is not None and not final:
        return lambda path: _write(path, tokenizer, lambda: lora.save_adapter(path, model, adapter))
    save = _saver(model, scratch)

    def write(path: Path) -> None:
        _write(path, tokenizer, lambda: save(path))
        if adapter is not None:
            lora.save_adapter(path / "adapter", model, adapter)

    return write


def _saver(model: PreTrainedModel, scratch: Path | None) -> Writer:
    """Returns what writes weights and configuration."""
    if not is_sharded(model):
        if not lora.has_adapter(model):
            return model.save_pretrained
        weights = {name: value.cpu() for name, value in full_weights(model)}
        return lambda path: _plain(model).save_pretrained(path, state_dict=weights)
    plain = _plain(model)
    if is_stored_as_it_is(plain):
        write_weights(model, scratch)
        return lambda path: _move_in(path, plain, scratch)
    # Families whose files hold other tensors than the model (experts one by one) are written by transformers alone.
    gathered = {name: value.cpu() for name, value in full_weights(model) if scratch is not None}
    return lambda path: plain.save_pretrained(path, state_dict=gathered)


def is_stored_as_it_is(plain: PreTrainedModel) -> bool:
    """Returns whether transformers writes a model's weights under their own names and in their own shapes. plain: a
    model on the meta device."""
    from transformers.core_model_loading import revert_weight_conversion

    own = {name: value.detach() for name, value in plain.named_parameters()}
    try:
        found = revert_weight_conversion(plain, dict(own))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return False
    return {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in own.items()}


def _move_in(path: Path, plain: PreTrainedModel, scratch: Path | None) -> None:
    """Writes the configuration, and moves the weights to it."""
    assert scratch is not None
    # A state_dict of one number makes transformers write everything but the weights.
    plain.save_pretrained(path, state_dict={"none": torch.zeros(1)})
    scratch.replace(path / "model.safetensors")


def _write(path: Path, tokenizer: PreTrainedTokenizerBase, save: Callable[[], None]) -> None:
    save()
    tokenizer.save_pretrained(path)


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a model of the same configuration without shards, adapters or memory. Raises TrapoError where it would
    have other weights."""
    kind: Any = next(k for k in type(model).__mro__ if not k.__name__.startswith("FSDP"))  # FSDP2's are derived
    buffers = {name for name, _ in model.named_buffers()}
    weights = {str(lora.plain_name(name)): value for name, value in stored(model) if name not in buffers}
    with torch.device("meta"):
        plain = kind._from_config(model.config, dtype=next(iter(weights.values())).dtype)
    if wrong := sorted({name for name, _ in plain.named_parameters()} ^ weights.keys()):
        raise TrapoError(f"the model's weights are not those of {type(plain).__name__}: {wrong[0]}")
    plain.generation_config = model.generation_config
    return plain
