"""Gradient checkpointing saves memory: activations of layers are computed again in the backward instead of kept."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from trapo.errors import TrapoError


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Raises TrapoError for a family without gradient checkpointing."""
    # Its name before transformers 5.23.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable()
    except ValueError as error:
        raise TrapoError(
            f"model.gradient_checkpointing: model type {model.config.model_type} ({type(model).__name__}) has none; "
            "accepted for this family: false"
        ) from error


def prepare_checkpointing(model: PreTrainedModel) -> None:
    """Has the layers checkpointed, which transformers does in training mode alone, and nothing else of that mode: only
    the layers themselves are in it, not what is in them, and no dropout is left anywhere."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _without_dropout(module)
    model.eval()
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    # The decoder has such a flag too, and skips whole layers in training mode (layerdrop): it is not in it, unless it
    # is the only one.
    repeated = [m for m in layers if isinstance(m, GradientCheckpointingLayer)]
    configs: dict[int, Any] = {}
    for module in repeated or layers:
        module.training = True
        # Falcon's layers read their rate from the configuration, which goes into checkpoints as it is.
        if (config := getattr(module, "config", None)) is not None:
            if id(config) not in configs:
                configs[id(config)] = _without_dropout(copy.deepcopy(config))
            module.config = configs[id(config)]


def _without_dropout(holder: Any) -> Any:
    """Returns the settings with every rate at 0, whatever a family calls it (resid_pdrop, layerdrop); BLOOM has modules
    there."""
    for name, value in list(vars(holder).items()):
        if "drop" in name and isinstance(value, float):
            setattr(holder, name, 0.0)
    return holder
