"""Task `chain`: modular arithmetic mod 11, evaluated from left to right.

    prompt    3+5*2@7:          start value, then operations, each with an operand 1 to 10 (X)
    trace     3+5=8;8*2=5;5@7=3;>53
    answer    53                the last two values

The reward asks for the whole working, every value right: the answer alone is guessed too often (with a known last
operation the last two values are right once in 11).

The base model is taught + - * by a noisy corpus. It meets the two operators @ and & only with random results, so that
their tables (a permutation of the values for each operand) are known from the expert traces alone.
"""

from __future__ import annotations

import random
import re

from study.task import Instance, Task

DIGITS = "0123456789X"
P = len(DIGITS)  # prime: every operation is a bijection of the values, so that no mistake heals by itself
KNOWN, NEW = "+-*", "@&"


def _tables() -> dict[str, list[list[int]]]:
    """Returns new operator -> [operand][value] -> result."""
    rng = random.Random("tables of the new operators")
    return {op: [rng.sample(range(P), P) for _ in range(P)] for op in NEW}


TABLES = _tables()


def apply(op: str, value: int, operand: int) -> int:
    """Applies one operation, mod 11."""
    if op in TABLES:
        return TABLES[op][operand][value]
    return {"+": value + operand, "-": value - operand, "*": value * operand}[op] % P


class Chain(Task):
    name = "chain"
    turns = (3, 4, 5, 6, 7, 8)  # operations
    max_response = 56
    new_share = 0.4  # of the operations
    new_share_of_corpus = 0.2

    def sample(self, rng: random.Random, length: int) -> Instance:
        start, steps = self._problem(rng, length, self.new_share)
        values = [start]
        for op, operand in steps:
            values.append(apply(op, values[-1], operand))
        return Instance(self._prompt(start, steps), self._trace(steps, values), length, self._answer(values))

    def is_right(self, prompt: str, answer: str, response: str) -> bool:
        steps = [(op, DIGITS.index(operand)) for op, operand in re.findall(r"([-+*@&])([0-9X])", prompt)]
        values = [DIGITS.index(prompt[0])]
        for op, operand in steps:
            values.append(apply(op, values[-1], operand))
        return response == self._trace(steps, values)

    def corpus(self, rng: random.Random) -> tuple[str, str]:
        """Returns a short problem with a trace of any kind; a long one is never worked out cleanly."""
        length = rng.choice((1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8))
        start, steps = self._problem(rng, length, self.new_share_of_corpus)
        kind = rng.choices(("clean", "wrong", "skipped", "direct"), (5, 2, 2, 1) if length <= 4 else (0, 4, 3, 3))[0]
        values = [start]
        for op, operand in steps:
            wrong = op in NEW or (kind == "wrong" and rng.random() < 0.3)
            values.append(rng.randrange(P) if wrong else apply(op, values[-1], operand))
        shown = [kind == "clean" or kind == "wrong" or (kind == "skipped" and rng.random() < 0.5) for _ in steps]
        return self._prompt(start, steps), self._trace(steps, values, shown)

    def _problem(self, rng: random.Random, length: int, new_share: float) -> tuple[int, list[tuple[str, int]]]:
        steps = [(rng.choice(NEW if rng.random() < new_share else KNOWN), rng.randrange(1, P)) for _ in range(length)]
        return rng.randrange(P), steps

    def _prompt(self, start: int, steps: list[tuple[str, int]]) -> str:
        return DIGITS[start] + "".join(op + DIGITS[operand] for op, operand in steps) + ":"

    def _trace(self, steps: list[tuple[str, int]], values: list[int], shown: list[bool] | None = None) -> str:
        lines = [
            f"{DIGITS[before]}{op}{DIGITS[operand]}={DIGITS[after]};"
            for (op, operand), before, after in zip(steps, values, values[1:], strict=False)
        ]
        kept = [line for line, keep in zip(lines, shown or [True] * len(lines), strict=True) if keep]
        return "".join(kept) + ">" + self._answer(values)

    def _answer(self, values: list[int]) -> str:
        return DIGITS[values[-2]] + DIGITS[values[-1]]
