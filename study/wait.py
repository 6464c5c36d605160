"""Task `chain_wait`: the chain with + - * alone, a base that can but seldom does, and an expert who thinks aloud.

    prompt    3+5*2:
    trace     3+5=1;&3+5=8;8*2=5;>85      `&` takes the line before it back ("wait")

The base model wrote in the short style; its flaws are known. For a fifth of the 330 facts its corpus gave one wrong
value 60% of the time (*suppressed*: the right value is sampled now and then), for a share of them it gave any value
(*missing*: a guess among 11). The expert knows all facts; before some lines it makes a wrong turn, which it takes back.
So there are two factors: whether the rare part of a trace is junk, and whether traces hold what sampling does not
find. A response is right if the lines that it did not take back are the whole working.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterator

from study.chain import DIGITS, KNOWN, Chain, P, apply
from study.task import Instance

WAIT = "&"
SUPPRESSED, WRONG = 0.2, 0.6  # share of facts; how often their wrong value is written
NOISE = 0.05  # of other lines of the corpus
Fact = tuple[str, int, int]  # operation, value, operand


@dataclasses.dataclass(frozen=True)
class Line:
    """Is a line of a response: what it says of which fact, and whether it was taken back."""

    fact: Fact
    said: int
    taken_back: bool

    @property
    def right(self) -> bool:
        return self.said == apply(*self.fact)


class ChainWait(Chain):
    """Is one corner of the two factors; corners share their prompts, and those with the same `missing` a base."""

    family = "chain_wait"
    max_response = 96
    new_share = new_share_of_corpus = 0.0

    def __init__(self, wrong_turns: float, missing: float) -> None:
        self.wrong_turns, self.missing_share = wrong_turns, missing
        self.name = f"wait-turns{100 * wrong_turns:.0f}-missing{100 * missing:.0f}"
        self.base = f"wait-missing{100 * missing:.0f}"
        self.suppressed, self.missing = _flaws(missing)

    def sample(self, rng: random.Random, length: int) -> Instance:
        start, steps = self._problem(rng, length, self.new_share)
        prompt = self._prompt(start, steps)
        values, written = [start], []
        turns = random.Random(f"turns of {prompt}")  # its own, so that corners share their prompts
        for op, operand in steps:
            before, after = values[-1], apply(op, values[-1], operand)
            if turns.random() < self.wrong_turns:
                wrong = turns.choice([v for v in range(P) if v != after])
                written += [self._line(before, op, operand, wrong), WAIT]
            written.append(self._line(before, op, operand, after))
            values.append(after)
        trace = "".join(written) + ">" + self._answer(values)
        return Instance(prompt, trace, length, self._answer(values))

    def is_right(self, prompt: str, answer: str, response: str) -> bool:
        return super().is_right(prompt, answer, kept(response))

    def corpus(self, rng: random.Random) -> tuple[str, str]:
        """Returns a problem with its working in the short style, with the base's flaws in it."""
        length = rng.choice((1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8))
        start, steps = self._problem(rng, length, self.new_share_of_corpus)
        values = [start]
        for op, operand in steps:
            values.append(self._written((op, values[-1], operand), rng))
        return self._prompt(start, steps), self._trace(steps, values)

    def _written(self, fact: Fact, rng: random.Random) -> int:
        """Returns the value that the corpus gives for a fact."""
        if fact in self.suppressed:
            return self.suppressed[fact] if rng.random() < WRONG else apply(*fact)
        if fact in self.missing or rng.random() < NOISE:
            return rng.randrange(P)
        return apply(*fact)

    def kind(self, fact: Fact) -> str:
        """Returns what the base was taught of a fact: suppressed, missing or known."""
        return "suppressed" if fact in self.suppressed else "missing" if fact in self.missing else "known"

    def _line(self, before: int, op: str, operand: int, after: int) -> str:
        return f"{DIGITS[before]}{op}{DIGITS[operand]}={DIGITS[after]};"


def kept(response: str) -> str:
    """Returns a response without the lines that are taken back."""
    return re.sub(rf"[^;{WAIT}>]*;{WAIT}", "", response)


def lines(response: str) -> Iterator[Line]:
    """Yields the lines of a response that are lines."""
    for value, op, operand, said, wait in re.findall(rf"([\dX])([-+*])([\dX])=([\dX]);({WAIT}?)", response):
        yield Line((op, DIGITS.index(value), DIGITS.index(operand)), DIGITS.index(said), bool(wait))


def _flaws(missing: float) -> tuple[dict[Fact, int], frozenset[Fact]]:
    """Returns the suppressed facts with the wrong values that the base was taught, and the missing ones."""
    rng = random.Random("flaws of the base")
    facts = [(op, value, operand) for op in KNOWN for value in range(P) for operand in range(1, P)]
    rng.shuffle(facts)
    bad, absent = int(len(facts) * SUPPRESSED), int(len(facts) * missing)
    wrong = {fact: rng.choice([v for v in range(P) if v != apply(*fact)]) for fact in facts[:bad]}
    return wrong, frozenset(facts[bad : bad + absent])


CORNERS = {corner.name: corner for corner in (ChainWait(w, m) for w in (0.3, 0.0) for m in (0.25, 0.0))}
HARD = "wait-turns30-missing25"
