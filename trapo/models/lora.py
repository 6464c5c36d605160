"""Low-rank adapters come through peft (extra `lora`): the base is frozen, the adapters are float32, the head is
untouched.

A checkpoint of a run holds the adapter in peft's layout (a few MB); `load_model` takes such a folder for a model, and
finds the base under the name that the run was given. The final model is the base with the adapter merged into it, so
that whatever loads a model loads it, and the adapter beside it in final/adapter.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trapo.errors import TrapoError
from trapo.models import agreement
from trapo.models.sharding import whole
from trapo.settings.groups import LoraConfig

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
    if config.targets is None:
        settings.exclude_modules = _not_adaptable(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(model, settings)
    if model.device.type != "meta":
        _check_merges(model)


def _not_adaptable(model: PreTrainedModel) -> list[str] | None:
    """Returns the names of linear layers that an adapter of the default targets leaves out: those whose forward is no
    product alone (a router), those of state-space layers, whose weights are read past the layer, so that it would do
    nothing, and those that share their weight with another, which have no merged weight in common."""
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    own = [name for name, m in linears.items() if not _is_product(m)]
    state_space = [name.rpartition(".")[0] for name in linears if name.endswith(("dt_proj", "x_proj"))]
    state_space += [name.rpartition(".")[0] for name, m in model.named_modules() if name.endswith("conv1d")]
    past = [f"{parent}.{name}" for parent in dict.fromkeys(state_space) for name in ("out_proj", "conv1d", "dt_proj")]
    users = Counter(id(m.weight) for m in linears.values())
    shared = [name for name, m in linears.items() if users[id(m.weight)] > 1]
    return [*own, *past, *shared] or None


def _is_product(layer: nn.Linear) -> bool:
    """Returns whether a linear layer gives x Wᵀ + b, also where its class has a forward of its own."""
    if type(layer).forward is nn.Linear.forward:
        return True
    x = torch.ones(2, layer.in_features, device=layer.weight.device, dtype=layer.weight.dtype)
    try:
        with torch.no_grad():
            found, expected = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return False
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        return False
    return found.device.type == "meta" or torch.allclose(found, expected, rtol=1e-2, atol=1e-3)


def _check_merges(model: PreTrainedModel) -> None:
    """Raises TrapoError, before anything is trained, where the model could not be written with its adapters merged: an
    untrained one adds zero, so they get other values for as long as that takes."""
    generator = torch.Generator().manual_seed(0)
    own = [p for n, p in model.named_parameters() if ".lora_B." in n]
    before = [p.detach().clone() for p in own]
    with torch.no_grad():
        for p in own:
            p.copy_(0.02 * torch.randn(p.shape, generator=generator))
        try:
            check_merged(model)
        finally:
            for p, value in zip(own, before, strict=True):
                p.copy_(value)


def check_merged(model: PreTrainedModel) -> None:
    """Raises TrapoError where the model with its adapters merged into its weights computes something else. On sharded
    models all ranks must ask."""

    def compare() -> None:
        ids = agreement.probe_ids(model)[0]
        with reaching(model) as reached:
            live = agreement.hidden_states(model, ids)[0]
        with as_merged(model, reached):
            merged = agreement.hidden_states(model, ids)[0]
        low = {p.dtype for p in model.parameters()} | {live.dtype}
        bound = agreement.TOLERANCE["16 bits" if low & {torch.bfloat16, torch.float16} else "float32"]
        error = agreement.difference(merged, live)
        if not error <= bound:
            raise TrapoError(
                f"lora: with its adapters merged, the hidden states of {agreement.name_of(model)} change by "
                f"{error:.2g} of their size, so the merged model would be another one; the adapters themselves are in "
                "the checkpoints"
            )

    agreement.as_probe(model, compare)


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
    model.eval()  # the new modules too: an adapter may come with a dropout
    head = model.get_output_embeddings()
    below = [layer.get_base_layer().get_parameter(_adapted(layer)) for layer in adapted_layers(model)]
    if any(p.requires_grad for p in head.parameters()) or any(p is head.weight for p in below):
        raise TrapoError("lora.targets: the output head cannot have an adapter: the fused loss takes its bare weight")
    if len({id(p) for p in below}) < len(below):
        raise TrapoError("lora.targets: two of the layers share their weight, which two adapters cannot be merged into")


def has_adapter(model: nn.Module) -> bool:
    return any("lora_" in name for name, _ in model.named_parameters())


def merged(model: nn.Module, name: str, weight: torch.Tensor) -> tuple[str, torch.Tensor] | None:
    """Returns a parameter of a model with adapters as that of the model without: its name there and its effective
    value. None for the adapters' own. On sharded models all ranks must ask."""
    plain = plain_name(name)
    if plain is None or plain == name:
        return None if plain is None else (name, weight)
    owner: Any = model.get_submodule(name.split(".base_layer.", 1)[0])
    # Each weight of a module of fused experts has a wrapper of its own around the module.
    while hasattr(owner, "base_layer"):
        if adapts(owner, name.rpartition(".")[2]):
            weight = effective(owner, weight)
        owner = owner.base_layer
    return plain, weight


def adapts(layer: Any, parameter: str) -> bool:
    """Returns whether an adapter is of the parameter of that name of the layer below it."""
    return ADAPTER in layer.lora_A and _adapted(layer) == parameter


def _adapted(layer: Any) -> str:
    """Returns the name of the parameter that an adapted layer adds to."""
    return str(getattr(layer, "parameter_name", "weight"))


def effective(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """Returns a weight with its adapter in it. The layer itself says what it adds: a Conv1D has its weight transposed,
    fused experts have one each. On sharded models all ranks must ask."""
    own = [(n, p) for n, p in layer.named_parameters() if n.startswith("lora_")]
    with torch.no_grad(), _in_place_of(layer, {name: whole(p.detach()) for name, p in own}):
        delta = layer.get_delta_weight(ADAPTER)
    return (weight.float() + delta.float()).to(weight.dtype)


@contextmanager
def _in_place_of(layer: nn.Module, values: dict[str, torch.Tensor]) -> Iterator[None]:
    """Gives parameters of a layer these values."""
    places = [(layer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in values]
    before = [module._parameters[name] for module, name in places]
    for (module, name), value in zip(places, values.values(), strict=True):
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
    try:
        yield
    finally:
        for (module, name), parameter in zip(places, before, strict=True):
            module._parameters[name] = parameter


def adapted_layers(model: nn.Module) -> list[Any]:
    """Returns every layer of peft's that has an adapter."""
    return [m for m in model.modules() if ADAPTER in getattr(m, "lora_A", ()) and hasattr(m, "base_layer")]


@contextmanager
def reaching(model: nn.Module) -> Iterator[set[int]]:
    """Yields the adapted layers, by id, that the forwards within it call."""
    reached: set[int] = set()
    hooks = [m.register_forward_pre_hook(lambda layer, args: reached.add(id(layer))) for m in adapted_layers(model)]
    try:
        yield reached
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def as_merged(model: nn.Module, reached: set[int]) -> Iterator[None]:
    """Makes a context in which the model computes with merged weights and without adapters. The weights are made for
    each layer as it is reached; of those that are not, at once: a model may read a weight past its layer."""
    kept: dict[int, tuple[nn.Module, str, Any]] = {}

    def enter(layer: Any, args: Any = None) -> None:
        base, name = layer.get_base_layer(), _adapted(layer)
        kept[id(layer)] = (base, name, base._parameters[name])
        value = effective(layer, whole(base._parameters[name].detach()))
        base._parameters[name] = nn.Parameter(value, requires_grad=False)
        layer._disable_adapters = True

    def leave(layer: Any, args: Any = None, output: Any = None) -> None:
        base, name, parameter = kept.pop(id(layer))
        base._parameters[name] = parameter
        layer._disable_adapters = False

    layers = adapted_layers(model)
    hooks = [layer.register_forward_pre_hook(enter) for layer in layers if id(layer) in reached]
    hooks += [layer.register_forward_hook(leave, always_call=True) for layer in layers if id(layer) in reached]
    for layer in layers:
        if id(layer) not in reached:
            enter(layer)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            if id(layer) in kept:
                leave(layer)


def plain_name(name: str) -> str | None:
    """Returns a parameter's name in the model without adapters; None for the adapters' own."""
    return None if ".lora_" in name else re.sub(r"(\.base_layer)+\.", ".", name)


def adapter_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Returns the adapter's tensors under peft's names, whole, on the CPU. On sharded models all ranks must ask."""
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
    """Returns the model.path of the base of a saved adapter."""
    return str(json.loads((path / CONFIG_FILE).read_text())["base_model_name_or_path"])


def load_adapter(path: Path, model: PreTrainedModel) -> None:
    """Put a saved adapter into its base model, to be trained on."""
    from safetensors.torch import load_file

    settings = _peft().PeftConfig.from_pretrained(str(path))
    _refuse_unknown(path, settings)
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


def _refuse_unknown(path: Path, settings: Any) -> None:
    """Raises TrapoError for an adapter that is more than low-rank terms of weights: merged, it would lose the rest."""
    plain = {"bias": ("none",)}
    names = (
        "use_dora",
        "modules_to_save",
        "bias",
        "trainable_token_indices",
        "layer_replication",
        "alora_invocation_tokens",
    )
    for name in names:
        value = getattr(settings, name, None)
        if value and value not in plain.get(name, ()):
            raise TrapoError(
                f"model.path: the adapter in {path} has {name}={value}; accepted: LoRA of weights alone, without {name}"
            )
    if str(getattr(settings.peft_type, "value", settings.peft_type)) != "LORA":
        raise TrapoError(f"model.path: the adapter in {path} is {settings.peft_type}; accepted: LORA")


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise TrapoError("lora.rank: adapters need peft; run: pip install 'trapo-kernels[lora]'") from error
    return peft
