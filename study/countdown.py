"""Task `countdown`: combine the given numbers, each once, with + - * to reach a target.

    prompt    346=18:           numbers 1 to 9, then the target (1 to 99)
    trace     3*4=12;12+6=18;   each step takes two numbers that are left and puts back the result (0 to 99)

Many responses are right: the reward checks the arithmetic. The base model's corpus is noisy: false arithmetic, numbers
left out, and last steps that merely claim the target.
"""

from __future__ import annotations

import random
import re

from study.task import Instance, Task

_STEP = re.compile(r"(\d{1,2})([+*-])(\d{1,2})=(\d{1,2});")
LARGEST = 99


def apply(op: str, a: int, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[op]


class Countdown(Task):
    name = "countdown"
    turns = (3, 4, 5, 4, 5, 4)  # numbers; there are few different problems with three
    max_response = 40

    def sample(self, rng: random.Random, length: int) -> Instance:
        while True:
            numbers = [rng.randrange(1, 10) for _ in range(length)]
            steps, target = _combine(rng, numbers)
            if target > 0:
                return Instance(_prompt(numbers, target), "".join(_written(*s) for s in steps), length, str(target))

    def key(self, prompt: str) -> str:
        """Returns what is the same for all orders of the numbers, which do not make a new problem."""
        numbers, target = prompt.rstrip(":").split("=")
        return "".join(sorted(numbers)) + "=" + target

    def is_right(self, prompt: str, answer: str, response: str) -> bool:
        left = [int(c) for c in prompt.split("=")[0]]
        end = 0
        for match in _STEP.finditer(response):
            a, b, result = int(match[1]), int(match[3]), int(match[4])
            if match.start() != end or a not in left:
                return False
            left.remove(a)
            if b not in left or apply(match[2], a, b) != result:
                return False
            left.remove(b)
            left.append(result)
            end = match.end()
        return end == len(response) and left == [int(answer)]

    def corpus(self, rng: random.Random) -> tuple[str, str]:
        length = rng.choice((2, 3, 3, 3, 4, 4, 5))
        numbers = [rng.randrange(1, 10) for _ in range(length)]
        kind = rng.choices(("clean", "wrong", "skipped", "claim"), (4, 2, 2, 2) if length <= 3 else (1, 3, 3, 3))[0]
        steps, target = _combine(rng, numbers)
        if kind == "wrong":  # goes on with the false result
            steps, target = _combine(rng, numbers, mistakes=0.3)
        elif kind == "skipped":
            used = rng.sample(numbers, max(length - 1, 2))
            steps, target = _combine(rng, used)
        elif kind == "claim":
            claimed = rng.randrange(1, LARGEST + 1)
            steps = [*steps[:-1], (*steps[-1][:3], claimed)]
            target = claimed
        return _prompt(numbers, target), "".join(_written(*s) for s in steps)


Step = tuple[int, str, int, int]  # a, operation, b, result


def _combine(rng: random.Random, numbers: list[int], mistakes: float = 0.0) -> tuple[list[Step], int]:
    """Returns a random way to combine all numbers with results from 0 to LARGEST, and where it ends."""
    left, steps = list(numbers), []
    while len(left) > 1:
        a, b = rng.sample(left, 2)
        op = rng.choice("+-*")
        result = apply(op, a, b)
        if not 0 <= result <= LARGEST:
            continue
        if rng.random() < mistakes:
            result = rng.randrange(LARGEST + 1)
        left.remove(a)
        left.remove(b)
        left.append(result)
        steps.append((a, op, b, result))
    return steps, left[0]


def _prompt(numbers: list[int], target: int) -> str:
    return "".join(map(str, numbers)) + f"={target}:"


def _written(a: int, op: str, b: int, result: int) -> str:
    return f"{a}{op}{b}={result};"
