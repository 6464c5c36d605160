"""The steps of a run are cut into phases, one after the other, each with a schedule, an objective and an optimizer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import trapo_kernels as tk
from trapo.distillation.how import INITIAL, Distillation
from trapo.guidance import Schedule
from trapo.settings.groups import OptimConfig
from trapo.settings.objective import imitates, reads_behaviour

if TYPE_CHECKING:
    from trapo.learner import Learner, Update
    from trapo.modes.memory import Memory
    from trapo.rollouts import Rollout
    from trapo.tools.timing import StepTimer


class Learns(Protocol):
    """Makes the update of a step, of a mode for which that is more than one of its loss."""

    def __call__(
        self,
        rollouts: Sequence[Rollout],
        phase: Phase,
        learner: Learner,
        seed: int,
        timer: StepTimer,
        again: Callable[[], list[Rollout]],
    ) -> Update:
        """Returns what it did. again: draws the rollouts of the same problems anew, from the weights that there are."""
        ...


@dataclasses.dataclass(frozen=True)
class Phase:
    """Is a stretch of steps with one schedule, one objective and an optimizer that it begins with.

    Its steps are counted from 0 for themselves: problems, random numbers and learning rates are those of a run that is
    this phase alone and starts from the model that the phase before it left.
    """

    name: str
    steps: int
    schedule: Schedule
    objective: tk.Objective
    std: bool  # advantages divided by the group's standard deviation
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    prompts_per_step: int = 8
    ends_at_plateau: bool = False  # when held-out traces get no likelier, however many of its steps are left
    grouping: str = "prompt"  # which rollouts are compared: see rollouts.assign_advantages
    vary: Callable[[Phase, int], Phase] | None = None  # makes the phase of a step, where it has a schedule
    weigh: Callable[[Sequence[Rollout], Learner], None] | None = None  # changes what tokens weigh, before the update
    learns: Learns | None = None  # makes the update; None: one of the loss
    memory: Memory | None = None  # is told of every step, and kept in checkpoints
    distills: Distillation | None = None  # adds a teacher's divergence to the loss
    shown: Mapping[str, float] = dataclasses.field(default_factory=dict)  # for the step's line of metrics
    overruled: tuple[str, ...] = ()  # a line for each choice of the mode that the configuration changes

    def at(self, step: int) -> Phase:
        """Returns the phase as a step of it, counted from 0, has it."""
        return self if self.vary is None else self.vary(self, step)

    def update(
        self,
        rollouts: Sequence[Rollout],
        learner: Learner,
        seed: int,
        timer: StepTimer,
        again: Callable[[], list[Rollout]],
    ) -> Update:
        """Makes the update of a step. again: as `Learns`."""
        if self.learns is None:
            return learner.update(rollouts, self.objective, seed=seed, timer=timer)
        return self.learns(rollouts, self, learner, seed, timer, again)

    @property
    def needs_reference(self) -> bool:
        """Returns whether a frozen copy of the model's first weights is part of the loss."""
        return "ref_logprobs" in self.objective.needs or self.objective.reference_head

    @property
    def needs_behaviour(self) -> bool:
        """Returns whether the expert term reads the log-probabilities of what wrote the traces."""
        return reads_behaviour(self.objective)

    @property
    def needs_traces(self) -> bool:
        """Returns whether a problem without an expert trace is of no use."""
        return not self.schedule.generates or (self.distills is not None and self.distills.privileged)

    @property
    def needs_base(self) -> bool:
        """Returns whether the run's initial weights are read beside those that are trained."""
        is_teacher = self.distills is not None and self.distills.teacher == INITIAL
        return is_teacher or self.needs_reference

    @property
    def needs_rewards(self) -> bool:
        """Returns whether rewards are needed, for advantages or to know who needs guidance."""
        return "advantages" in self.objective.needs or self.schedule.generates


def cosine(high: float, low: float, steps: int, step: int, after: float | None = None) -> float:
    """Returns a value that falls from high to low over so many steps; then it is `after`, None: low."""
    if step > steps and after is not None:
        return after
    return low + (high - low) * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2


def supervised(schedule: Schedule, objective: tk.Objective) -> Schedule:
    """Returns the schedule for this objective: prefixes without a loss are context, and no part of any mean."""
    return schedule if imitates(objective) else dataclasses.replace(schedule, supervise="none")


def phase_at(step: int, plan: Sequence[Phase]) -> tuple[Phase, int]:
    """Returns the phase that a step of the run, counted from 0, belongs to, and the step's number in it."""
    for phase in plan:
        if step < phase.steps:
            return phase, step
        step -= phase.steps
    raise AssertionError(f"{step} steps past the last phase's end")


def cut_at_plateau(plan: Sequence[Phase], found: Mapping[int, float]) -> list[Phase]:
    """Returns the plan whose first phase, where it `ends_at_plateau`, ends there.

    found: the negative log-likelihood of held-out traces after so many steps of the run.
    """
    first, *others = plan
    end = plateau(found)
    if not first.ends_at_plateau or end is None or not 0 < end < first.steps:
        return list(plan)
    (rest,) = others
    cut = dataclasses.replace(rest, steps=rest.steps + first.steps - end)
    return [dataclasses.replace(first, steps=end, ends_at_plateau=False), cut]


class Course:
    """Knows which phase each step of a run belongs to, also where that shows only while it runs."""

    def __init__(self, plan: Sequence[Phase], steps: int) -> None:
        self.phases, self.steps = list(plan), steps

    def at(self, step: int) -> tuple[Phase, int]:
        """Returns the phase of the step (of the last one, behind the end), and the step's number in it."""
        return phase_at(min(step, self.steps - 1), self.phases)

    @property
    def waits(self) -> bool:
        """Is True while the first phase lasts until a plateau that has not come yet."""
        return self.phases[0].ends_at_plateau

    def cut(self, found: Mapping[int, float]) -> bool:
        """Ends the first phase at its plateau; returns whether there is one. found: as `cut_at_plateau`'s."""
        self.phases = cut_at_plateau(self.phases, found)
        return not self.waits


def plateau(found: Mapping[int, float], within: int = 3, by: float = 0.02) -> int | None:
    """Returns the step of the first evaluation at which the best of the last `within` is not lower than the best before
    them by a share `by` (arXiv 2512.11470: SFT ends where its validation loss is stable or rises); None: not yet."""
    steps = sorted(found)
    values = [found[step] for step in steps]
    for i in range(within, len(steps)):
        if min(values[i + 1 - within : i + 1]) > (1 - by) * min(values[: i + 1 - within]):
            return steps[i]
    return None
