"""The regime study: on which data does TRAPO earn its cost? `RULES.md` has its rules and what was predicted.

Rows accumulate: every call runs what is missing, in a fixed order of importance, until it is stopped.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from study.arms import Knobs
from study.base import base_model, digest, make_base
from study.jobs import Study, beyond, run_jobs
from study.loop import Run, execute
from study.regime_arms import FIRST, MAIN, REGIME_ARMS
from study.regime_scores import sampled, score_regime
from study.results import Row
from study.settings import FULL, SMOKE, Settings
from study.wait import CORNERS, HARD, ChainWait

PART, BASES = "regimes", "regime_bases"
BEYOND: Knobs = {"lr": 2, "sft_lr": 2, "expert_lr": 2, "expert_coef": 4}  # how a sweep goes on beyond its grid


@dataclasses.dataclass(frozen=True)
class RegimeSettings(Settings):
    """Sizes of the regime study: those of the study but for what is here."""

    base_seeds: tuple[int, ...] = (0, 1)
    few_seeds: int = 3  # of another base, and of the other corners
    cool_samples: int = 8  # of each test problem, at T = 0.6: the primary score
    # At T = 1 `pass_samples` are drawn of each of `pass_problems`.


_SIZES: dict[str, Any] = {"tasks": tuple(CORNERS)}
REGIMES = RegimeSettings(
    **dataclasses.asdict(FULL)
    | _SIZES
    | {"steps": 200, "pass_problems": 512, "pass_samples": 8}
    | {"pretrain_steps": {corner.base: 2000 for corner in CORNERS.values()}}
)
SMOKE_REGIMES = RegimeSettings(
    **dataclasses.asdict(SMOKE)
    | _SIZES
    | {"steps": 4, "validate_every": 2, "sweep_size": 1, "seeds": (1,)}
    | {"pretrain_steps": {corner.base: 30 for corner in CORNERS.values()}},
    base_seeds=(0,),
    few_seeds=1,
    cool_samples=2,
)


@dataclasses.dataclass(frozen=True)
class RegimeJob:
    """Is a run: where, which arm, from which base, at which settings."""

    task: str
    arm: str
    base_seed: int
    knobs: Knobs
    seed: int

    @property
    def key(self) -> str:
        knobs = ",".join(f"{k}={v:g}" for k, v in self.knobs.items())
        return f"{self.task}/{self.arm}/base={self.base_seed}/{knobs}/seed={self.seed}"


def of_study(study: Study) -> Study:
    """Returns the regime study beside a study: in the same folder, of the same size."""
    return dataclasses.replace(study, settings=SMOKE_REGIMES if study.settings.name == "smoke" else REGIMES)


class RegimeSweep:
    """Knows each arm's settings: where it starts, or what its sweep chose once that is complete."""

    def __init__(self, study: Study) -> None:
        self.settings = study.settings
        self.rows = {row["key"]: row for row in study.part(PART).rows()}

    def job(self, arm: str, knobs: Knobs) -> RegimeJob:
        return RegimeJob(HARD, arm, self.settings.base_seed, knobs, self.settings.sweep_seed)

    def grid(self, arm: str) -> list[Knobs]:
        """Returns an arm's settings to try, with those beyond the grid that its results ask for."""
        found: list[Knobs] = list(REGIME_ARMS[arm].grid)[: self.settings.sweep_size]
        bounds = {axis: max(k[axis] for k in found) for axis in BEYOND if axis in found[0]}
        for _ in range(self.settings.sweep_extensions):
            best = self._best(arm, found)
            further = () if best is None else beyond(best, bounds, BEYOND)
            untried = next((knobs for knobs in further if knobs not in found), None)
            if untried is None:
                break
            found.append(untried)
        return found

    def chosen(self, arm: str) -> Knobs | None:
        """Returns the winner of an arm's sweep; None while it is unfinished."""
        return self._best(arm, self.grid(arm))

    def in_force(self, arm: str) -> Knobs:
        """Returns the settings that an arm's runs have by now."""
        return self.chosen(arm) or REGIME_ARMS[arm].start

    def _best(self, arm: str, settings: Sequence[Knobs]) -> Knobs | None:
        """Returns the settings with the best validation score, of two such those with the better accuracy at T = 1;
        None while one has none."""
        mine = [self.rows.get(self.job(arm, knobs).key) for knobs in settings]
        if any(row is None or row["status"] == "running" for row in mine):
            return None
        scores = [
            (row["validation"], row["validation_sampled"]) if row and row["status"] == "finished" else (-1.0, -1.0)
            for row in mine
        ]
        return settings[scores.index(max(scores))]


def regime_jobs(study: Study) -> Iterator[RegimeJob]:
    """Yields all runs, the most important ones first (`RULES.md`); some come twice."""
    sweep, s = RegimeSweep(study), study.settings
    others = [corner for corner in CORNERS if corner != HARD]
    knobs = {arm: sweep.in_force(arm) for arm in REGIME_ARMS}

    def runs(corners: Sequence[str], arms: Sequence[str], seeds: Sequence[int], base: int = 0) -> Iterator[RegimeJob]:
        for corner in corners:
            for seed in seeds:
                yield from (RegimeJob(corner, arm, base, knobs[arm], seed) for arm in arms)

    first, few = s.seeds[:1], s.seeds[: s.few_seeds]
    yield from runs([HARD], FIRST, first)
    yield from runs([HARD], MAIN, few)
    yield from runs(others, MAIN, first)
    yield from runs([HARD], list(REGIME_ARMS), first)
    yield from (sweep.job(arm, tried) for arm in REGIME_ARMS for tried in sweep.grid(arm))
    yield from runs([HARD], list(REGIME_ARMS), s.seeds)
    for base in s.base_seeds[1:]:
        yield from runs([HARD], list(REGIME_ARMS), few, base)
    yield from runs(others, MAIN, few)


def work_regimes(study: Study, deadline: float | None = None) -> int:
    """Runs what is missing until nothing is, or the deadline (time.monotonic) is past; returns how many runs."""
    return run_jobs(
        study.part(PART),
        lambda: regime_jobs(study),
        lambda job: _about(study, job),
        lambda job: _execute(study, job),
        deadline,
    )


def _settings(study: Study, job: RegimeJob) -> Settings:
    return dataclasses.replace(study.settings, base_seed=job.base_seed)


def _about(study: Study, job: RegimeJob) -> Row:
    """Returns what a row begins with; makes its base model where there is none."""
    settings, task = _settings(study, job), CORNERS[job.task]
    make_base(settings, study.results, task, study.part(BASES), score_regime)
    return {
        "task": job.task,
        "arm": job.arm,
        "knobs": dict(job.knobs),
        "base_seed": job.base_seed,
        "seed": job.seed,
        "base": digest(base_model(settings, study.results, task)),
        "pid": os.getpid(),
    }


def _execute(study: Study, job: RegimeJob) -> dict[str, Any]:
    settings, task = _settings(study, job), CORNERS[job.task]
    model = base_model(settings, study.results, task)
    run = Run(settings, task, model, job.arm, job.knobs, job.seed, arms=REGIME_ARMS)
    row = execute(run, with_test=False)
    model.load_state_dict(run.best)
    scores = _of_sweep(run, task) if job.seed == settings.sweep_seed else score_regime(model, task, settings)
    return {**row, "spent": run.spent, **scores}


def _of_sweep(run: Run, task: ChainWait) -> Mapping[str, Any]:
    """Returns what a tie between settings is decided by; the test problems are not looked at."""
    return {"validation_sampled": sampled(run.model, task, run.validation, samples=2).accuracy}
