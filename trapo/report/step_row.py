"""This file makes a step's line of metrics.jsonl."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

from trapo.learner import Update
from trapo.modes import Phase
from trapo.report.loggers import HISTOGRAM
from trapo.report.metrics import peak_gpu_memory_gb, peak_memory_gb, rollout_metrics
from trapo.rollouts import Rollout
from trapo.tools.timing import StepTimer


def training_row(
    step: int, phase: Phase, rollouts: Sequence[Rollout], update: Update, *, lr: float, engine_mismatch: float | None
) -> dict[str, Any]:
    """Returns what the line says of the training itself: the same in every repetition of the run."""
    return {
        "step": step,
        "phase": phase.name,
        **rollout_metrics(rollouts, scored=phase.needs_rewards),
        **update.metrics,
        HISTOGRAM: update.expert_histogram,
        "grad_norm": update.grad_norm if math.isfinite(update.grad_norm) else None,
        "optimizer_steps": update.optimizer_steps,
        "skipped_steps": update.skipped_steps,
        "trained_tokens": update.trained_tokens,
        "lr": lr,
        "engine_mismatch": engine_mismatch,
    }


class StepClock:
    """Gives what the line says of time (seconds) and memory. timer: of the parts of a step."""

    def __init__(self, timer: StepTimer) -> None:
        self.timer = timer
        self.recent: deque[float] = deque(maxlen=10)  # seconds of the last steps, for an estimate of the rest

    def row(
        self, rollouts: Sequence[Rollout], update: Update, *, took: float, seconds: float, steps_left: int
    ) -> dict[str, float]:
        """Returns the part of a step that took so long, `seconds` after the run's start."""
        self.recent.append(took)
        mean = sum(self.recent) / len(self.recent)
        generated = sum(len(r.own_ids) for r in rollouts)
        return {
            "tokens_per_second": (generated + update.trained_tokens) / took,
            "seconds_step": took,
            **self.timer.take(),
            "seconds": seconds,
            "seconds_left": mean * steps_left,
            "peak_memory_gb": peak_memory_gb(),
            **peak_gpu_memory_gb(),
        }
