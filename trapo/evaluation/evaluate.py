"""This file measures accuracy on held-out problems: greedy, avg@k and pass@k, with a 95% interval."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trapo.data.encode import EncodedProblem, decode_text
from trapo.data.problem import prompt_text
from trapo.data.sampling import derive_seed, load_eval_set
from trapo.engines.guard import AgreementGuard, plain_scorer, unanswered
from trapo.engines.make import make_engine
from trapo.engines.protocol import Completion, Engine, Request
from trapo.errors import TrapoError
from trapo.evaluation.answers import Answers, Row, in_blocks
from trapo.evaluation.likelihood import Likelihood, trace_likelihood
from trapo.evaluation.prior import Prior, load_prior
from trapo.evaluation.stats import bootstrap_interval, mean_interval, pass_at_k, wilson_interval
from trapo.models import agreement
from trapo.models.loading import check_positions, load_trained
from trapo.rewards import Reward
from trapo.rewards.scoring import FailureNotes, make_pool, score_texts
from trapo.runs.ranks import ALONE, Ranks, Scorer, SharedRewards, joined
from trapo.runs.run_dir import refuse_unwritable
from trapo.settings.groups import DataConfig, EvalConfig, ModelConfig, RewardConfig, RolloutConfig
from trapo.tools.files import write_atomic, write_json


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Holds what an evaluation found. accuracy: mean reward over problems and samples (avg@k); interval: its 95%
    interval, Wilson's for one sample a problem, a bootstrap over problems for more (Wilson's again where all problems
    came out the same, of which a bootstrap knows no interval); pass_at: k -> pass@k (Chen et al. 2021), for powers of
    two up to the number of samples, and for that, with pass_at_interval by the same rule; bootstrap: the 95% bootstrap
    interval, None where it knows none."""

    accuracy: float
    interval: tuple[float, float]
    problems: int
    samples: int
    pass_at: dict[str, float]
    finished: float  # share of responses that ended by themselves
    mean_tokens: float
    reward_failures: dict[str, int]
    bootstrap: tuple[float, float] | None = None
    pass_at_interval: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    trace_nll: float | None = None  # of a token of the problems' expert traces, nats; None: they have none
    trace_tokens: int = 0
    prior_nll: float | None = None  # of a token of eval.prior's texts, or of its problems' traces
    prior_tokens: int = 0
    prior_accuracy: float | None = None  # on eval.prior's problems, greedily

    @classmethod
    def load(cls, path: Path) -> EvalResult:
        """Read what `EvalResult.save` wrote."""
        return cls.from_dict(json.loads(path.read_text()))

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> EvalResult:
        """Makes a result of what `dataclasses.asdict` gave, whose pairs JSON has turned into lists."""
        pairs = {key: tuple(raw[key]) for key in ("interval", "bootstrap") if raw.get(key) is not None}
        at = {k: tuple(pair) for k, pair in raw.get("pass_at_interval", {}).items()}
        return cls(**{**raw, **pairs, "pass_at_interval": at})

    def save(self, path: Path) -> None:
        write_json(path, dataclasses.asdict(self))

    def with_traces(self, likely: Likelihood | None) -> EvalResult:
        """Returns the result with the likelihood of the problems' expert traces."""
        if likely is None:
            return self
        return dataclasses.replace(self, trace_nll=likely.nll, trace_tokens=likely.tokens)

    def __str__(self) -> str:
        traces = "" if self.trace_nll is None else f", traces {self.trace_nll:.3f} nats a token"
        prior = "" if self.prior_accuracy is None else f", prior {self.prior_accuracy:.1%}"
        prior += "" if self.prior_nll is None else f", prior {self.prior_nll:.3f} nats a token"
        return self._accuracy() + traces + prior

    def _accuracy(self) -> str:
        low, high = self.interval
        several = f", {self.samples} samples each" if self.samples > 1 else ""
        return f"{self.accuracy:.1%} [{low:.1%}, {high:.1%}] of {self.problems} problems{several}"


@dataclasses.dataclass(frozen=True)
class EvalJob:
    """Holds what `trapo eval` is given: an evaluation without a training run around it."""

    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig
    reward: RewardConfig
    eval: EvalConfig
    precision: str  # as train.precision
    threads: int | None  # of torch on CPUs; None: torch's default
    seed: int
    run_dir: Path
    ranks: Ranks = ALONE

    @property
    def max_response_tokens(self) -> int:
        return self.eval.max_response_tokens or self.rollout.max_response_tokens

    def set_threads(self) -> None:
        if self.threads:
            torch.set_num_threads(self.threads)

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Returns the model, sharded over the ranks, and its tokenizer."""
        return load_trained(self.model, self.ranks, self.precision)

    @contextmanager
    def pool(self) -> Iterator[Scorer]:
        """Opens a pool of rewards, which ranks share."""
        with make_pool(self.reward) as pool:
            yield SharedRewards(pool, self.ranks) if self.ranks.world > 1 else pool

    def make_engine(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Engine:
        longest = max(self.rollout.max_response_tokens, self.eval.max_response_tokens or 0)
        return make_engine(
            self.rollout,
            model,
            tokenizer,
            max_tokens=self.data.max_prompt_tokens + longest,
            precision=self.precision,
            run_dir=self.run_dir,
            ranks=self.ranks,
        )

    def check_engine(self, engine: Engine, model: PreTrainedModel, problems: Sequence[EncodedProblem]) -> None:
        """Raises TrapoError when the fused head's logits are not the model's, or the engine's weights are not."""
        check_positions(model, max(len(p.prompt_ids) for p in problems) + self.max_response_tokens)
        agreement.check_model(model, self.precision)
        guard = AgreementGuard(self.rollout, self.model.dtype, self.ranks)
        guard.check(engine, unanswered(problems[:4]), plain_scorer(model, self.rollout.temperature), seed=self.seed)


def evaluate_model(job: EvalJob, log: Callable[[str], None]) -> EvalResult:
    """Runs `trapo eval`: model.path on data.eval; under torchrun all ranks call it together. Raises TrapoError when
    data.eval is missing or cannot be read, or run_dir cannot be written."""
    with joined() as ranks:
        return _evaluate_model(dataclasses.replace(job, ranks=ranks), log)


def _evaluate_model(job: EvalJob, log: Callable[[str], None]) -> EvalResult:
    job.ranks.once(lambda: refuse_unwritable(job.run_dir))
    job.set_threads()
    model, tokenizer = job.load()
    problems = load_eval_set(job.data, tokenizer, log)
    if problems is None:
        raise TrapoError(
            "data.eval: missing; give a JSONL or parquet file or a task:// name, or benchmarks as eval.suite=math"
        )
    engine = job.make_engine(model, tokenizer)
    job.check_engine(engine, model, problems)
    path = job.run_dir / "eval.json"
    with job.pool() as pool:
        result = evaluate(
            problems,
            engine,
            pool,
            tokenizer,
            max_response_tokens=job.max_response_tokens,
            temperature=job.eval.temperature,
            samples=job.eval.samples,
            seed=job.seed,
            rows_path=path.with_suffix(".jsonl"),
            ranks=job.ranks,
            failures=FailureNotes(log),
        )
        result = result.with_traces(trace_likelihood(model, problems, job.precision, job.ranks))
        if (prior := load_prior(job.eval.prior, job.data, tokenizer, log)) is not None:
            limit = job.max_response_tokens
            result = with_prior(result, prior, model, job.precision, engine, pool, tokenizer, limit, job.ranks)
    job.ranks.once(lambda: result.save(path))
    return result


def with_prior(
    result: EvalResult,
    prior: Prior,
    model: PreTrainedModel,
    precision: str,
    engine: Engine,
    pool: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    max_response_tokens: int,
    ranks: Ranks = ALONE,
) -> EvalResult:
    """Returns the result with what the model still can do of what the base model could."""
    nll, tokens = prior.nll(model, precision, ranks)
    accuracy = None
    if prior.problems:
        limit = max_response_tokens
        accuracy = evaluate(prior.problems, engine, pool, tokenizer, max_response_tokens=limit, seed=0).accuracy
    return dataclasses.replace(result, prior_nll=nll, prior_tokens=tokens, prior_accuracy=accuracy)


def evaluate(
    problems: Sequence[EncodedProblem],
    engine: Engine,
    pool: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_response_tokens: int,
    temperature: float | None = None,
    samples: int = 1,
    seed: int,
    rows_path: Path | None = None,
    ranks: Ranks = ALONE,
    failures: FailureNotes | None = None,
    answers: Answers | None = None,
    at_once: int | None = None,
) -> EvalResult:
    """Generate `samples` responses to each problem and score them. temperature: 0 or None is greedy.

    rows_path: where to write one JSON row per response (id, prompt, answer, text, reward, status, detail); of several
    ranks the first one writes.
    failures: told of the rewards; raises TrapoError, after the rows are written, where none can be had. answers: what
    was answered earlier, and where to keep what is. at_once: so many problems are asked, answered and kept together;
    None: all. Each response has random numbers of its own, so that neither decides what is sampled.
    """

    def ask(places: Sequence[int]) -> dict[int, list[Row]]:
        asked = [(problems[i], i * samples + n) for i in places for n in range(samples)]
        requests = [Request(p.prompt_ids, max_response_tokens, seed=derive_seed(seed, number)) for p, number in asked]
        completions = engine.generate(requests, temperature=temperature or 0.0, seed=derive_seed(seed, *places[:1]))
        texts = [decode_text(tokenizer, c.token_ids) for c in completions]
        rewards = score_texts(pool, texts, [p.problem for p, _ in asked])
        parts = zip(asked, texts, rewards, completions, strict=True)
        rows = [_row(p, text, reward, completion) for (p, _), text, reward, completion in parts]
        return {i: rows[n * samples : (n + 1) * samples] for n, i in enumerate(places)}

    found = answers.load() if answers is not None else {}
    for block in in_blocks([i for i in range(len(problems)) if i not in found], at_once or len(problems)):
        found |= (latest := ask(block))
        if answers is not None:
            answers.add(latest)
    by_problem = [found[i] for i in range(len(problems))]
    rows = [row for of_problem in by_problem for row in of_problem]
    if rows_path is not None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        ranks.once(lambda: write_atomic(rows_path, text))
    if failures is not None:
        rewards = [Reward(row["reward"], row["status"], row["detail"]) for row in rows]
        failures.check(rewards, f"the evaluation of {len(problems)} problems")
    return _summarise(
        [[row["reward"] for row in of_problem] for of_problem in by_problem],
        finished=sum(row["finished"] for row in rows) / len(rows),
        mean_tokens=sum(row["tokens"] for row in rows) / len(rows),
        reward_failures=dict(Counter(row["status"] for row in rows if row["status"] != "ok")),
    )


def _row(encoded: EncodedProblem, text: str, reward: Reward, completion: Completion) -> Row:
    problem = encoded.problem
    return {
        "id": problem.id,
        "source": problem.source,
        "prompt": prompt_text(problem),
        "answer": problem.answer,
        "text": text,
        "reward": reward.value,
        "status": reward.status,
        "detail": reward.detail,
        "tokens": len(completion.token_ids),
        "finished": completion.finished,
    }


def _summarise(by_problem: list[list[float]], **rest: Any) -> EvalResult:
    samples = len(by_problem[0])
    means = [sum(values) / samples for values in by_problem]
    accuracy = sum(means) / len(means)
    right = [sum(value >= 1.0 for value in values) for values in by_problem]
    binary = samples == 1 and all(value in (0.0, 1.0) for values in by_problem for value in values)
    interval = wilson_interval(sum(right), len(right)) if binary else mean_interval(means)
    ks = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
    if samples not in ks:
        ks.append(samples)
    passes = {str(k): [pass_at_k(samples, c, k) for c in right] for k in ks}
    return EvalResult(
        accuracy,
        interval,
        len(means),
        samples,
        pass_at={k: sum(values) / len(values) for k, values in passes.items()},
        bootstrap=bootstrap_interval(means) if len(set(means)) > 1 else None,
        pass_at_interval={k: mean_interval(values) for k, values in passes.items()},
        **rest,
    )
