"""`trapo grade FILE` shows answers in a file, graded again, and which rule decided each.

Works on any JSONL file with a column of texts and one of golds: what `trapo eval` writes, a run's eval/step-N.jsonl and
rollouts.jsonl, or your own.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from trapo.errors import TrapoError
from trapo.rewards import Reward, RewardPool, final_answer
from trapo.rewards.functions import ROW_COLUMNS
from trapo.rewards.scoring import refuse_outside
from trapo.rewards.worker import Bounds
from trapo.tools.files import write_atomic

TEXT_COLUMNS = ("text", "response", "completion", "output", "prediction")
ANSWER_COLUMNS = ("answer", "gold", "ground_truth", "target", "solution")


@dataclasses.dataclass(frozen=True)
class Graded:
    """Holds one row. rule: of rewards/rules.py for `math`, else the status; given: the answer that was found in the
    text."""

    row: dict[str, Any]
    text: str
    answer: str
    reward: Reward
    rule: str
    given: str | None

    @property
    def before(self) -> float | None:
        """Returns the reward that the row itself holds."""
        value = self.row.get("reward")
        return float(value) if isinstance(value, int | float) else None


def grade_file(
    path: Path,
    text: str | None = None,
    answer: str | None = None,
    function: str = "math",
    *,
    bounds: Bounds | None = None,
    timeout: float = 10.0,
    workers: int = 2,
) -> list[Graded]:
    """Returns each row's grade. Raises TrapoError, in one line, for an unreadable file, missing columns, and rewards
    that are no shares of 1. bounds: as reward.range."""
    rows = list(_rows(path))
    texts = [_text(path, number, row, text) for number, row in rows]
    golds = [_column(path, number, row, answer, ANSWER_COLUMNS, "--answer") for number, row in rows]
    columns = [{name: row[name] for name in ROW_COLUMNS if name in row} for _, row in rows]
    with RewardPool(function, workers=workers, timeout=timeout, bounds=bounds) as pool:
        rewards = pool.score(list(zip(texts, golds, columns, strict=True)))
    refuse_outside(rewards, path.name)
    return [
        Graded(row, t, a, reward, reward.rule or reward.status, final_answer(t) if reward.rule else None)
        for (_, row), t, a, reward in zip(rows, texts, golds, rewards, strict=True)
    ]


def table(graded: list[Graded]) -> Table:
    """Returns how often each rule decided, for and against, and how that compares with the rewards in the file."""
    count = len(graded)
    right = sum(g.reward.value for g in graded)
    shown = Table(box=None, padding=(0, 1), header_style="bold", title_justify="left")
    shown.title = f"{count} answers, mean reward {right / count:.3f}"
    shown.add_column("decided by")
    for column in ("answers", "right", "wrong", "other than in the file"):
        shown.add_column(column, justify="right")
    by_rule: dict[str, list[Graded]] = defaultdict(list)
    for g in graded:
        by_rule[g.rule].append(g)
    for rule, members in sorted(by_rule.items(), key=lambda item: -len(item[1])):
        ones = sum(g.reward.value > 0 for g in members)
        changed = sum(g.before is not None and g.before != g.reward.value for g in members)
        shown.add_row(rule, str(len(members)), str(ones), str(len(members) - ones), str(changed or ""))
    return shown


def lines(graded: list[Graded], each: int) -> Iterator[str]:
    """Yields at most `each` answers of every rule and verdict, and the first reason of each kind of failure."""
    shown: Counter[tuple[str, bool]] = Counter()
    for g in graded:
        key = (g.rule, g.reward.value > 0)
        failed = g.reward.status != "ok"
        shown[key] += 1
        if shown[key] <= max(each, int(failed)):
            found = g.reward.detail if failed else f"{_short(g.given if g.given is not None else g.text)!r}"
            yield f"{'right' if key[1] else 'wrong'}  {g.rule}: {found}  gold {_short(g.answer)!r}"


def write(graded: list[Graded], path: Path) -> None:
    """Writes the rows, each with its grade: reward, status, detail, rule, given."""
    out = []
    for g in graded:
        grade = {"reward": g.reward.value, "status": g.reward.status, "detail": g.reward.detail}
        out.append(json.dumps({**g.row, **grade, "rule": g.rule, "given": g.given}, ensure_ascii=False) + "\n")
    write_atomic(path, "".join(out))


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TrapoError(f"grade: {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    found = False
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise TrapoError(f"grade: {path}:{number}: not JSON") from None
        if not isinstance(row, dict):
            raise TrapoError(f"grade: {path}:{number}: a row must be a JSON object; got {type(row).__name__}")
        found = True
        yield number, row
    if not found:
        raise TrapoError(f"grade: {path} has no rows")


def _text(path: Path, number: int, row: dict[str, Any], column: str | None) -> str:
    if column is None and not any(name in row for name in TEXT_COLUMNS) and "own" in row:
        return str(row.get("prefix") or "") + str(row["own"])  # a line of rollouts.jsonl
    return _column(path, number, row, column, TEXT_COLUMNS, "--text")


def _column(
    path: Path, number: int, row: dict[str, Any], column: str | None, names: tuple[str, ...], option: str
) -> str:
    name = column or next((name for name in names if name in row), None)
    if name is None or name not in row:
        raise TrapoError(
            f"grade: {path}:{number}: no column {column or ' or '.join(names)}; columns found: {', '.join(row)}; "
            f"{option} names another one"
        )
    value = row[name]
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise TrapoError(f"grade: {path}:{number}: column {name!r} must be text; got {type(value).__name__}")
    return str(value)


def _short(text: str) -> str:
    return text if len(text) <= 60 else "..." + text[-57:]
