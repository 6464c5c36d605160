"""The base models of the study: made once, kept beside the results, so that every run starts from the same weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from study.loop import score_model
from study.model import new_model
from study.pretrain import measure_base, pretrain
from study.results import Results
from study.settings import Settings
from study.task import Task


def base_path(results: Path, task: str, seed: int = 0) -> Path:
    """Returns where the base model of this name is; the first seed's has no number."""
    return results / "base" / f"{task}{f'-{seed}' if seed else ''}.safetensors"


def make_base(
    settings: Settings,
    results: Path,
    task: Task,
    table: Results,
    score: Callable[..., dict[str, Any]] = score_model,
) -> None:
    """Pretrain, measure and save a task's base model, unless there is one. score: as `score_model`."""
    name = task.base or task.name
    path = base_path(results, name, settings.base_seed)

    def work() -> dict:
        if not path.exists():
            model = pretrain(task, settings)
            path.parent.mkdir(parents=True, exist_ok=True)
            # Tied: one matrix. Rounded to 16 bits, which halves the file; the rounded weights are the base.
            save_file({n: p.detach().half().contiguous() for n, p in model.named_parameters()}, path)
        model = base_model(settings, results, task)
        measured = measure_base(model, task, settings)
        measured["test"] = score(model, task, settings, with_passes=True)
        return {"base": digest(model), "parameters": sum(p.numel() for p in model.parameters()), **measured}

    table.run(f"{name}/seed={settings.base_seed}", {"task": name, "seed": settings.base_seed}, work)


def base_model(settings: Settings, results: Path, task: Task) -> LlamaForCausalLM:
    """Returns a fresh copy of a task's base model."""
    path = base_path(results, task.base or task.name, settings.base_seed)
    if not path.exists():
        raise FileNotFoundError(f"base_model: {path} is missing; run `python -m study pretrain` first")
    model = new_model(0, hidden=settings.hidden, layers=settings.layers)
    weights = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model.eval()


def digest(model: nn.Module) -> str:
    """Returns what tells base models apart in the results: runs of different bases must not be compared."""
    sha = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        sha.update(name.encode() + parameter.detach().numpy().tobytes())
    return sha.hexdigest()[:12]
