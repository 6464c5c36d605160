"""This file finds what a machine has of the fastest way to train: vLLM, flash attention, bfloat16.

The presets for GPUs ask so. What is not here is said in one line, with what runs in its place.
"""

from __future__ import annotations

import importlib.util

from trapo.models.loading import device_of
from trapo.models.precision import resolve
from trapo.settings.groups import ModelConfig, RolloutConfig

FLASH = "flash_attention_2"


def settle(model: ModelConfig, rollout: RolloutConfig, precision: str) -> str | None:
    """Writes into both groups what `rollout.engine=auto` and `model.attention=fastest` are on this machine; returns the
    line that says what is slower than it could be. precision: as train.precision."""
    device = device_of(model.device)
    on_gpu = device.type == "cuda"
    slower = []
    if rollout.engine == "auto":
        reason = None if on_gpu else "no GPU"
        reason = reason or _lacking("vllm", "vLLM", "pip install vllm")
        rollout.engine = "hf" if reason else "vllm"
        if reason:
            rollout.dtype, rollout.engine_args = None, {}  # vLLM's alone
            slower.append(f"rollout.engine=hf in place of vllm ({reason})")
    if model.attention == "fastest":
        in_16_bits = resolve(precision, device) != "float32"
        reason = None if on_gpu else "no GPU"
        reason = reason or (None if in_16_bits else "train.precision is float32")
        reason = reason or _lacking("flash_attn", "flash-attn", "pip install --no-build-isolation flash-attn")
        model.attention = "auto" if reason else FLASH
        if reason:
            slower.append(f"model.attention=auto in place of {FLASH} ({reason})")
        if not on_gpu and precision == "auto":
            slower.append("train.precision=float32 in place of bfloat16 (no GPU)")
    return f"slower than on a GPU with everything: {'; '.join(slower)}" if slower else None


def _lacking(module: str, name: str, command: str) -> str | None:
    return None if importlib.util.find_spec(module) else f"{name} is not installed: {command}"
