"""This file says which problems a step sees, and with which seeds: functions of (seed, step) alone, so that a run can
resume."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Literal, cast

from transformers import PreTrainedTokenizerBase

from trapo.data.encode import EncodedProblem, encode_problems, set_chat_template
from trapo.data.loading import load_problems
from trapo.data.problem import prompt_text
from trapo.errors import TrapoError
from trapo.modes import Phase
from trapo.settings.groups import DataConfig


def derive_seed(*parts: object) -> int:
    """Returns a 62-bit seed from anything printable; near-by parts give unrelated seeds."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def problems_at(
    step: int, problems: Sequence[EncodedProblem], count: int, *, seed: int, shuffle: bool
) -> list[EncodedProblem]:
    """Returns the problems of a step (counted from 0): consecutive ones of an order that is shuffled anew each
    epoch."""
    places = range(step * count, (step + 1) * count)
    return [problems[_place(place, len(problems), seed if shuffle else None)] for place in places]


def _place(position: int, count: int, seed: int | None) -> int:
    epoch, place = divmod(position, count)
    return place if seed is None else _epoch_order(seed, epoch, count)[place]


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    order = list(range(count))
    random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
    return order


def load_train_set(
    data: DataConfig,
    plan: Sequence[Phase],
    tokenizer: PreTrainedTokenizerBase,
    log: Callable[[str], None],
    *,
    mode: str,
    max_response_tokens: int,
) -> list[EncodedProblem]:
    """Returns data.train as token ids. A plan that only imitates leaves problems without an expert trace out; of one
    with other phases, `to_imitate` does for the phases that only imitate."""
    if data.train is None:
        raise TrapoError("data.train: missing; give a JSONL or parquet file or a task:// name")
    trace_part = plan[0].schedule.trace_part
    imitates = not any(phase.schedule.generates for phase in plan)
    asked = plan[0].schedule.instruction
    limits = (data.train_limit, tokenizer, log, max_response_tokens)
    problems = _load(data, data.train, *limits, trace_part, imitates, asked)
    with_traces = [p for p in problems if p.traces]
    limit = data.max_trace_tokens
    if some := any(not phase.schedule.generates for phase in plan):
        limit = min(limit, max_response_tokens)
    none = not (to_imitate(problems, max_response_tokens) if some else with_traces)
    if none and any(phase.schedule.guides or phase.needs_traces for phase in plan):
        raise TrapoError(
            f"data.train: {data.train} has no expert trace (of at most {limit} tokens); mode {mode} needs some"
        )
    if any(phase.needs_behaviour for phase in plan):
        without = [p.name for p in with_traces if any(trace.behaviour is None for trace in p.traces)]
        if without:
            raise TrapoError(
                "data.train: objective.expert reads the log-probabilities of what wrote the traces, in a column "
                f"behaviour_logprobs; {len(without)} problems have none (first: {without[0]})"
            )
    if all(phase.needs_traces for phase in plan) and len(with_traces) < len(problems):
        log(f"data.train: {len(problems) - len(with_traces)} problems without an expert trace left out")
        return with_traces
    return problems


def to_imitate(problems: Sequence[EncodedProblem], max_response_tokens: int) -> list[EncodedProblem]:
    """Returns the problems with an expert trace that a response can hold, with those traces."""
    fitting = [tuple(t for t in p.traces if len(t.token_ids) <= max_response_tokens) for p in problems]
    return [dataclasses.replace(p, traces=traces) for p, traces in zip(problems, fitting, strict=True) if traces]


def load_eval_set(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, log: Callable[[str], None]
) -> list[EncodedProblem] | None:
    """Returns data.eval as token ids; None when there is none."""
    if data.eval is None:
        return None
    return _load(data, data.eval, data.eval_limit, tokenizer, log)


def note_shared(
    train: Sequence[EncodedProblem], held_out: Sequence[EncodedProblem] | None, log: Callable[[str], None]
) -> None:
    """Says how many held-out problems are trained on, by question and answer."""
    if held_out is None:
        return

    def content(problem: EncodedProblem) -> tuple[str, str]:
        return prompt_text(problem.problem), problem.problem.answer

    trained = {content(problem) for problem in train}
    if shared := sum(content(problem) in trained for problem in held_out):
        log(
            f"WARNING: data.eval: {shared} of {len(held_out)} problems are in data.train too; accuracy on them is not "
            "that of new ones"
        )


def load_problem_set(
    data: DataConfig, path: str, tokenizer: PreTrainedTokenizerBase, log: Callable[[str], None]
) -> list[EncodedProblem]:
    """Returns the problems of a file that is read as data.eval is, up to data.eval_limit."""
    return _load(data, path, data.eval_limit, tokenizer, log)


def longest_sequence(problems: Sequence[EncodedProblem] | None, max_response_tokens: int) -> int:
    """Returns the tokens of the longest prompt with the longest response; 0 where there is no problem."""
    return max((p.longest_prompt + max_response_tokens for p in problems or ()), default=0)


def _load(
    data: DataConfig,
    path: str,
    limit: int | None,
    tokenizer: PreTrainedTokenizerBase,
    log: Callable[[str], None],
    max_response_tokens: int | None = None,
    trace_part: str = "full",
    whole_traces: bool = False,
    instruction: str | None = None,
) -> list[EncodedProblem]:
    problems = load_problems(
        path,
        system_prompt=data.system_prompt,
        prompt_suffix=data.prompt_suffix,
        limit=limit,
        dedup=data.dedup,
        columns=data.columns,
        on_bad_row=cast(Literal["raise", "skip"], data.on_bad_row),  # config.py has checked it
    )
    set_chat_template(tokenizer, data.chat_template)
    encoded, left_out = encode_problems(
        problems,
        tokenizer,
        max_prompt_tokens=data.max_prompt_tokens,
        max_trace_tokens=data.max_trace_tokens,
        max_response_tokens=max_response_tokens,
        whole_traces=whole_traces,
        trace_part=trace_part,
        instruction=instruction,
    )
    if said := left_out.describe(data.max_prompt_tokens, data.max_trace_tokens, max_response_tokens):
        log(f"{path}: left out {said}")
    for note in left_out.notes:
        log(f"{path}: {note}")
    return encoded
