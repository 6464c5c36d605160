"""Problems become token ids here: the chat template around the prompt, the end-of-sequence token after each trace."""

from __future__ import annotations

import dataclasses
import functools
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from transformers import PreTrainedTokenizerBase

from trapo.data.problem import Message, Problem
from trapo.errors import TrapoError, words_of
from trapo.guidance import MicroGroup, Schedule, prefix_length, thinking_part, trace_index


@dataclasses.dataclass(frozen=True)
class Trace:
    token_ids: tuple[int, ...]  # with the end-of-sequence token
    blank_lines: tuple[int, ...]  # positions of the tokens that complete a blank line
    behaviour: tuple[float, ...] | None = None  # log-probabilities of the tokens under what wrote it; None: unknown


@dataclasses.dataclass(frozen=True)
class EncodedProblem:
    problem: Problem
    prompt_ids: tuple[int, ...]
    traces: tuple[Trace, ...]
    around: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # an instruction before and behind a prefix

    def asked_to_continue(self, prefix: tuple[int, ...]) -> EncodedProblem:
        """Returns the problem with a prefix in its prompt, by the instruction that it was encoded with."""
        assert self.around is not None
        before, behind = self.around
        return dataclasses.replace(self, prompt_ids=before + prefix + behind)

    @property
    def longest_prompt(self) -> int:
        """Returns the tokens of its prompt; with an instruction, of that with a whole trace in it."""
        trace = max((len(t.token_ids) for t in self.traces), default=0)
        return max(len(self.prompt_ids), sum(map(len, self.around)) + trace if self.around else 0)

    @property
    def name(self) -> str:
        """Is the problem's id."""
        return self.problem.id

    def prefix(self, schedule: Schedule, micro_group: int, rng: random.Random) -> tuple[int, ...]:
        """Returns the expert prefix that a guided micro-group (counted from 0) continues; () without traces."""
        return prefix_of(self.traces, schedule, micro_group, rng)


def prefix_of(traces: Sequence[Trace], schedule: Schedule, micro_group: int, rng: random.Random) -> tuple[int, ...]:
    """Returns the prefix of a trace that a guided micro-group (counted from 0) continues; () without traces."""
    if not traces:
        return ()
    group: MicroGroup = schedule.micro_groups[micro_group]
    trace = traces[trace_index(schedule.traces, len(traces), micro_group, rng)]
    length = prefix_length(len(trace.token_ids), group.ratio, schedule.cut, trace.blank_lines)
    return trace.token_ids[:length]


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """Counts what `encode_problems` did not keep or not take as it stands, for a few lines in the log."""

    long_prompts: int
    long_traces: int
    first_prompt: str = ""  # id of the first problem that each number counts
    first_trace: str = ""
    unfit_traces: int = 0  # that no response can hold
    first_unfit: str = ""
    notes: tuple[str, ...] = ()  # a line each

    def describe(self, max_prompt_tokens: int, max_trace_tokens: int, max_response_tokens: int | None = None) -> str:
        """Returns what was left out, how many and which first; "" for nothing."""
        parts = []
        if self.long_prompts:
            parts.append(f"{self.long_prompts} prompts over {max_prompt_tokens} tokens (first: {self.first_prompt})")
        if self.long_traces:
            parts.append(f"{self.long_traces} traces over {max_trace_tokens} tokens (first: {self.first_trace})")
        if self.unfit_traces:
            parts.append(
                f"{self.unfit_traces} traces over rollout.max_response_tokens={max_response_tokens} "
                f"(first: {self.first_unfit})"
            )
        return " and ".join(parts)


def encode_problems(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    max_trace_tokens: int,
    max_response_tokens: int | None = None,
    whole_traces: bool = False,
    trace_part: str = "full",
    instruction: str | None = None,
) -> tuple[list[EncodedProblem], LeftOut]:
    """Returns the token ids of all problems. Prompts over the limit are left out whole, traces over theirs singly.

    max_response_tokens: what a response can hold. A longer trace is never given whole, since one that was cut would
    teach the model never to stop: with `whole_traces` (nothing but whole ones is used) it is left out too.

    Raises TrapoError when the tokenizer has no chat template or no end of a sequence, when its template fails, or when
    no problem is left.
    """
    prompts = PromptEncoder(tokenizer)
    encoder = TraceEncoder(tokenizer, trace_part, opening=prompts.opening)
    longest = max(map(len, tokenizer.get_vocab()))  # characters of a token
    kept: list[EncodedProblem] = []
    long_prompts: list[str] = []  # ids
    long_traces: list[str] = []
    unfit_traces: list[str] = []
    for problem in problems:
        # What cannot be within the limit is not tokenised, which takes a hundred times its length in memory.
        if sum(len(m["content"]) for m in problem.prompt) > max_prompt_tokens * longest:
            long_prompts.append(problem.id)
            continue
        prompt_ids = prompts.encode(problem)
        if len(prompt_ids) > max_prompt_tokens:
            long_prompts.append(problem.id)
            continue
        traces = [
            _written_by(encoder.encode(text), problem, i)
            for i, text in enumerate(problem.traces)
            if len(text) <= max_trace_tokens * longest
        ]
        short = tuple(t for t in traces if len(t.token_ids) <= max_trace_tokens)
        long_traces += [problem.id] * (len(problem.traces) - len(short))
        fitting = tuple(t for t in short if max_response_tokens is None or len(t.token_ids) <= max_response_tokens)
        unfit_traces += [problem.id] * (len(short) - len(fitting))
        around = None if instruction is None else prompts.around(problem, instruction)
        kept.append(EncodedProblem(problem, prompt_ids, fitting if whole_traces else short, around))
    if not kept:
        raise TrapoError(
            f"data.max_prompt_tokens: all {len(problems)} prompts are longer than {max_prompt_tokens} tokens; "
            f"the first: {long_prompts[0]}"
        )
    left_out = (long_prompts, long_traces, unfit_traces)
    first_prompt, first_trace, first_unfit = (ids[0] if ids else "" for ids in left_out)
    notes = tuple(note for note in (prompts.note(), encoder.note()) if note)
    if unfit_traces and not whole_traces:
        notes += (
            f"{len(unfit_traces)} traces over rollout.max_response_tokens={max_response_tokens} are never given whole "
            f"(first: {first_unfit})",
        )
        unfit_traces, first_unfit = [], ""
    numbers = (len(long_prompts), len(long_traces), first_prompt, first_trace, len(unfit_traces), first_unfit)
    return kept, LeftOut(*numbers, notes)


def _written_by(trace: Trace, problem: Problem, index: int) -> Trace:
    """Returns a trace with the log-probabilities that came with it."""
    if not problem.behaviour:
        return trace
    given, needed = len(problem.behaviour[index]), len(trace.token_ids)
    if given != needed:
        raise TrapoError(
            f"data.train: {problem.id}: behaviour_logprobs has {given} numbers for a trace of {needed} tokens, the "
            "end-of-sequence token included, by the tokenizer of model.path"
        )
    return dataclasses.replace(trace, behaviour=problem.behaviour[index])


class PromptEncoder:
    """Turns prompts into token ids, under the tokenizer's chat template.

    A template without a place for a system message (Gemma's raises, others drop it) gets it in front of the first user
    message. Raises TrapoError for a tokenizer without a template, and for a template that fails.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise TrapoError(
                "model.path: the tokenizer has no chat template, which the prompts need; data.chat_template gives one: "
                "a Jinja file, or plain"
            )
        self.tokenizer = tokenizer
        self._folded = 0  # prompts whose system message went into the user's
        self._special: list[str] = []  # ids of problems that hold the text of a special token
        texts = [re.escape(text) for text in tokenizer.all_special_tokens if len(text) > 1]
        self._special_texts = re.compile("|".join(texts) or r"(?!)")

    @functools.cached_property
    def opening(self) -> str:
        """Returns the tag and the blanks that a prompt ends in, such as "<think>\\n", where it ends in one."""
        end = re.search(r"<[^<>\s]+>\s*$", self._render([{"role": "user", "content": "x"}], "a one-word prompt"))
        return end[0] if end else ""

    @functools.cached_property
    def _takes_system(self) -> bool:
        messages = [{"role": "system", "content": "a system message"}, {"role": "user", "content": "x"}]
        try:
            return "a system message" in self._apply(messages)
        except Exception:  # whatever a template raises
            return False

    def encode(self, problem: Problem) -> tuple[int, ...]:
        """Returns the ids [n] of the prompt up to where the assistant answers."""
        messages = list(problem.prompt)
        if any(m["role"] == "system" for m in messages) and not self._takes_system:
            messages = _without_system(messages)
            self._folded += 1
        if any(self._special_texts.search(m["content"]) for m in messages):
            self._special.append(problem.id)
        return self._ids(self._render(messages, problem.id))

    def _ids(self, text: str) -> tuple[int, ...]:
        # As apply_chat_template does: the template has put all special tokens in.
        return tuple(cast(list[int], self.tokenizer(text, add_special_tokens=False)["input_ids"]))

    def around(self, problem: Problem, instruction: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the ids of a prompt that asks to go on with a prefix: what stands before that, and behind it."""
        *earlier, last = problem.prompt
        asked = instruction.replace("{partial}", _MARK).replace("{problem}", last["content"])
        messages = [*earlier, {**last, "content": asked}]
        if any(m["role"] == "system" for m in messages) and not self._takes_system:
            messages = _without_system(messages)
        before, mark, behind = self._render(messages, problem.id).partition(_MARK)
        if not mark:
            raise TrapoError(f"guidance.instruction: the chat template drops {{partial}} from {problem.id}")
        return self._ids(before), self._ids(behind)

    def note(self) -> str:
        """Returns what users should know of the prompts encoded so far; "" for nothing."""
        notes = []
        if self._folded:
            notes.append(
                f"{self._folded} system messages went in front of the user's: the chat template has no place for them"
            )
        if self._special:
            notes.append(
                f"{len(self._special)} prompts hold the text of a special token, which is read as that token "
                f"(first: {self._special[0]})"
            )
        return "; ".join(notes)

    def _render(self, messages: list[Message], where: str) -> str:
        try:
            return self._apply(messages)
        except Exception as error:  # a template is a program: it may raise anything
            raise TrapoError(f"model.path: the chat template fails on {where}: {words_of(error, 200)}") from error

    def _apply(self, messages: list[Message]) -> str:
        return cast(str, self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


_MARK = "\ue000"  # stands for the prefix until the text is cut there

PLAIN = "{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"


def set_chat_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> None:
    """Gives a tokenizer the template that data.chat_template names: a file, or plain, which is the messages' texts with
    a blank line behind each; None leaves its own. Raises TrapoError for a file that cannot be read."""
    if name is None:
        return
    try:
        tokenizer.chat_template = PLAIN if name == "plain" else Path(name).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TrapoError(f"data.chat_template: {name!r} cannot be read ({words_of(error)}); a file, or plain") from None


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """Returns the messages with the system's text in front of the first user message."""
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    others = [m for m in messages if m["role"] != "system"]
    first = next(i for i, m in enumerate(others) if m["role"] == "user")
    others[first] = {**others[first], "content": f"{system}\n\n{others[first]['content']}"}
    return others


def decode_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Returns what a reader sees of a response: its text without special tokens."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))


class TraceEncoder:
    """Turns expert traces into token ids.

    part: the Schedule's trace_part. opening: the tag and the blanks that the prompt ends in, such as "<think>\\n"; a
    trace that begins with that tag is taken from behind it, or the model would learn to open a thought twice.

    Raises TrapoError for a tokenizer that cannot end a sequence.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, part: str, opening: str = "") -> None:
        if tokenizer.eos_token_id is None:
            raise TrapoError("model.path: the tokenizer has no end-of-sequence token, which traces and answers need")
        self.tokenizer = tokenizer
        self.part = part
        self._tag, self._blanks = opening.rstrip(), opening[len(opening.rstrip()) :]
        self._reopened = 0
        self._texts: dict[int, str] = {}  # per token id, decoded once

    def encode(self, text: str) -> Trace:
        if self.part == "thinking":
            text = thinking_part(text)
        text = self._without_opening(text)
        if (eos := self.tokenizer.eos_token) and text.rstrip().endswith(eos):  # a trace may bring its own
            text = text.rstrip().removesuffix(eos)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]
        texts = [self._text(token) for token in ids]
        return Trace(tuple(ids), tuple(i for i in range(len(ids)) if _ends_blank_line(texts, i)))

    def note(self) -> str:
        """Returns what users should know of the traces encoded so far; "" for nothing."""
        if not self._reopened:
            return ""
        return f"{self._reopened} traces began with {self._tag}, which the prompt ends in already: it is there once"

    def _without_opening(self, text: str) -> str:
        if not self._tag or not text.lstrip().startswith(self._tag):
            return text
        self._reopened += 1
        rest = text.lstrip().removeprefix(self._tag)
        return rest.removeprefix(self._blanks) if self._blanks else rest

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = str(self.tokenizer.decode([token]))
        return self._texts[token]


def _ends_blank_line(texts: Sequence[str], i: int) -> bool:
    """Returns whether token i holds a blank line, or the second half of one: some vocabularies have no token for
    both."""
    return "\n\n" in texts[i] or (i > 0 and texts[i].startswith("\n") and texts[i - 1].endswith("\n"))
