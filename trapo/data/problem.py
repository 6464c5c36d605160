"""This file says what a problem is: a prompt, its answer and expert traces."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trapo.errors import TrapoError

Message = dict[str, str]
COLUMNS = ("prompt", "answer", "traces", "trace", "id", "source", "behaviour_logprobs")  # of our own layout


@dataclass(frozen=True)
class Problem:
    """Holds a problem. prompt: chat messages. traces: expert solutions, as the assistant would write them; may be
    empty. behaviour: of each trace, the log-probabilities that what wrote it gave its tokens; () where nobody knows."""

    id: str
    prompt: tuple[Message, ...]
    answer: str
    traces: tuple[str, ...]
    source: str
    behaviour: tuple[tuple[float, ...], ...] = ()
    row: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # its other columns, for rewards


class DataError(TrapoError):
    """Says that a data set cannot be used; one line with the file, the row, what is wrong and what is accepted."""


def problem_id(source: str, question: str, answer: str) -> str:
    """Returns an id by content, SOURCE/DIGEST: a problem has the same digest in every file and under every system
    prompt."""
    return f"{source}/{digest(question, answer)}"


def digest(question: str, answer: str) -> str:
    # surrogatepass: a row that UTF-8 cannot spell gets as far as the check that refuses it.
    return hashlib.sha256(f"{question}\0{answer}".encode(errors="surrogatepass")).hexdigest()[:16]


def prompt_text(problem: Problem) -> str:
    """Returns a problem's chat but for its system prompt; who says what is told where there are examples before the
    question."""
    messages = [m for m in problem.prompt if m["role"] != "system"]
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)
