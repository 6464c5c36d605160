"""A run that trains measures its held-out accuracy here, before, between and after its steps, each time once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trapo.data.encode import EncodedProblem
from trapo.data.sampling import derive_seed
from trapo.engines.protocol import Engine
from trapo.evaluation.evaluate import EvalResult, evaluate, with_prior
from trapo.evaluation.likelihood import trace_likelihood
from trapo.evaluation.prior import Prior
from trapo.rewards.scoring import FailureNotes
from trapo.runs.ranks import Ranks, Scorer
from trapo.runs.run_dir import RunDir
from trapo.runs.stopping import StopSignal
from trapo.settings.groups import EvalConfig


@dataclasses.dataclass
class HeldOut:
    """Makes the evaluations of a run, whose results are files of its folder. With several ranks all of them ask
    together.

    problems: those of data.eval; None: there is none, and nothing is evaluated. max_response_tokens: that of the
    rollouts, where eval.* has none of its own. steps: of the whole run. seed: the run's. prior: what the base model
    could do, measured beside them.
    """

    problems: Sequence[EncodedProblem] | None
    config: EvalConfig
    model: PreTrainedModel
    precision: str  # of forwards, as train.precision
    engine: Engine
    pool: Scorer
    tokenizer: PreTrainedTokenizerBase
    run_dir: RunDir
    stop: StopSignal
    ranks: Ranks
    failures: FailureNotes
    max_response_tokens: int
    steps: int
    seed: int
    prior: Prior | None = None

    def is_due(self, step: int) -> bool:
        """Returns whether an evaluation belongs between this step, the last one that was made, and the next one."""
        if step == 0:
            return self.config.before
        return self.config.every > 0 and step % self.config.every == 0 and step < self.steps

    def evaluate(self, step: int, status: Callable[[str], None]) -> EvalResult | None:
        """Returns the accuracy after this step and writes it down; None where the run has it already, as one that was
        interrupted may. status: told what is going on."""
        path = self.run_dir.evaluation(step)
        if self.problems is None or path.exists():
            return None
        status(f"evaluating {len(self.problems)} problems")
        with self.stop.abandonable():
            result = evaluate(
                self.problems,
                self.engine,
                self.pool,
                self.tokenizer,
                max_response_tokens=self.config.max_response_tokens or self.max_response_tokens,
                temperature=self.config.temperature,
                samples=self.config.samples,
                seed=derive_seed(self.seed, "eval", step),
                rows_path=path.with_suffix(".jsonl"),
                ranks=self.ranks,
                failures=self.failures,
            )
            result = result.with_traces(trace_likelihood(self.model, self.problems, self.precision, self.ranks))
            if self.prior is not None:
                limit = self.config.max_response_tokens or self.max_response_tokens
                result = with_prior(
                    result, self.prior, self.model, self.precision, self.engine, self.pool, self.tokenizer, limit,
                    self.ranks,
                )  # fmt: skip
        self.ranks.once(lambda: result.save(path))
        return result
