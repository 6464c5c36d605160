"""Accuracy on held-out problems: greedy, avg@k and pass@k, with a 95% interval."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from trapo.config import Config
from trapo.encode import EncodedProblem, decode_text
from trapo.errors import TrapoError
from trapo.files import write_atomic, write_json
from trapo.model import load_model
from trapo.ranks import Scorer
from trapo.rewards import RewardPool
from trapo.rollout import Engine, Request, make_engine
from trapo.sampling import load_eval_set
from trapo.stats import bootstrap_interval, pass_at_k, wilson_interval


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """accuracy: mean reward over problems and samples (avg@k); interval: its 95% interval, Wilson's for one sample a
    problem, a bootstrap over problems for more; pass_at: k -> pass@k (Chen et al. 2021), for powers of two up to k."""

    accuracy: float
    interval: tuple[float, float]
    problems: int
    samples: int
    pass_at: dict[str, float]
    finished: float  # share of responses that ended by themselves
    mean_tokens: float
    reward_failures: dict[str, int]

    @classmethod
    def load(cls, path: Path) -> EvalResult:
        """Read what `EvalResult.save` wrote."""
        raw = json.loads(path.read_text())
        return cls(**{**raw, "interval": tuple(raw["interval"])})

    def save(self, path: Path) -> None:
        write_json(path, dataclasses.asdict(self))

    def __str__(self) -> str:
        low, high = self.interval
        several = f", {self.samples} samples each" if self.samples > 1 else ""
        return f"{self.accuracy:.1%} [{low:.1%}, {high:.1%}] of {self.problems} problems{several}"


def evaluate_model(config: Config, log: Callable[[str], None]) -> EvalResult:
    """`trapo eval`: model.path on data.eval. Raises TrapoError when data.eval is missing or cannot be read."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    model, tokenizer = load_model(config.model)
    problems = load_eval_set(config, tokenizer, log)
    if problems is None:
        raise TrapoError("data.eval: missing; give a JSONL or parquet file or a task:// name")
    engine = make_engine(config, model, tokenizer)
    path = Path(config.run_dir) / "eval.json"
    reward = config.reward
    with RewardPool(reward.function, workers=reward.workers, timeout=reward.timeout) as pool:
        result = evaluate(
            problems, engine, pool, tokenizer, config, seed=config.seed, rows_path=path.with_suffix(".jsonl")
        )
    result.save(path)
    return result


def evaluate(
    problems: Sequence[EncodedProblem],
    engine: Engine,
    pool: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    *,
    seed: int,
    rows_path: Path | None = None,
) -> EvalResult:
    """Generate `eval.samples` responses to each problem and score them.

    rows_path: where to write one JSON row per response (id, answer, text, reward, status).
    """
    samples = config.eval.samples
    limit = config.eval.max_response_tokens or config.rollout.max_response_tokens
    asked = [problem for problem in problems for _ in range(samples)]
    completions = engine.generate(
        [Request(problem.prompt_ids, limit) for problem in asked],
        temperature=config.eval.temperature,
        seed=seed,
    )
    texts = [decode_text(tokenizer, c.token_ids) for c in completions]
    rewards = pool.score([(text, p.problem.answer) for text, p in zip(texts, asked, strict=True)])
    if rows_path is not None:
        rows = [
            {"id": p.problem.id, "source": p.problem.source, "answer": p.problem.answer, "text": text}
            | {"reward": r.value, "status": r.status, "tokens": len(c.token_ids), "finished": c.finished}
            for p, text, r, c in zip(asked, texts, rewards, completions, strict=True)
        ]
        write_atomic(rows_path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    failures: dict[str, int] = {}
    for reward in rewards:
        if reward.status != "ok":
            failures[reward.status] = failures.get(reward.status, 0) + 1
    values = [r.value for r in rewards]
    return _summarise(
        [values[i : i + samples] for i in range(0, len(values), samples)],
        finished=sum(c.finished for c in completions) / len(completions),
        mean_tokens=sum(len(c.token_ids) for c in completions) / len(completions),
        reward_failures=failures,
    )


def _summarise(by_problem: list[list[float]], **rest: Any) -> EvalResult:
    samples = len(by_problem[0])
    means = [sum(values) / samples for values in by_problem]
    accuracy = sum(means) / len(means)
    right = [sum(value >= 1.0 for value in values) for values in by_problem]
    binary = samples == 1 and all(value in (0.0, 1.0) for values in by_problem for value in values)
    interval = wilson_interval(sum(right), len(right)) if binary else bootstrap_interval(means)
    ks = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
    pass_at = {str(k): sum(pass_at_k(samples, c, k) for c in right) / len(right) for k in ks}
    return EvalResult(accuracy, interval, len(means), samples, pass_at, **rest)
