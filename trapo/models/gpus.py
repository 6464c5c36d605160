"""`trapo plan` says with this whether a plan fits on a GPU, and how long its arithmetic takes. Nothing is measured."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from trapo.models.plan_around import reserved

if TYPE_CHECKING:
    from trapo.models.plan import Plan

SHARE = 0.4  # of the peak that an update is taken to reach: what well-tuned trainers report
ROOM = 0.9  # of the memory: the rest is for the driver, buffers of libraries and gaps


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet, as `nvidia-smi` shows its memory."""

    name: str
    gib: float
    tflops: float  # dense bfloat16
    tb_per_second: float  # of its memory


GPUS = {
    "a100": Gpu("A100 80GB", 80.0, 312, 2.0),
    "h100": Gpu("H100 80GB", 79.6, 989, 3.35),
    "h200": Gpu("H200", 140.4, 989, 4.8),
    "b200": Gpu("B200", 179.0, 2250, 8.0),
}


def verdict(plan: Plan, gpu: Gpu) -> str:
    """Returns whether the update of a plan fits on a GPU, in a few words."""
    return _fits(sum(plan.memory.values()), gpu.gib)


def _fits(needed: float, gib: float) -> str:
    share = f"{needed / 2**30:.1f} of {gib:g} GiB"
    if needed > gib * 2**30:
        return f"no: {share}"
    return f"yes: {share}" if needed <= ROOM * gib * 2**30 else f"hardly: {share}, with less than a tenth to spare"


def engine_verdict(plan: Plan, gpu: Gpu) -> str:
    """Returns whether a rank can generate beside the learner, in a few words. What engine vllm takes is a share of the
    GPU, in which its weights must fit and, the more the better, keys and values."""
    share = reserved(plan.rollout, gpu.gib)
    if share is None:
        return _fits(sum(plan.engine.values()), gpu.gib)
    *learners, weights, cache = plan.engine.values()
    if weights > share * 2**30:
        return f"no: the engine's weights take {weights / 2**30:.1f} of its {share:.1f} GiB (gpu_memory_utilization)"
    if sum(learners) > (gpu.gib - share) * 2**30:
        return (
            f"no: the learner's {sum(learners) / 2**30:.1f} GiB and the engine's {share:.1f} are more than {gpu.gib:g}"
        )
    part = min(1.0, (share * 2**30 - weights) / cache) if cache else 1.0
    said = f"yes: {share:.1f} of {gpu.gib:g} GiB are the engine's"
    return said if part == 1.0 else f"{said}, with room for {part:.0%} of the keys and values: the rest waits"


def update_seconds(plan: Plan, gpu: Gpu) -> float:
    """Returns the seconds of a step's update on all ranks, at SHARE of the peak."""
    return plan.flops.total / (plan.ranks * SHARE * gpu.tflops * 1e12)


def generation_seconds(plan: Plan, gpu: Gpu) -> float:
    """Returns the least seconds of a step's rollouts: for each token of the longest response a rank reads all weights
    (bfloat16) and the keys and values of its sequences, which are half their length on average."""
    step = plan.step
    sequences = -(-step.sequences // plan.ranks)
    read = 2 * plan.parameters + sequences * plan.kv_bytes * (step.prompt + step.response / 2)
    return step.response * read / (gpu.tb_per_second * 1e12)


def rows(plan: Plan, gpu: Gpu, host: float | None = None) -> list[tuple[str, str]]:
    """Returns what `trapo plan` shows of a plan on a GPU. host: GiB of the machine's own memory; None: not known."""
    loading = [] if host is None else [("loading fits into the machine's memory", _fits(sum(plan.host.values()), host))]
    return [
        ("the update fits", verdict(plan, gpu)),
        ("rollouts fit", engine_verdict(plan, gpu)),
        *loading,
        (f"update, at {SHARE:.0%} of {gpu.tflops:g} TFLOP/s", shown(update_seconds(plan, gpu))),
        (f"rollouts, at {gpu.tb_per_second:g} TB/s, at least", shown(generation_seconds(plan, gpu))),
    ]


def shown(seconds: float) -> str:
    """Returns seconds as people say them."""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
