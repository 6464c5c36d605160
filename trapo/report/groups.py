"""Sample rollouts as the page shows them: a group is a prompt with its micro-groups side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from trapo.report.run_data import RunData
from trapo.report.words import level_colours, level_name

SAMPLES = 80  # rollouts of a run on the page
SHOWN = 6000  # characters of a text; of a longer one the middle is left out

Row = dict[str, Any]


def groups_of(run: RunData) -> list[Row]:
    """Returns the groups of a run's sample, spread over the run, in the order of their steps."""
    rows = _spread(run.rollouts, SAMPLES)
    by_prompt: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:  # rows of earlier versions have no group
        by_prompt.setdefault((row["step"], row.get("group"), row["id"]), []).append(row)
    return [_group(run, members) for members in by_prompt.values()]


def _group(run: RunData, rows: list[Row]) -> Row:
    first = rows[0]
    examples, question = _question(first["prompt"])
    rows = sorted(rows, key=lambda row: row["level"])
    levels = [_level(number, list(members)) for number, members in groupby(rows, key=lambda row: row["level"])]
    own = _mean([row["reward"] for row in rows if row["ratio"] == 0])
    # Of whole traces nothing is the model's.
    guided = _mean([row["reward"] for row in rows if row["ratio"] > 0 and row["own_tokens"] > 0])
    return {
        "run": run.name,
        "step": first["step"],
        "id": first["id"],
        "examples": _shortened(examples),
        "prompt": _shortened(question),
        "answer": first["answer"],
        "levels": levels,
        "level_names": sorted({level["name"] for level in levels}),
        "outcome": _outcome([row for row in rows if row["ratio"] == 0] or rows),
        "own": own,
        "gain": None if own is None or guided is None else guided - own,
        "guided": any(row["ratio"] > 0 for row in rows),
        "longest": max(row["own_tokens"] for row in rows),
    }


def _question(prompt: str) -> tuple[str, str]:
    """Returns the turns of a chat before the last question, and that: examples are alike in every prompt."""
    before, mark, question = prompt.rpartition("\n\nuser: ")
    return (before, question) if mark and before.startswith("user: ") else ("", prompt)


def _level(number: int, rows: list[Row]) -> Row:
    """Returns a micro-group. number: counted from 0."""
    ratio = f"{rows[0]['ratio']:g}"
    scored = [row["reward"] for row in rows if row["reward"] is not None]
    return {
        "number": number + 1,
        "name": level_name(ratio),
        "colour": level_colours([ratio])[ratio],
        "right": sum(reward >= 1 for reward in scored),
        "scored": len(scored),
        "rollouts": [row | {"verdict": _verdict(row)} | _texts(row) for row in rows],
    }


def _texts(row: Row) -> dict[str, str]:
    return {key: _shortened(row[key]) for key in ("prefix", "own")}


def _verdict(row: Row) -> str:
    if row["reward"] is None:
        return "none"
    return "right" if row["reward"] >= 1 else "part" if row["reward"] > 0 else "wrong"


def _outcome(rows: Sequence[Row]) -> str:
    """Returns what became of the attempts without a prefix; of a group that has none, of all."""
    scored = [row["reward"] for row in rows if row["reward"] is not None]
    if not scored:
        return "not scored"
    right = sum(reward >= 1 for reward in scored)
    return "all right" if right == len(scored) else "some right" if right else "none right"


def _mean(values: list[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def _spread(rows: list[Row], count: int) -> list[Row]:
    """Returns the rows of whole steps, spread evenly over the run, the first and the last among them; about `count`
    rows."""
    steps = sorted({row["step"] for row in rows})
    wanted = max(count * len(steps) // max(len(rows), 1), 1)
    if len(steps) > wanted:
        steps = [steps[round(i * (len(steps) - 1) / max(wanted - 1, 1))] for i in range(wanted)]
    kept = set(steps)
    return [row for row in rows if row["step"] in kept]


def _shortened(text: str) -> str:
    if len(text) <= SHOWN:
        return text
    return f"{text[: SHOWN // 2]}\n[… {len(text) - SHOWN} characters …]\n{text[-SHOWN // 2 :]}"
