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

Writer = Callable[[Path], None]


def full_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, value) of every weight of the model that `model` amounts to, one at a time; a tied head comes once,
    under the embedding's name. Detached; a weight that is neither sharded nor adapted is the model's own memory.

    On a sharded model all ranks must go through it together, and each gets every weight. Raises TrapoError before the
    first where the model computes something else with its adapters merged.
    """
    if lora.has_adapter(model):
        lora.check_merged(cast(PreTrainedModel, model))
    stored = model.state_dict().keys()
    buffers = ((name, value) for name, value in model.named_buffers() if name in stored)
    for name, value in [*model.named_parameters(), *buffers]:
        if ".lora_" in name:  # part of the weight it adapts
            continue
        found = lora.merged(model, name, whole(value.detach()))
        if found is not None:
            yield found


def writer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, final: bool, keep: bool = True) -> Writer:
    """Returns what writes the model into a folder, in transformers' layout: with adapters, `final` writes the merged
    model and the adapter in adapter/, else the adapter alone.

    All ranks must ask for it; the first one uses it. keep=False: the caller will not, and needs no copy.
    """
    if not lora.has_adapter(model):
        if not is_sharded(model):
            return lambda path: _write(path, tokenizer, lambda: model.save_pretrained(path))
        weights = _gathered(model, keep)
        return lambda path: _write(path, tokenizer, lambda: _save(path, model, weights))
    adapter = lora.adapter_weights(model)
    if not final:
        return lambda path: _write(path, tokenizer, lambda: lora.save_adapter(path, model, adapter))
    weights = _gathered(model, keep)

    def write(path: Path) -> None:
        _write(path, tokenizer, lambda: _save(path, model, weights))
        lora.save_adapter(path / "adapter", model, adapter)

    return write


def _gathered(model: PreTrainedModel, keep: bool) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for name, value in full_weights(model):
        if keep:
            weights[name] = value.cpu()
    return weights


def _write(path: Path, tokenizer: PreTrainedTokenizerBase, save: Callable[[], None]) -> None:
    save()
    tokenizer.save_pretrained(path)


def _named(model: nn.Module, weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Returns the weights that are no buffers of the model."""
    buffers = {name for name, _ in model.named_buffers()}
    return ((name, value) for name, value in weights.items() if name not in buffers)


def _save(path: Path, model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    """Saves the weights through a plain model of the same configuration, without shards or adapters."""
    kind: Any = next(k for k in type(model).__mro__ if not k.__name__.startswith("FSDP"))  # FSDP2's are derived
    with torch.device("meta"):
        plain = kind._from_config(model.config, dtype=next(iter(weights.values())).dtype)
    names = {name for name, _ in plain.named_parameters()}
    if wrong := sorted(names ^ {name for name, _ in _named(plain, weights)}):
        raise TrapoError(f"the model's weights are not those of {type(plain).__name__}: {wrong[0]}")
    plain.generation_config = model.generation_config
    plain.save_pretrained(path, state_dict=weights)
