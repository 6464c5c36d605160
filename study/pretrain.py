"""The base models: trained on the noisy corpus of a task, then measured with pass@k by problem length."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM

from study.evaluate import Samples, sample_problems
from study.model import new_model
from study.settings import Settings
from study.task import EOS, PAD, Task, encode

BATCH = 64
PEAK_LR = 3e-3


def pretrain(task: Task, settings: Settings, log: Callable[[str], None] = print) -> LlamaForCausalLM:
    """Returns a model after `settings.pretrain_steps` on lines of the corpus; the loss is on responses alone."""
    name = task.base or task.name
    steps, rng = settings.pretrain_steps[name], random.Random(f"corpus/{name}/{settings.base_seed}")
    model = new_model(settings.base_seed, hidden=settings.hidden, layers=settings.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
    started, lines, smoothed = time.process_time(), _batches(task, rng), math.nan
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * _schedule(step, steps)
        loss = _loss(model, next(lines))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        smoothed = loss.item() if math.isnan(smoothed) else 0.98 * smoothed + 0.02 * loss.item()
        if step % 100 == 0 or step + 1 == steps:
            seconds = time.process_time() - started
            log(f"{name}: step {step + 1} of {steps}, loss {smoothed:.3f}, {seconds:.0f} s")
    return model


def _batches(task: Task, rng: random.Random) -> Iterator[list[tuple[str, str]]]:
    """Yields batches of lines of like length, so that little is padding."""
    while True:
        lines = sorted((task.corpus_line(rng) for _ in range(16 * BATCH)), key=lambda line: len(line[0] + line[1]))
        batches = [lines[i : i + BATCH] for i in range(0, len(lines), BATCH)]
        rng.shuffle(batches)
        yield from batches


def _schedule(step: int, steps: int) -> float:
    warmup = min(1.0, (step + 1) / 50)
    return warmup * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _loss(model: LlamaForCausalLM, lines: Sequence[tuple[str, str]]) -> torch.Tensor:
    rows = [(encode(prompt), (*encode(response), EOS)) for prompt, response in lines]
    width = max(len(p) + len(r) for p, r in rows)
    ids = torch.full((len(rows), width), PAD)
    targets = torch.full((len(rows), width), -100)
    for i, (prompt, response) in enumerate(rows):
        ids[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        targets[i, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
    # Padding is on the right, where causal attention never looks: no mask is needed.
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())


def measure_base(model: LlamaForCausalLM, task: Task, settings: Settings) -> dict[str, Any]:
    """Returns the greedy accuracy, and pass@1 and pass@8 at T = 1, on validation problems, all and by length."""
    instances = task.problems("validation", settings.validation_problems)
    greedy = sample_problems(model, task, instances, samples=1, temperature=0.0, seed=0)
    drawn = sample_problems(model, task, instances, samples=8, temperature=1.0, seed=0)
    by_length = {n: [i.length == n for i in instances] for n in task.lengths}
    return _passes(greedy, drawn) | {
        "by_length": {str(n): _passes(greedy.only(chosen), drawn.only(chosen)) for n, chosen in by_length.items()}
    }


def _passes(greedy: Samples, drawn: Samples) -> dict[str, float]:
    return {"greedy": greedy.accuracy, "pass@1": drawn.pass_at(1), "pass@8": drawn.pass_at(8)}
