"""This file has texts around a problem and the beginning of its solution, which a guided rollout is asked to go on
with."""

from __future__ import annotations

PROBLEM, PARTIAL = "{problem}", "{partial}"  # their places in a text

# POPE's (arXiv 2601.18779), as prompts of others quote it.
POPE = r"""You are given a problem and a partial solution.

Your task is to carefully study the partial response, identify what reasoning or steps are already provided, and then \
complete the solution from where it left off. Ensure your continuation is logically consistent and leads to a complete \
and correct final answer.

**Important**: Show your reasoning step-by-step, and clearly present the final answer using LaTeX-style `\boxed{}` \
notation.

Problem:
{problem}

Partial Response:
{partial}

Continue solving the problem, starting from where the partial response ends. Make sure your final answer is written \
as: \boxed{your_answer_here}
""".replace("\\\n", "")

NAMED = {"pope": POPE}


def text_of(setting: str) -> str:
    """Returns the text that guidance.instruction names, or is."""
    return NAMED.get(setting, setting)
