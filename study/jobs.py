"""What there is to run, part by part, and the worker that does it. Nothing here is decided by test scores."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from study.ablations import ABLATION_TASK, CONDITION_ARMS, CONDITIONS, RETUNED, SETTLED, TRAPO_VARIANTS, Variant
from study.arms import ARMS, Knobs
from study.base import base_model, base_path, digest
from study.loop import Run, execute
from study.results import Results, Row
from study.settings import Settings
from study.task import tasks


@dataclasses.dataclass(frozen=True)
class Job:
    part: str
    task: str
    arm: str
    knobs: Knobs
    seed: int
    name: str = ""  # of the variant
    variant: Variant = dataclasses.field(default_factory=Variant)

    @property
    def key(self) -> str:
        knobs = ",".join(f"{k}={v:g}" for k, v in self.knobs.items())
        return "/".join(filter(None, (self.task, self.arm, self.name, knobs, f"seed={self.seed}")))


@dataclasses.dataclass(frozen=True)
class Study:
    """Where a study's files are. `results` is committed; `scratch` holds locks."""

    settings: Settings
    results: Path
    scratch: Path

    def part(self, name: str) -> Results:
        return Results(self.results, name, self.settings, self.scratch / "locks")

    def ready_tasks(self) -> list[str]:
        """Returns tasks that have their base model."""
        return [task for task in self.settings.tasks if base_path(self.results, task).exists()]


PARTS = ("sweep", "arms", "ablations")


def jobs(study: Study, part: str) -> Iterator[Job]:
    """Returns all jobs of a part whose settings are known by now."""
    return {"sweep": sweep_jobs, "arms": arm_jobs, "ablations": ablation_jobs}[part](study)


# How a sweep goes on beyond its grid, axis by axis: the bounds of a grid must not decide the comparison.
BEYOND: Knobs = {"lr": 2, "expert_coef": 4}


class Sweep:
    """The sweep as it stands: its rows are read once, for one look at what there is to do."""

    def __init__(self, study: Study) -> None:
        self.settings = study.settings
        self.rows = {row["key"]: row for row in study.part("sweep").rows()}

    def job(self, task: str, arm: str, knobs: Knobs, condition: str = "") -> Job:
        variant = CONDITIONS[condition] if condition else Variant()
        return Job("sweep", task, arm, knobs, self.settings.sweep_seed, condition, variant)

    def grid(self, task: str, arm: str, condition: str = "") -> list[Knobs] | None:
        """Returns an arm's settings to try, with those beyond the grid that its results ask for; None while they depend
        on a sweep that is not finished. `condition`: one of RETUNED."""
        whole = RETUNED[condition][arm] if condition else ARMS[arm].grid
        found: list[Knobs] = list(whole)[: self.settings.sweep_size]
        if arm == "sft_then_rl":
            sft = self.chosen(task, "sft", condition)
            if sft is None:
                return None
            found = [{**k, "sft_lr": sft["lr"], "sft_batch": sft["batch"]} for k in found]
        bounds = {axis: max(k[axis] for k in found) for axis in BEYOND if axis in found[0]}
        for _ in range(self.settings.sweep_extensions):
            best = self._best(task, arm, condition, found)
            further = () if best is None else beyond(best, bounds)
            untried = next((knobs for knobs in further if knobs not in found), None)
            if untried is None:
                break
            found.append(untried)
        return found

    def chosen(self, task: str, arm: str, condition: str = "") -> Knobs | None:
        """Returns the winner of an arm's sweep; None while it is unfinished."""
        settings = self.grid(task, arm, condition)
        return None if settings is None else self._best(task, arm, condition, settings)

    def _best(self, task: str, arm: str, condition: str, settings: Sequence[Knobs]) -> Knobs | None:
        """Returns the settings with the best validation score (the earlier on a tie); None while one has none."""
        mine = [self.rows.get(self.job(task, arm, knobs, condition).key) for knobs in settings]
        if any(row is None or row["status"] == "running" for row in mine):
            return None
        scores = [row["validation"] if row and row["status"] == "finished" else -1.0 for row in mine]
        return settings[scores.index(max(scores))]


def beyond(best: Knobs, bounds: Knobs, factors: Knobs = BEYOND) -> list[Knobs]:
    """Returns the settings next to the best ones on each axis where those are at the highest of the grid, or above
    it."""
    return [{**best, axis: factors[axis] * best[axis]} for axis in bounds if best[axis] >= bounds[axis]]


def sweep_jobs(study: Study) -> Iterator[Job]:
    """Yields the grid of every arm, one seed; then those of the conditions that are tuned anew. SFT comes first: SFT →
    GRPO starts from its winner."""
    sweep, ready = Sweep(study), study.ready_tasks()
    wanted = [(task, arm, "") for task in ready for arm in ARMS]
    if ABLATION_TASK in ready:
        wanted += [(ABLATION_TASK, arm, condition) for condition, grids in RETUNED.items() for arm in grids]
    for task, arm, condition in wanted:
        for knobs in sweep.grid(task, arm, condition) or ():
            yield sweep.job(task, arm, knobs, condition)


def arm_jobs(study: Study) -> Iterator[Job]:
    """Yields every arm at its chosen settings, a seed after the other, so that an unfinished study has whole seeds."""
    sweep = Sweep(study)
    for seed in study.settings.seeds:
        for task in study.settings.tasks:
            for arm in ARMS:
                knobs = sweep.chosen(task, arm)
                if knobs is not None:
                    yield Job("arms", task, arm, knobs, seed)


def ablation_jobs(study: Study) -> Iterator[Job]:
    """Yields variants of TRAPO, then conditions, with the settings that the sweeps chose."""
    if ABLATION_TASK not in study.settings.tasks:
        return
    sweep = Sweep(study)
    wanted = [("trapo_paper", TRAPO_VARIANTS), *((arm, CONDITIONS) for arm in CONDITION_ARMS)]
    kept = [job for arm, variants in wanted for job in _variants(sweep, arm, variants)]
    for seed in study.settings.ablation_seeds:
        first = seed == study.settings.ablation_seeds[0]
        yield from (dataclasses.replace(job, seed=seed) for job in kept if first or job.name not in SETTLED)


def _variants(sweep: Sweep, arm: str, variants: Mapping[str, Variant]) -> Iterator[Job]:
    for name, variant in variants.items():
        knobs = sweep.chosen(ABLATION_TASK, arm, name if arm in RETUNED.get(name, {}) else "")
        if knobs is not None and not changes_nothing(sweep.settings, arm, knobs, variant):
            yield Job("ablations", ABLATION_TASK, arm, knobs, 0, name, variant)


def changes_nothing(settings: Settings, arm: str, knobs: Knobs, variant: Variant) -> bool:
    """Returns whether a variant is the arm itself at its settings, whose runs `arms` has already."""
    same_problems = dataclasses.replace(variant, overrides={}) == Variant()
    stages = ARMS[arm].stages
    return same_problems and stages(settings, 0, knobs, variant.overrides) == stages(settings, 0, knobs, {})


def missing_settings(study: Study) -> list[str]:
    """Returns the task and arm of every sweep that is not finished."""
    sweep = Sweep(study)
    return [f"{t}/{a}" for t in study.settings.tasks for a in ARMS if sweep.chosen(t, a) is None]


def work(study: Study, part: str, deadline: float | None = None, task: str | None = None) -> int:
    """Runs jobs of a part (of one task, or of all); returns how many. deadline: as `run_jobs`."""
    return run_jobs(
        study.part(part),
        lambda: (job for job in jobs(study, part) if task in (None, job.task)),
        lambda job: _about(study, job),
        lambda job: _execute(study, job),
        deadline,
    )


class Keyed(Protocol):
    """Is a job: its key tells it from all others."""

    @property
    def key(self) -> str: ...


J = TypeVar("J", bound=Keyed)


def run_jobs(
    results: Results,
    wanted: Callable[[], Iterable[J]],
    about: Callable[[J], Row],
    execute: Callable[[J], Row],
    deadline: float | None = None,
) -> int:
    """Runs jobs until none is left for this process or the deadline (time.monotonic) is past; returns how many.

    wanted: asked anew after each, since results may ask for more. about: what a row begins with. execute: the rest."""
    torch.set_num_threads(1)
    done = 0
    while deadline is None or time.monotonic() < deadline:
        job = next((job for job in wanted() if not results.taken(job.key)), None)
        if job is None:
            break
        started = time.monotonic()
        if results.run(job.key, about(job), lambda job=job: execute(job)):
            done += 1
            row = next(row for row in results.rows() if row["key"] == job.key)
            print(f"{results.part}: {job.key}: {_told(row)}, {time.monotonic() - started:.0f} s", flush=True)
    return done


def _about(study: Study, job: Job) -> Row:
    base = base_model(study.settings, study.results, tasks()[job.task])
    return {
        "task": job.task,
        "arm": job.arm,
        **({"variant": job.name} if job.name else {}),
        "knobs": dict(job.knobs),
        "seed": job.seed,
        "base": digest(base),
        "pid": os.getpid(),
    }


def _execute(study: Study, job: Job) -> dict[str, Any]:
    task = tasks()[job.task]
    model = base_model(study.settings, study.results, task)
    run = Run(study.settings, task, model, job.arm, job.knobs, job.seed, job.variant)
    return execute(run, with_test=job.part != "sweep", with_passes=job.part == "arms")


def _told(row: Row) -> str:
    if row["status"] != "finished":
        return row["status"]
    test = f", test {row['test']:.3f}" if "test" in row else ""
    return f"validation {row['validation']:.3f} at step {row['validation_step']}{test}"
