"""Problems as token ids: the chat template around the prompt, the end-of-sequence token after each trace."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

from trapo.data import Problem
from trapo.errors import TrapoError
from trapo.guidance import MicroGroup, Schedule, prefix_length, thinking_part, trace_index


@dataclasses.dataclass(frozen=True)
class Trace:
    token_ids: tuple[int, ...]  # with the end-of-sequence token
    blank_lines: tuple[int, ...]  # positions of the tokens that complete a blank line


@dataclasses.dataclass(frozen=True)
class EncodedProblem:
    problem: Problem
    prompt_ids: tuple[int, ...]
    traces: tuple[Trace, ...]

    def prefix(self, schedule: Schedule, micro_group: int, rng: random.Random) -> tuple[int, ...]:
        """The expert prefix that a guided micro-group (counted from 0) continues; () without traces."""
        if not self.traces:
            return ()
        group: MicroGroup = schedule.micro_groups[micro_group]
        trace = self.traces[trace_index(schedule.traces, len(self.traces), micro_group, rng)]
        length = prefix_length(len(trace.token_ids), group.ratio, schedule.cut, trace.blank_lines)
        return trace.token_ids[:length]


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """What `encode_problems` did not keep, for one line in the log."""

    long_prompts: int
    long_traces: int
    first_prompt: str = ""  # id of the first problem that each number counts
    first_trace: str = ""

    def describe(self, max_prompt_tokens: int, max_trace_tokens: int) -> str:
        """What was left out, how many and which first; "" for nothing."""
        parts = []
        if self.long_prompts:
            parts.append(f"{self.long_prompts} prompts over {max_prompt_tokens} tokens (first: {self.first_prompt})")
        if self.long_traces:
            parts.append(f"{self.long_traces} traces over {max_trace_tokens} tokens (first: {self.first_trace})")
        return " and ".join(parts)


def encode_problems(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    max_trace_tokens: int,
    trace_part: str = "full",
) -> tuple[list[EncodedProblem], LeftOut]:
    """Token ids of all problems. Prompts over the limit are left out whole, traces over it singly.

    Raises TrapoError when the tokenizer has no chat template or when no problem is left.
    """
    if not tokenizer.chat_template:
        raise TrapoError("model.path: the tokenizer has no chat template, which the prompts need")
    encoder = TraceEncoder(tokenizer, trace_part)
    kept: list[EncodedProblem] = []
    long_prompts: list[str] = []  # ids
    long_traces: list[str] = []
    for problem in problems:
        prompt_ids = cast(
            list[int],
            tokenizer.apply_chat_template(list(problem.prompt), add_generation_prompt=True, return_dict=False),
        )
        if len(prompt_ids) > max_prompt_tokens:
            long_prompts.append(problem.id)
            continue
        traces = [encoder.encode(trace) for trace in problem.traces]
        short = tuple(t for t in traces if len(t.token_ids) <= max_trace_tokens)
        long_traces += [problem.id] * (len(traces) - len(short))
        kept.append(EncodedProblem(problem, tuple(prompt_ids), short))
    if not kept:
        raise TrapoError(
            f"data.max_prompt_tokens: all {len(problems)} prompts are longer than {max_prompt_tokens} tokens; "
            f"the first: {long_prompts[0]}"
        )
    first_prompt, first_trace = (ids[0] if ids else "" for ids in (long_prompts, long_traces))
    return kept, LeftOut(len(long_prompts), len(long_traces), first_prompt, first_trace)


def decode_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """What a reader sees of a response: its text without special tokens."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))


class TraceEncoder:
    """Expert traces as token ids. part: the Schedule's trace_part."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, part: str) -> None:
        self.tokenizer = tokenizer
        self.part = part
        self._texts: dict[int, str] = {}  # per token id, decoded once

    def encode(self, text: str) -> Trace:
        if self.part == "thinking":
            text = thinking_part(text)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]
        texts = [self._text(token) for token in ids]
        return Trace(tuple(ids), tuple(i for i in range(len(ids)) if _ends_blank_line(texts, i)))

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = str(self.tokenizer.decode([token]))
        return self._texts[token]


def _ends_blank_line(texts: Sequence[str], i: int) -> bool:
    """Whether token i holds a blank line, or the second half of one: some vocabularies have no token for both."""
    return "\n\n" in texts[i] or (i > 0 and texts[i].startswith("\n") and texts[i - 1].endswith("\n"))
