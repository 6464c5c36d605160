"""One run: a base model, an arm, a seed -> a row of scores. Everything of the method is trapo's own.

A step is the trainer's `train_step`: it draws micro-groups, sets advantages and updates the model.
Left out from the trainer's loop are checkpoints, displays and reward workers, which would cost more than the steps.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import LlamaForCausalLM

from study.ablations import Variant
from study.arms import ARMS, Arm, Knobs, Stage
from study.engine import StudyEngine
from study.evaluate import Samples, is_right, packed, sample_problems
from study.settings import Settings
from study.task import EOS, PAD, Task, encoded
from trapo.data.encode import EncodedProblem
from trapo.data.sampling import derive_seed, problems_at
from trapo.guidance import Schedule
from trapo.learner import Learner
from trapo.modes import Phase, phases
from trapo.report.metrics import rollout_metrics
from trapo.rewards import Reward
from trapo.rollouts import Rollout
from trapo.trainer import make_learner, train_step


class RandomPrefixProblem(EncodedProblem):
    """Guided rollouts get a prefix of random length instead of the schedule's ratio."""

    def prefix(self, schedule: Schedule, micro_group: int, rng: random.Random) -> tuple[int, ...]:
        if not self.traces:
            return ()
        trace = self.traces[0].token_ids
        return trace[: rng.randrange(1, len(trace) + 1)]


@dataclasses.dataclass
class Totals:
    """What a run cost."""

    rollouts: int = 0
    generated_tokens: int = 0
    expert_tokens: int = 0  # that carried the expert term
    trained_tokens: int = 0  # that went through forward and backward, prompts included
    skipped_steps: int = 0

    def add(self, rollouts: Sequence[Rollout], trained: int, skipped: int) -> None:
        self.rollouts += sum(bool(r.own_ids) for r in rollouts)
        self.generated_tokens += sum(len(r.own_ids) for r in rollouts)
        self.expert_tokens += sum(len(r.prefix_ids) for r in rollouts if r.supervised)
        self.trained_tokens += trained
        self.skipped_steps += skipped


class Run:
    """A model on its way through an arm's stages, with the best validated weights so far."""

    def __init__(
        self,
        settings: Settings,
        task: Task,
        model: LlamaForCausalLM,
        arm: str,
        knobs: Knobs,
        seed: int,
        variant: Variant | None = None,
        arms: Mapping[str, Arm] = ARMS,
    ) -> None:
        variant = variant or Variant()
        self.settings, self.task, self.model, self.seed = settings, task, model, seed
        self.stages = arms[arm].stages(settings, seed, knobs, variant.overrides)
        instances = task.problems("train", settings.traces, variant.lengths)
        self.train_set = encoded(task, instances, variant.traces)
        self.validation = task.problems("validation", settings.validation_problems)
        self.engine = StudyEngine(model, eos_id=EOS, pad_id=PAD)
        self.step, self.totals = 0, Totals()
        self.series: list[dict[str, Any]] = []
        self.validated: list[tuple[int, float]] = []
        self.spent: list[tuple[int, float]] = []  # expert tokens and core-seconds by each validation
        self.begun = time.process_time()
        self.best = copy.deepcopy(model.state_dict())

    def train(self) -> None:
        """Trains all stages and validates every so often; the best weights are kept (the earliest on a tie)."""
        self.begun = time.process_time()
        self._validate()
        for stage in self.stages:
            self._stage(stage)
        if self.validated[-1][0] != self.step:
            self._validate()

    def _stage(self, stage: Stage) -> None:
        (phase,) = phases(stage.config)
        learner = make_learner(stage.config, self.model, pad_id=PAD)
        problems = self.train_set
        if not phase.schedule.generates:  # as trapo's own load_train_set does: imitation needs traces
            problems = [p for p in problems if p.traces]
        if stage.random_prefix:
            problems = [RandomPrefixProblem(p.problem, p.prompt_ids, p.traces) for p in problems]
        for number in range(stage.config.train.steps):
            self._step(stage, phase.at(number), learner, problems)
            self.step += 1
            if self.step % self.settings.validate_every == 0:
                self._validate()

    def _step(self, stage: Stage, phase: Phase, learner: Learner, problems: Sequence[EncodedProblem]) -> None:
        config, seed = stage.config, derive_seed(self.seed, "step", self.step)

        rollouts, update = train_step(
            problems_at(
                self.step, problems, config.train.prompts_per_step, seed=config.seed, shuffle=config.data.shuffle
            ),
            phase,
            self.engine,
            self._score,
            learner,
            baseline=config.advantage.baseline,
            temperature=config.rollout.temperature,
            max_response_tokens=self.task.max_response,
            seed=seed,
        )
        self.totals.add(rollouts, update.trained_tokens, update.skipped_steps)
        measured = rollout_metrics(rollouts, scored=phase.needs_rewards)
        kept = ("reward_by_ratio", "rollouts_by_ratio", "guided", "zero_advantage", "generated_length")
        loss = {name: update.metrics.get(name) for name in ("entropy", "expert_prob", "trsft_clipped")}
        row = {"step": self.step + 1, **{name: measured[name] for name in kept}, **loss}
        self.series.append(row | {"grad_norm": update.grad_norm})

    def _score(self, rollouts: Sequence[Rollout]) -> list[Reward]:
        right = [
            is_right(self.task, r.problem.problem.id, r.problem.problem.answer, r.response_ids, r.finished)
            for r in rollouts
        ]
        return [Reward(float(value), "ok") for value in right]

    def _validate(self) -> None:
        greedy = sample_problems(self.model, self.task, self.validation, samples=1, temperature=0.0, seed=0)
        if not self.validated or greedy.accuracy > max(value for _, value in self.validated):
            self.best = copy.deepcopy(self.model.state_dict())
        self.validated.append((self.step, greedy.accuracy))
        self.spent.append((self.totals.expert_tokens, round(time.process_time() - self.begun, 1)))

    def scores(self, *, with_passes: bool) -> dict[str, Any]:
        """Returns the test scores of the best validated weights, and of the last ones."""
        test = self.task.problems("test", self.settings.test_problems)
        last = sample_problems(self.model, self.task, test, samples=1, temperature=0.0, seed=0)
        self.model.load_state_dict(self.best)
        return {"test_last": last.accuracy} | score_model(self.model, self.task, self.settings, with_passes=with_passes)


def score_model(model: LlamaForCausalLM, task: Task, settings: Settings, *, with_passes: bool) -> dict[str, Any]:
    """Returns the greedy and sampled accuracy on the test problems; `test_right`, a bit per problem, is for the
    intervals."""
    test = task.problems("test", settings.test_problems)
    greedy = sample_problems(model, task, test, samples=1, temperature=0.0, seed=0)
    drawn = sample_problems(model, task, test, samples=settings.test_samples, temperature=1.0, seed=0)
    scores: dict[str, Any] = {
        "test": greedy.accuracy,
        "test_sampled": drawn.accuracy,
        "test_by_length": {str(n): greedy.only([i.length == n for i in test]).accuracy for n in task.lengths},
        "test_finished": greedy.finished,
        "test_right": packed(greedy.right[:, 0]),
    }
    if with_passes:
        few = test[: settings.pass_problems]
        many = sample_problems(model, task, few, samples=settings.pass_samples, temperature=1.0, seed=1)
        scores["pass_at"] = passes(many)
        scores["pass_right"] = [int(n) for n in many.right.sum(1)]  # of pass_samples, per problem
    return scores


def passes(drawn: Samples) -> dict[str, float]:
    """Returns pass@k for powers of two up to the number of samples."""
    count = drawn.right.shape[1]
    return {str(2**i): drawn.pass_at(2**i) for i in range(count.bit_length()) if 2**i <= count}


def execute(run: Run, *, with_test: bool = True, with_passes: bool = False) -> dict[str, Any]:
    """Train and score a run; a sweep's (`with_test=False`) never sees the test problems."""
    cpu = time.process_time()
    run.train()
    trained = time.process_time()
    best_step, best = max(run.validated, key=lambda pair: (pair[1], -pair[0]))
    return {
        "validation": best,
        "validation_step": best_step,
        "validation_curve": run.validated,
        "steps": run.step,
        **dataclasses.asdict(run.totals),
        **(run.scores(with_passes=with_passes) if with_test else {}),
        "series": thinned(run.series),
        "cpu_seconds_train": round(trained - cpu, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }


def thinned(series: Sequence[Mapping[str, Any]], points: int = 20) -> list[dict[str, Any]]:
    """Returns at most `points` rows, each the mean over its stretch of steps; counts stay means per step."""
    if not series:
        return []
    return [_mean_row([series[i] for i in block]) for block in np.array_split(range(len(series)), points) if len(block)]


def _mean_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {"step": rows[-1]["step"]}
    for key in rows[0]:
        if key == "step":
            continue
        if isinstance(rows[0][key], dict):
            names = sorted({name for row in rows for name in row[key]})
            absent = 0 if key == "rollouts_by_ratio" else None
            out[key] = {name: _mean([row[key].get(name, absent) for row in rows]) for name in names}
        else:
            out[key] = _mean([row[key] for row in rows])
    return out


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None and np.isfinite(v)]
    return round(float(np.mean(known)), 5) if known else None
