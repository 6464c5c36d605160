"""Low-rank adapters through peft (extra `lora`): the base is frozen, the adapters are float32, the head is untouched.

A checkpoint of a run holds the adapter in peft's layout (a few MB); `load_model` takes such a folder for a model, and
finds the base under the name that the run was given. The final model is the base with the adapter merged into it, so
that whatever loads a model loads it, and the adapter beside it in final/adapter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trapo.config import LoraConfig
from trapo.errors import TrapoError
from trapo.sharding import whole

ADAPTER = "default"  # peft's name for the only one
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def attach(model: PreTrainedModel, config: LoraConfig, *, base: str, seed: int) -> None:
    """Freeze the model and put untrained adapters in; nothing where rank is 0 or it has some. base: its model.path."""
    if config.rank == 0 or has_adapter(model):
        return
    peft = _peft()
    targets = config.targets or "all-linear"  # which leaves the head out
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=config.rank, lora_alpha=config.alpha, target_modules=targets, lora_dropout=0.0
    )
    settings.base_model_name_or_path = base
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(model, settings)


def _inject(model: PreTrainedModel, settings: Any) -> None:
    model.requires_grad_(False)
    device = model.device
    try:
        # Initialised on the CPU, in float32, whatever the base is on and in.
        _peft().inject_adapter_in_model(settings, model, ADAPTER)
    except ValueError as error:
        raise TrapoError(f"lora.targets: {str(error).splitlines()[0]}") from error
    for name, parameter in model.named_parameters():
        adapter = "lora_" in name
        parameter.requires_grad_(adapter)
        if adapter:
            parameter.data = parameter.data.to(device, torch.float32)
    head = model.get_output_embeddings()
    if any(p.requires_grad for p in head.parameters()):
        raise TrapoError("lora.targets: the output head cannot have an adapter: the fused loss takes its bare weight")


def has_adapter(model: nn.Module) -> bool:
    return any("lora_" in name for name, _ in model.named_parameters())


def merged(model: nn.Module, name: str, weight: torch.Tensor) -> tuple[str, torch.Tensor] | None:
    """A parameter of a model with adapters as that of the model without: its name there and its effective value. None
    for the adapters' own. On sharded models all ranks must ask."""
    plain = plain_name(name)
    if plain is None or plain == name:
        return None if plain is None else (name, weight)
    owner: Any = model.get_submodule(name.rsplit(".base_layer.", 1)[0])
    if name.endswith(".weight"):
        down, up = (whole(part[ADAPTER].weight.detach()) for part in (owner.lora_A, owner.lora_B))
        weight = (weight.float() + owner.scaling[ADAPTER] * (up @ down)).to(weight.dtype)
    return plain, weight


def plain_name(name: str) -> str | None:
    """A parameter's name in the model without adapters; None for the adapters' own."""
    return None if ".lora_" in name else name.replace(".base_layer.", ".")


def adapter_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The adapter's tensors under peft's names, whole, on the CPU. On sharded models all ranks must ask."""
    own = {n: whole(p.detach()).cpu() for n, p in model.named_parameters() if ".lora_" in n}
    return {f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": value for name, value in own.items()}


def save_adapter(path: Path, model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    """Write `adapter_weights` in peft's layout."""
    from safetensors.torch import save_file

    path.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, path / WEIGHTS_FILE)
    model.peft_config[ADAPTER].save_pretrained(str(path))


def is_adapter(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file()


def base_of(path: Path) -> str:
    """The model.path of the base of a saved adapter."""
    return str(json.loads((path / CONFIG_FILE).read_text())["base_model_name_or_path"])


def load_adapter(path: Path, model: PreTrainedModel) -> None:
    """Put a saved adapter into its base model, to be trained on."""
    from safetensors.torch import load_file

    settings = _peft().LoraConfig.from_pretrained(str(path))
    settings.inference_mode = False
    _inject(model, settings)
    weights = load_file(path / WEIGHTS_FILE)
    own = adapter_weights(model)
    if own.keys() != weights.keys():
        raise TrapoError(f"model.path: the adapter in {path} is not one of its base model {base_of(path)!r}")
    by_name = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    with torch.no_grad():
        for name, parameter in zip(own, by_name.values(), strict=True):
            parameter.copy_(weights[name])


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise TrapoError("lora.rank: adapters need peft; run: pip install 'trapo-kernels[lora]'") from error
    return peft
