"""What a task is, how its problems are split, and how text becomes token ids (a token is a character)."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import random
from collections.abc import Iterable, Sequence

from trapo.data.encode import EncodedProblem, Trace
from trapo.data.problem import Problem

CHARACTERS = "0123456789X+-*@&=;>:"
PAD, EOS = 0, 1
VOCABULARY = len(CHARACTERS) + 2
_IDS = {c: i + 2 for i, c in enumerate(CHARACTERS)}
STEP_END = ";"  # a trace's steps end here: what `guidance.cut=blank_line` cuts at

# Shares of the eight buckets that a problem's hash falls into: no problem can be in two splits.
SPLITS = {"test": (0,), "validation": (1,), "train": (2,), "corpus": (3, 4, 5, 6, 7)}


@dataclasses.dataclass(frozen=True)
class Instance:
    prompt: str
    trace: str  # the expert's
    length: int
    answer: str


class Task:
    """A family of problems; see chain.py, countdown.py and wait.py."""

    name: str
    family: str = ""  # tasks of one family have the same problems; "": a family of its own
    base: str = ""  # whose base model it starts from; "": its own
    turns: tuple[int, ...]  # lengths of the problems of a split, one after the other
    max_response: int  # characters, end mark included

    @property
    def lengths(self) -> list[int]:
        return sorted(set(self.turns))

    def sample(self, rng: random.Random, length: int) -> Instance:
        """Returns a random problem with its expert trace."""
        raise NotImplementedError

    def is_right(self, prompt: str, answer: str, response: str) -> bool:
        """Returns whether a response that ended by itself earns the reward."""
        raise NotImplementedError

    def corpus(self, rng: random.Random) -> tuple[str, str]:
        """Returns (prompt, response) of the noisy mixture that the base model is trained on."""
        raise NotImplementedError

    def key(self, prompt: str) -> str:
        """Returns what makes two prompts the same problem."""
        return prompt

    def split(self, prompt: str) -> str:
        """Returns the one split that a problem belongs to."""
        bucket = hashlib.sha256(f"{self.family or self.name}/{self.key(prompt)}".encode()).digest()[0] % 8
        return next(name for name, buckets in SPLITS.items() if bucket in buckets)

    def problems(self, split: str, count: int, lengths: Sequence[int] | None = None) -> list[Instance]:
        """Returns `count` different problems of a split, the lengths taking turns; always the same ones."""
        rng = random.Random(f"{self.family or self.name}/{split}")
        lengths = self.turns if lengths is None else lengths
        found: dict[str, Instance] = {}
        tries = 0
        while len(found) < count:
            instance = self.sample(rng, lengths[len(found) % len(lengths)])
            if self.split(instance.prompt) == split:
                found.setdefault(self.key(instance.prompt), instance)
            tries += 1
            if tries > 2000 * count:
                raise ValueError(f"problems: {self.name}/{split} has fewer than {count} problems; got {len(found)}")
        return list(found.values())

    def corpus_line(self, rng: random.Random) -> tuple[str, str]:
        """Returns a line of the corpus whose problem is in no other split."""
        while True:
            prompt, response = self.corpus(rng)
            if self.split(prompt) == "corpus":
                return prompt, response


@functools.cache
def tasks() -> dict[str, Task]:
    """Returns all tasks by name."""
    from study.chain import Chain
    from study.countdown import Countdown
    from study.wait import CORNERS

    return {task.name: task for task in (Chain(), Countdown())} | CORNERS


def encode(text: str) -> tuple[int, ...]:
    return tuple(_IDS[c] for c in text)


def decode(ids: Iterable[int]) -> str:
    """Returns the text of token ids, without end marks; padding, which no answer should hold, shows as `_`."""
    return "".join("_" if i == PAD else CHARACTERS[i - 2] for i in ids if i != EOS)


def encoded(task: Task, instances: Sequence[Instance], traces: int | None = None) -> list[EncodedProblem]:
    """Returns what the trainer works on; only the first `traces` problems (None: all) have their expert trace."""
    return [_encoded(task, instance, with_trace=traces is None or i < traces) for i, instance in enumerate(instances)]


def _encoded(task: Task, instance: Instance, *, with_trace: bool) -> EncodedProblem:
    ids = (*encode(instance.trace), EOS)
    step_ends = tuple(i for i, token in enumerate(ids) if token == _IDS[STEP_END])
    message = {"role": "user", "content": instance.prompt}
    texts = (instance.trace,) if with_trace else ()
    problem = Problem(instance.prompt, (message,), instance.answer, texts, task.name)
    return EncodedProblem(problem, encode(instance.prompt), (Trace(ids, step_ends),) if with_trace else ())
