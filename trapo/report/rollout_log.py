"""The file rollouts.jsonl has a few rollouts of some steps, as text, for people to read (`trapo report` shows them)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from trapo.data.encode import decode_text
from trapo.data.problem import Problem
from trapo.rollouts import Rollout
from trapo.runs.run_dir import append_rows
from trapo.settings.groups import LogConfig


class RolloutLog:
    """Writes the file of a run. path: None where another rank writes it."""

    def __init__(self, log: LogConfig, path: Path | None, tokenizer: PreTrainedTokenizerBase) -> None:
        self.log, self.path, self.tokenizer = log, path, tokenizer

    def note(self, step: int, rollouts: Sequence[Rollout], *, scored: bool, seed: int) -> None:
        """Write a sample of a step's rollouts, every log.rollouts_every steps. step: counted from 0."""
        if self.path is None or not self.log.rollouts_every or step % self.log.rollouts_every:
            return
        chosen = sample_rollouts(rollouts, self.log.rollouts, seed)
        append_rows(self.path, [rollout_row(step + 1, r, self.tokenizer, scored=scored) for r in chosen])


def sample_rollouts(rollouts: Sequence[Rollout], count: int, seed: int) -> list[Rollout]:
    """Returns at most `count` of a step's rollouts, in turns from each guidance ratio, so that rare ones are seen
    too."""
    by_ratio: dict[float, list[Rollout]] = {}
    for rollout in random.Random(seed).sample(list(rollouts), len(rollouts)):
        by_ratio.setdefault(rollout.ratio, []).append(rollout)
    turns = [(turn, ratio) for ratio, drawn in by_ratio.items() for turn in range(len(drawn))]
    return [by_ratio[ratio][turn] for turn, ratio in sorted(turns)[:count]]


def rollout_row(step: int, rollout: Rollout, tokenizer: PreTrainedTokenizerBase, *, scored: bool) -> dict[str, Any]:
    """Returns a line of rollouts.jsonl. step: as in metrics.jsonl, counted from 1."""
    problem = rollout.problem.problem
    prefix, own = _split_text(rollout, tokenizer)
    return {
        "step": step,
        "id": problem.id,
        "prompt": _prompt_text(problem),
        "answer": problem.answer,
        "prefix": prefix,
        "own": own,
        "prefix_tokens": len(rollout.prefix_ids),
        "own_tokens": len(rollout.own_ids),
        "level": rollout.level,
        "ratio": rollout.ratio,
        "supervised": rollout.supervised,
        "finished": rollout.finished,
        "reward": rollout.reward if scored else None,
        "status": rollout.status,
        "detail": rollout.detail,
        "advantage": rollout.advantage if scored else None,
    }


def _prompt_text(problem: Problem) -> str:
    """Returns the chat but for its system prompt; who says what is told where there are examples before the
    question."""
    messages = [m for m in problem.prompt if m["role"] != "system"]
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)


def _split_text(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Returns the texts of prefix and own tokens. Own text is what the whole has beyond the prefix: decoders may drop a
    blank at the start of a text."""
    whole, prefix = decode_text(tokenizer, rollout.response_ids), decode_text(tokenizer, rollout.prefix_ids)
    if whole.startswith(prefix):
        return prefix, whole[len(prefix) :]
    return prefix, decode_text(tokenizer, rollout.own_ids)  # a character whose bytes lie on both sides
