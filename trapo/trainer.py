"""The trainer runs the loop. SFT, GRPO, SFT -> RL, LUFFY and TRAPO are configurations of it (see modes/).

A step: take prompts; draw their rollouts in micro-groups, guided by an expert prefix where the earlier ones failed;
score; turn rewards into group-relative advantages; one update of the fused loss over expert and own tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trapo.config import Config, default_tree, settle
from trapo.data.encode import EncodedProblem, decode_text
from trapo.data.sampling import (
    derive_seed,
    load_eval_set,
    load_train_set,
    longest_sequence,
    note_shared,
    problems_at,
    to_imitate,
)
from trapo.distillation.making import make_tutor
from trapo.engines.guard import AgreementGuard, unanswered
from trapo.engines.make import make_engine
from trapo.engines.protocol import Engine
from trapo.evaluation.held_out import HeldOut
from trapo.evaluation.prior import Prior, load_prior
from trapo.learner import Learner, Update
from trapo.models import lora
from trapo.models.finite import refuse_not_finite
from trapo.models.loading import check_positions, load_reference, load_trained
from trapo.modes import Course, Phase, phases
from trapo.modes.drawing import Ahead, draw
from trapo.report.display import Display
from trapo.report.loggers import Loggers, check_loggers
from trapo.report.rollout_log import RolloutLog
from trapo.report.step_row import StepClock, training_row
from trapo.report.summary import summarise
from trapo.report.write import write_report
from trapo.rewards import Reward
from trapo.rewards.scoring import FailureNotes, make_pool, score_texts
from trapo.rollouts import Rollout
from trapo.runs.checkpoint import Checkpoint
from trapo.runs.inputs import fingerprints
from trapo.runs.ranks import ALONE, Ranks, Scorer, SharedRewards, joined
from trapo.runs.run_dir import RunDir
from trapo.runs.run_lock import RunLock
from trapo.runs.saving import Saver
from trapo.runs.skips import SkipLimit
from trapo.runs.stopping import Stopped, StopSignal
from trapo.settings.objective import own_terms
from trapo.settings.text import flat, tree_of
from trapo.settings.unused import unused
from trapo.tools.timing import StepTimer


def train_step(
    problems: Sequence[EncodedProblem],
    phase: Phase,
    engine: Engine,
    score: Callable[[Sequence[Rollout]], list[Reward]],
    learner: Learner,
    *,
    baseline: str,
    temperature: float,
    max_response_tokens: int,
    seed: int,
    timer: StepTimer | None = None,
    drawing: AbstractContextManager[None] | None = None,
    drawn: Callable[[list[Rollout]], None] | None = None,
    ahead: Ahead | None = None,
) -> tuple[list[Rollout], Update]:
    """Runs the algorithm once: draw the rollouts of these problems, give them advantages, update the model once.

    It returns the rollouts and what the update did. The engine has the old weights still: `engine.sync` is the
    caller's, who may want to look at the new ones first.
    drawing: a context to draw in. drawn: told of the rollouts before the update; it may change them. ahead: has drawn
    them already, and draws the next step's while the update runs.
    """
    timer, ahead = timer or StepTimer(), ahead or Ahead()
    options: dict[str, Any] = {"baseline": baseline, "temperature": temperature, "seed": seed, "timer": timer}
    fresh = functools.partial(draw, problems, phase, engine, score, max_response_tokens=max_response_tokens, **options)

    def again() -> list[Rollout]:  # of the weights that there are then
        engine.sync(learner.model)
        return fresh()

    with drawing or nullcontext():
        rollouts = ahead.drawn or fresh()
    if drawn is not None:
        drawn(rollouts)
    with timer.part("sync"):
        engine.rest()
    with ahead.meanwhile(timer), timer.part("update"):
        # The expert term on prefixes, the policy term on the model's own tokens: one fused loss.
        trained = [r for r in rollouts if r.trained]
        if phase.weigh is not None:
            phase.weigh(trained, learner)
        update = phase.update(trained, learner, seed, timer, again)
        shown = dict(phase.shown)
        if phase.memory is not None:
            shown |= phase.memory.after(rollouts, learner, seed)
    return rollouts, dataclasses.replace(update, metrics={**update.metrics, **shown})


def train(
    config: Config, *, console: Console, restart_finished: bool = False, accept_changed: bool = False
) -> dict[str, Any]:
    """Run a training run, or continue it from its last checkpoint; returns what is in its summary.json.

    Under torchrun all ranks call it together; the first one shows and writes, the others return {}.
    restart_finished: a finished run is replaced. accept_changed: data or code that changed since the run began is no
    reason not to continue it.
    Raises TrapoError for input that cannot be used, before anything is generated or trained, and Stopped after SIGTERM,
    SIGINT or SIGHUP when everything that is worth keeping is saved.
    """
    with joined() as ranks:
        shown = console if ranks.first else Console(quiet=True)
        return _train(config, shown, ranks, restart_finished=restart_finished, accept_changed=accept_changed)


def _train(
    config: Config, console: Console, ranks: Ranks, *, restart_finished: bool, accept_changed: bool
) -> dict[str, Any]:
    log = functools.partial(console.print, markup=False, highlight=False)
    config = settle(config, log)
    run_dir, plan, settings = RunDir(Path(config.run_dir)), phases(config, ranks.world), tree_of(config)
    check_loggers(config.log)
    for line in dict.fromkeys(line for phase in plan for line in phase.overruled):
        log(line)
    schedules = [phase.schedule for phase in plan]
    objectives = [phase.objective for phase in plan]
    if warning := unused(flat(settings), flat(default_tree()), objectives, schedules, config.mode):
        log(warning)
    resume_from = ranks.once(lambda: run_dir.look(settings, restart_finished=restart_finished, log=log))
    if config.train.threads:
        torch.set_num_threads(config.train.threads)

    def inputs() -> dict[str, str]:
        """Returns the SHA-256 of the files that the run reads, once they are those that it began with."""
        reads_model = resume_from is None or config.lora.rank > 0 or any(phase.needs_base for phase in plan)
        teacher = next((phase.distills.weights for phase in plan if phase.distills is not None), None)
        code = {"reward.function": config.reward.function, **own_terms(config.objective)}
        model = config.model.path if reads_model else None
        now = fingerprints(config.data, code, model, teacher, config.eval.prior)
        run_dir.check_inputs(now, accept_changed=accept_changed, log=log)
        return now

    pool = make_pool(config.reward)
    with pool, StopSignal(ranks) as stop, ExitStack() as held:
        files = ranks.once(inputs)
        scorer = pool if ranks.world == 1 else SharedRewards(pool, ranks)
        trainer = Trainer(config, plan, run_dir, scorer, stop, console, resume_from, ranks)

        def claim() -> None:
            held.enter_context(RunLock(run_dir.path, log))
            run_dir.claim(settings, resume_from, files, log)

        ranks.once(claim)
        with (
            Loggers(config.log, run_dir, trainer.step, settings, enabled=ranks.first) as loggers,
            Display(console, config.train.steps, trainer.step, trainer.ratios) as display,
        ):
            trainer.run(display, loggers)
        return trainer.finish()


def make_learner(
    config: Config,
    model: PreTrainedModel,
    *,
    pad_id: int,
    phase: Phase | None = None,
    reference: PreTrainedModel | None = None,
    ranks: Ranks = ALONE,
) -> Learner:
    """Returns the learner of a configuration, in this phase of it; None: in one that is the whole run."""
    return Learner(
        model,
        config.train,
        config.optim if phase is None else phase.optim,
        temperature=config.rollout.temperature,
        max_response_tokens=config.rollout.max_response_tokens,
        pad_id=pad_id,
        checkpointing=config.model.gradient_checkpointing,
        reference=reference,
        ranks=ranks,
        steps=None if phase is None else phase.steps,
    )


class Trainer:
    """Holds all parts of one run, and runs the loop over its steps."""

    def __init__(
        self,
        config: Config,
        plan: list[Phase],
        run_dir: RunDir,
        pool: Scorer,
        stop: StopSignal,
        console: Console,
        resume_from: Checkpoint | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.run_dir, self.pool, self.stop, self.ranks = config, run_dir, pool, stop, ranks
        self.course, self.ahead = Course(plan, config.train.steps), Ahead(config.rollout.ahead > 0, ranks.world)
        log = functools.partial(console.print, markup=False, highlight=False)
        self.failures = FailureNotes(log)
        self.model, self.tokenizer = self._load_model(resume_from, log)
        limit = config.rollout.max_response_tokens
        self.train_set = load_train_set(
            config.data, plan, self.tokenizer, log, mode=config.mode, max_response_tokens=limit
        )
        self.imitated = to_imitate(self.train_set, limit)  # what phases that only imitate draw from
        eval_set, eval_limit = load_eval_set(config.data, self.tokenizer, log), config.eval.max_response_tokens or limit
        note_shared(self.train_set, eval_set, log)
        longest = max(longest_sequence(self.train_set, limit), longest_sequence(eval_set, eval_limit))
        check_positions(self.model, longest)
        self.engine = make_engine(
            config.rollout,
            self.model,
            self.tokenizer,
            max_tokens=max(longest, config.data.max_prompt_tokens + max(limit, config.eval.max_response_tokens or 0)),
            precision=config.train.precision,
            run_dir=run_dir.path,
            ranks=ranks,
        )
        needs_reference = any(phase.needs_reference for phase in plan)
        reference = load_reference(config.model, ranks, config.train.precision) if needs_reference else None
        self.step, self.seconds_before = 0 if resume_from is None else resume_from.step, 0.0
        self._cut_course()
        phase, pad_id = self.course.at(self.step)[0], self.tokenizer.pad_token_id
        self.learner = make_learner(config, self.model, pad_id=pad_id, phase=phase, reference=reference, ranks=ranks)
        if (how := plan[0].distills) is not None:
            self.learner.tutor = make_tutor(how, self.learner, self.tokenizer, self.train_set, config.model)
        self.guard = AgreementGuard(config.rollout, config.model.dtype, ranks)
        if resume_from is not None:
            state = resume_from.load_state()
            if self.course.at(self.step)[1] > 0:  # else a phase begins here, with an optimizer of its own
                self.learner.load_state_dict(state["learner"], resume_from.shards)
                if (memory := self.course.at(self.step)[0].memory) is not None:
                    memory.load_state_dict(state["memory"], {p.name: p for p in self.train_set})
                self.ahead.load_state_dict(state, self._problems(*self.course.at(self.step)))
            self.seconds_before = state["seconds"]
        self._write_in(run_dir, eval_set, load_prior(config.eval.prior, config.data, self.tokenizer, log))
        self.started = time.monotonic()
        self.timer = StepTimer(self.model.device)
        self.clock = StepClock(self.timer)

    def _load_model(
        self, resume_from: Checkpoint | None, log: Callable[[str], None]
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Returns the model to train, that of the checkpoint where the run goes on."""
        config, source = self.config, self.config.model
        if resume_from is not None:
            source = dataclasses.replace(source, path=str(resume_from.path))
            log(f"continuing {self.run_dir.path} after step {resume_from.step}")
        seed = derive_seed(config.seed, "lora")
        adapt = functools.partial(lora.attach, config=config.lora, base=config.model.path, seed=seed)
        check = resume_from is None  # `look` has checked it
        return load_trained(source, self.ranks, config.train.precision, check=check, change=adapt)

    def _write_in(self, run_dir: RunDir, eval_set: Sequence[EncodedProblem] | None, prior: Prior | None) -> None:
        """Make what writes into the run's folder beside its metrics."""
        config, ranks = self.config, self.ranks
        self.saver = Saver(
            config.checkpoint, tree_of(config), run_dir, self.model, self.tokenizer, self.learner, ranks, self.step
        )
        self.held_out = HeldOut(
            eval_set,
            config.eval,
            self.model,
            config.train.precision,
            self.engine,
            self.pool,
            self.tokenizer,
            run_dir,
            self.stop,
            ranks,
            self.failures,
            max_response_tokens=config.rollout.max_response_tokens,
            steps=config.train.steps,
            seed=config.seed,
            prior=prior,
        )
        self.samples = RolloutLog(config.log, run_dir.rollouts, self.tokenizer, ranks)
        self.skips = SkipLimit(config.train.max_skipped_steps, run_dir)

    @property
    def ratios(self) -> list[float]:
        """Returns the prefix ratios that a phase can use, for the columns of the display."""
        return sorted({g.ratio for phase in self.course.phases for g in phase.schedule.micro_groups})

    @property
    def seconds(self) -> float:
        """Returns the wall-clock seconds of the run so far, those before an interruption included."""
        return self.seconds_before + time.monotonic() - self.started

    def run(self, display: Display, loggers: Loggers) -> None:
        """Evaluate, train the remaining steps, evaluate. Raises Stopped after a signal, all finished steps saved."""
        try:
            self._run(display, loggers)
        except Stopped as stopped:
            if self.step > self.saver.step:
                self._save(display, must=True)
            again = "there is nothing to save yet, and the same command starts at step 1"
            again = "the same command continues from there" if self.saver.step else again
            what = f"stopped by {self.stop.name} after step {self.step}; {again}"
            raise Stopped(what, number=stopped.number) from None

    def _run(self, display: Display, loggers: Loggers) -> None:
        steps, evaluations = self.config.train.steps, self.config.eval.every
        self._check_engine(unanswered(self.train_set[:4]))
        # An interruption may have fallen into the evaluation that follows a step, or a save and that.
        if self.held_out.is_due(self.step):
            self._evaluate(display, loggers)
        while self.step < steps:
            display.status("training")
            row = self._train_step(*self.course.at(self.step))
            self.step += 1
            self._begin_phase()
            self.ranks.once(functools.partial(self.run_dir.log, row))
            display.update(row)
            loggers.update(row)
            self.skips.check(row, display.note)
            if self.saver.is_due(self.step, steps, evaluations):
                self._save(display)
            if self.held_out.is_due(self.step):
                self._evaluate(display, loggers)
        self.ranks.once(self.skips.refuse_nothing_learnt)
        self._evaluate(display, loggers)

    def _begin_phase(self) -> None:
        """Takes a new optimizer where the next step is the first of another phase."""
        phase, number = self.course.at(self.step)
        if number == 0 and 0 < self.step < self.config.train.steps:
            self.learner.begin(phase.optim, phase.steps)

    def _cut_course(self) -> bool:
        """Ends an SFT phase that lasts until a plateau, where the evaluations so far show one, and returns whether it
        did."""
        return self.course.waits and self.course.cut(self.ranks.once(lambda: self.run_dir.trace_nlls(self.step)))

    def _train_step(self, phase: Phase, number: int) -> dict[str, Any]:
        """Makes the step of this number of a phase; returns its line of metrics.jsonl."""
        seed = derive_seed(self.config.seed, "step", number)
        started, lr = time.monotonic(), self.learner.lr
        self.ahead.next = self._draw_next(phase, number + 1)
        rollouts, update = train_step(
            self._problems(phase, number),
            phase.at(number),
            self.engine,
            self._score,
            self.learner,
            **self._drawing,
            seed=seed,
            timer=self.timer,
            drawing=self.stop.abandonable(),
            drawn=functools.partial(self._note_rollouts, phase, seed),
            ahead=self.ahead,
        )
        refuse_not_finite(self.model, self.ranks, self.step + 1, self.saver.step, trained=True)
        with self.timer.part("sync"):
            self.engine.sync(self.model)
            mismatch = self._check_engine(rollouts)
        row = training_row(self.step + 1, phase, rollouts, update, lr=lr, engine_mismatch=mismatch)
        took, left = time.monotonic() - started, self.config.train.steps - self.step - 1
        return row | self.clock.row(rollouts, update, took=took, seconds=self.seconds, steps_left=left)

    @property
    def _drawing(self) -> dict[str, Any]:
        """Returns what every drawing of rollouts is told."""
        rollout = self.config.rollout
        options = {"temperature": rollout.temperature, "max_response_tokens": rollout.max_response_tokens}
        return {"baseline": self.config.advantage.baseline, **options}

    def _draw_next(self, phase: Phase, number: int) -> Callable[[], list[Rollout]] | None:
        """Returns what draws the rollouts of the step of this number ahead; None where the step does it itself. A phase
        begins with rollouts of its own."""
        if not self.config.rollout.ahead or not phase.schedule.generates or number >= phase.steps:
            return None
        seed, problems = derive_seed(self.config.seed, "step", number), self._problems(phase, number)
        return functools.partial(draw, problems, phase.at(number), self.engine, self._score, **self._drawing, seed=seed)

    def _problems(self, phase: Phase, number: int) -> list[EncodedProblem]:
        """Returns the problems of the step of this number of a phase."""
        count, config = phase.prompts_per_step, self.config
        some = self.train_set if phase.schedule.generates else self.imitated
        return problems_at(number, some, count, seed=config.seed, shuffle=config.data.shuffle)

    def _score(self, rollouts: Sequence[Rollout]) -> list[Reward]:
        texts = [decode_text(self.tokenizer, r.response_ids) for r in rollouts]
        return score_texts(self.pool, texts, [r.problem.problem for r in rollouts])

    def _note_rollouts(self, phase: Phase, seed: int, rollouts: Sequence[Rollout]) -> None:
        """Write a sample of them to rollouts.jsonl, and say which rewards failed."""
        self.samples.note(self.step, rollouts, scored=phase.needs_rewards, seed=seed)
        if phase.needs_rewards:
            self.failures.check([Reward(r.reward, r.status, r.detail) for r in rollouts], f"step {self.step + 1}")

    def _check_engine(self, rollouts: Sequence[Rollout]) -> float | None:
        """Returns the mean difference of the engine's log-probabilities from the learner's; too large a one stops the
        run."""
        seed = derive_seed(self.config.seed, "guard", self.step)
        return self.guard.check(self.engine, rollouts, self.learner.own_logprobs, seed=seed)

    def _evaluate(self, display: Display, loggers: Loggers) -> None:
        """Evaluates now, and shows the held-out accuracy; left alone when an interrupted run already has it."""
        with self.timer.part("evaluate"):
            result = self.held_out.evaluate(self.step, display.announce)
        if result is None:
            return
        loggers.evaluation(self.step, result)
        display.note(f"held-out accuracy after step {self.step}: {result}")
        if self._cut_course():
            self._begin_phase()
            display.note(f"the traces get no likelier: the phase {self.course.at(self.step)[0].name} begins")
        self.saver.prune(display.note)

    def _save(self, display: Display, *, must: bool = False) -> None:
        display.status("saving")
        memory = self.course.at(self.step)[0].memory
        more = {} if memory is None else {"memory": memory.state_dict()}
        with self.timer.part("save"):
            self.saver.save(self.step, self.seconds, display.note, must=must, more=more | self.ahead.state_dict())

    def finish(self) -> dict[str, Any]:
        """Write the final model, the report and, last of all, the summary."""
        with self.timer.part("save"):
            self.saver.write_final(self.step)
        summary = self.ranks.once(self._conclude)
        return summary if self.ranks.first else {}

    def _conclude(self) -> dict[str, Any]:
        about = (self.config.mode, self.config.model, self.step, self.seconds)
        summary = summarise(self.run_dir, *about, self.timer.take())
        write_report(self.run_dir.path, summary)
        self.run_dir.finish(summary)
        return summary
