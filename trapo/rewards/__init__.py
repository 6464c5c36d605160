"""This package grades finished texts. `math_reward` grades one text; `RewardPool` runs it, or any function of yours, in
worker processes that can be killed: an item that hangs or takes its worker down scores 0 and is counted; the others,
and the trainer, are not disturbed.

This package never imports torch, so a worker starts in the time that sympy takes to import.
"""

from __future__ import annotations

from trapo.rewards.extract import ANSWER_MARK, FINAL_ANSWER, final_answer
from trapo.rewards.pool import Item, RewardPool
from trapo.rewards.rules import Grade, grade
from trapo.rewards.worker import Reward, Status


def math_reward(text: str, answer: str) -> float:
    r"""Returns 1.0 when the final answer of `text` (rewards/extract.py) equals `answer`, else 0.0 (rewards/rules.py).

    1/2 and 0.5, 1,234 and 1234, money, units, lists in any order and so on are equal. For a numeric `answer` the sum
    must have been done: "12 * 2" does not earn the reward of "24", "12 * 2 = 24" does.

    There is no time limit in here: call this through RewardPool where a text is not trusted.
    """
    return grade(text, answer).value


__all__ = [
    "ANSWER_MARK",
    "FINAL_ANSWER",
    "Grade",
    "Item",
    "Reward",
    "RewardPool",
    "Status",
    "final_answer",
    "grade",
    "math_reward",
]
