"""This file draws a step's rollouts: when the step begins or, with rollout.ahead=1, while the update before it runs.

    step n    update on rollouts n              → weights n + 1
              meanwhile the engine, which has weights n, draws rollouts n + 1

So from a phase's second step on rollouts are one update old. Their policy is the engine's, whose log-probabilities came
with the tokens: the loss takes its ratios to those (`Rollout.behind`). A micro-group may depend on the rewards of those
before it, which are computed in the same thread.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from trapo.errors import TrapoError
from trapo.rollouts import Rollout, Scorer, assign_advantages, collect

if TYPE_CHECKING:
    from trapo.config import Config
    from trapo.data.encode import EncodedProblem
    from trapo.engines.protocol import Engine
    from trapo.modes.phase import Phase
    from trapo.tools.timing import StepTimer

Draw = Callable[[], list[Rollout]]


def draw(
    problems: Sequence[EncodedProblem],
    phase: Phase,
    engine: Engine,
    score: Scorer,
    *,
    baseline: str,
    temperature: float,
    max_response_tokens: int,
    seed: int,
    timer: StepTimer | None = None,
) -> list[Rollout]:
    """Returns a step's rollouts of these problems, with advantages: micro-group by micro-group, since a prompt's later
    rollouts continue an expert prefix where its earlier ones failed."""
    drawn = collect(
        problems,
        phase.schedule,
        engine,
        score if phase.needs_rewards else None,
        temperature=temperature,
        max_response_tokens=max_response_tokens,
        seed=seed,
        timer=timer,
    )
    if phase.needs_rewards:
        assign_advantages(drawn, baseline, phase.std, phase.grouping)
    return drawn


class Ahead:
    """Draws the next step's rollouts in a thread while a step's update runs, and holds them until that step.

    The weights that sampled them are gone by then, so a checkpoint has the rollouts.
    """

    def __init__(self, on: bool = False, ranks: int = 1) -> None:
        if on and ranks > 1:
            _refuse(f"{ranks} ranks, whose drawing and update would talk over one process group at once; accepted: 1")
        self.next: Draw | None = None  # draws them; None: the next step draws its own when it begins
        self.drawn: list[Rollout] | None = None  # for the step that comes; None: it has to draw

    @contextmanager
    def meanwhile(self, timer: StepTimer) -> Iterator[None]:
        """Draws while the block, an update on what was drawn before, runs; then waits, which counts as generating. What
        failed is raised here."""
        self.drawn = None
        if self.next is None:
            yield
            return
        found: Future[list[Rollout]] = Future()
        # A daemon: when the update fails, the run ends without waiting for the engine.
        threading.Thread(target=_fill, args=(found, self.next), name="rollout.ahead", daemon=True).start()
        yield
        with timer.part("generate"):
            self.drawn = found.result()
        for rollout in self.drawn:
            rollout.behind = True

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint has of the rollouts that wait; {} where none do."""
        return {} if self.drawn is None else {"ahead": [_plain(rollout) for rollout in self.drawn]}

    def load_state_dict(self, state: dict[str, Any], problems: Sequence[EncodedProblem]) -> None:
        """Takes the rollouts of a checkpoint over. problems: of the step that they are for."""
        if (plain := state.get("ahead")) is not None:
            self.drawn = [_rollout(values, problems) for values in plain]


def _fill(found: Future[list[Rollout]], draw: Draw) -> None:
    try:
        found.set_result(draw())
    except BaseException as error:
        found.set_exception(error)


_MADE = ("problem", "old_logprobs", "ref_logprobs")  # of a step's problems, or by its update


def _plain(rollout: Rollout) -> dict[str, Any]:
    values = {field.name: getattr(rollout, field.name) for field in dataclasses.fields(rollout)}
    kept = {name: value for name, value in values.items() if name not in _MADE}
    return kept | {"prompt_ids": rollout.problem.prompt_ids}


def _rollout(values: dict[str, Any], problems: Sequence[EncodedProblem]) -> Rollout:
    values = dict(values)
    # A prefix may stand in the prompt (guidance.instruction).
    problem = dataclasses.replace(problems[values["group"]], prompt_ids=values.pop("prompt_ids"))
    return Rollout(problem=problem, **values)


def check_ahead(config: Config, phases: Sequence[Phase]) -> None:
    """Raises TrapoError, in one line, where rollouts cannot be drawn ahead, or what is learnt from them would not know
    that they are one update old."""
    if not config.rollout.ahead:
        return
    if config.rollout.engine != "vllm_server":
        _refuse(
            f"rollout.engine={config.rollout.engine}, which generates in this process, on the learner's device; "
            "accepted: vllm_server"
        )
    for phase in phases:
        if phase.schedule.generates:
            _check_phase(phase, config.mode)


def _check_phase(phase: Phase, mode: str) -> None:
    if phase.learns is not None:
        _refuse(f"mode {mode}, whose update is more than its loss")
    if phase.distills is not None:
        _refuse(f"mode {mode}: a teacher's divergence is of the rollouts of the weights that learn")
    if any(group.draw is phase.memory for group in phase.schedule.micro_groups if group.draw is not None):
        _refuse("guidance.find, which cuts a step's prefixes by what the step before it has found; accepted: false")
    own = dataclasses.replace(phase.objective, expert=None)
    if own.has_policy_term and not own.reads & {"old_logprobs", "rollout_logprobs"}:
        name = getattr(own.policy, "__name__", own.policy)
        _refuse(f"objective.policy={name}, which has no ratio to the policy that sampled; accepted: objective.tis_cap")


def _refuse(what: str) -> None:
    raise TrapoError(f"rollout.ahead: got 1 with {what}")
