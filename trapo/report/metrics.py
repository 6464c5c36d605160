"""This file computes the numbers of a step: what the rollouts were like, and the loss's own metrics put together over
micro-batches."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Iterable, Sequence

import torch

import trapo_kernels as tk
from trapo.rollouts import Rollout

HISTOGRAM_BINS = 20  # of probability, equally wide: the usual alpha of 0.1 is an edge


def rollout_metrics(rollouts: Sequence[Rollout], *, scored: bool) -> dict[str, object]:
    """Returns the rewards (overall, of rollouts without a prefix, and by prefix ratio; none where rollouts were not
    scored), lengths and guidance of a step."""
    own = [r for r in rollouts if r.own_ids]
    ratios = sorted({r.ratio for r in rollouts})
    failed = [r.status for r in rollouts if r.status != "ok"]
    return {
        "reward": _mean(r.reward for r in rollouts) if scored else None,
        "own_reward": _mean(r.reward for r in rollouts if not r.guided) if scored else None,
        "reward_by_ratio": {f"{x:g}": _mean(r.reward for r in rollouts if r.ratio == x) for x in ratios if scored},
        "rollouts_by_ratio": {f"{x:g}": sum(r.ratio == x for r in rollouts) for x in ratios},
        "guided": _mean(r.guided for r in rollouts),
        "finished": _mean(r.finished for r in own),
        "generated_tokens": sum(len(r.own_ids) for r in rollouts),
        "supervised_tokens": sum(len(r.prefix_ids) for r in rollouts if r.supervised),
        "generated_length": _mean(len(r.own_ids) for r in own),
        "zero_advantage": _mean(r.advantage == 0.0 for r in own),
        "reward_failures": {status: failed.count(status) for status in sorted(set(failed))},
    }


class ProbabilityHistogram:
    """Counts how many tokens of a step had a probability in each of HISTOGRAM_BINS bins of [0, 1]; no host sync in
    `add`."""

    def __init__(self) -> None:
        self.counts: torch.Tensor | None = None  # [HISTOGRAM_BINS] int64

    def add(self, logprobs: torch.Tensor, mask: torch.Tensor) -> None:
        """Count the tokens of logprobs [...] where mask [...] is True."""
        bins = (logprobs.detach().exp() * HISTOGRAM_BINS).long().clamp(0, HISTOGRAM_BINS - 1)
        if self.counts is None:
            self.counts = bins.new_zeros(HISTOGRAM_BINS)
        self.counts.scatter_add_(0, bins.flatten(), mask.flatten().long())

    def take(self) -> torch.Tensor:
        """Returns the counts since the last `take`, where they are; [0] when nothing was there to count."""
        counts, self.counts = self.counts, None
        return torch.zeros(0, dtype=torch.int64) if counts is None else counts


def merged_metrics(
    metrics: Sequence[dict[str, torch.Tensor]], minibatches: int, counts: torch.Tensor
) -> tuple[dict[str, float | None], list[int]]:
    """Returns the loss's metrics of all micro-batches as one, where a loss is the mean over minibatches, and the counts
    of a histogram, [] if all are 0. One host sync for all of them."""
    found = tk.merge_metrics(metrics)
    device = next(iter(found.values())).device if found else counts.device
    numbers = [*(v.double().reshape(1) for v in found.values()), counts.to(device).double()]
    values, there = torch.cat(numbers).tolist(), len(found)
    merged = dict(zip(found, values[:there], strict=True))
    means = {name: value / minibatches if name.startswith("loss") else value for name, value in merged.items()}
    # JSON has no NaN.
    shown = {name: value if math.isfinite(value) else None for name, value in means.items()}
    return shown, [int(count) for count in values[there:]] if any(values[there:]) else []


def on_host(metrics: Sequence[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Returns the numbers of all micro-batches on the CPU, by one host sync."""
    flat = [value for of_batch in metrics for value in of_batch.values()]
    moved = iter(torch.stack([value.double() for value in flat]).cpu() if flat else ())
    return [{name: next(moved).to(value.dtype) for name, value in of_batch.items()} for of_batch in metrics]


def added_up(histograms: Sequence[list[int]]) -> list[int]:
    """Returns those of all ranks as one; empty ones count nothing."""
    return [sum(counts) for counts in zip(*filter(None, histograms), strict=True)]


def finite_or_none(value: float | None) -> float | None:
    """Returns a number as JSON can hold it."""
    return value if value is not None and math.isfinite(value) else None


def peak_memory_gb() -> float:
    """Returns the highest resident memory of this process so far, in GB (1e9 bytes); reward workers, 0.1 GB each, not
    included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 3)


def peak_gpu_memory_gb() -> dict[str, float]:
    """Returns the highest memory of tensors on this process's GPU so far, in GB (1e9 bytes), by its name in
    metrics.jsonl; {} without one."""
    if not torch.cuda.is_initialized():
        return {}
    return {"peak_gpu_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3)}


def _mean(values: Iterable[float]) -> float | None:
    """Returns the mean; None where there are no values, and where their sum is too large for a float."""
    numbers = [float(v) for v in values]
    mean = sum(numbers) / len(numbers) if numbers else math.inf
    return mean if math.isfinite(mean) else None
