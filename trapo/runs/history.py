"""A checkpoint knows its run: which run, which settings, and what the run's logs held when it was saved.

By it a run that goes on puts its logs right: metrics.jsonl and the evaluations come back as they were, whatever
happened to the files; samples of rollouts, whose text it does not have, are kept as far as they can be read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from trapo.config import default_tree
from trapo.errors import TrapoError
from trapo.settings.text import Tree, flat, plain_tree
from trapo.tools.files import read_json, write_atomic, write_json

Log = Callable[[str], None]
Row = dict[str, Any]
EMPTY = hashlib.sha256(b"").hexdigest()


def config_digest(settings: Tree, free: tuple[str, ...]) -> str:
    """Returns a digest of the settings that decide what is computed; those at their default do not count, so that new
    keys may come."""
    values, default = flat(plain_tree(settings)), flat(plain_tree(default_tree()))
    kept = {key: value for key, value in values.items() if value != default.get(key) and not key.startswith(free)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def rollouts_mark(path: Path) -> dict[str, Any]:
    """Returns the size and digest of rollouts.jsonl."""
    data = path.read_bytes() if path.exists() else b""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def restore_metrics(path: Path, expected: list[Row], step: int, log: Log) -> None:
    """Make metrics.jsonl hold `expected`, the rows up to `step`; says so where it did not."""
    rows, damaged = read_what_can_be(path)
    kept = [row for row in rows if row["step"] <= step]
    if step and (damaged or kept != expected):
        log(f"{path} did not hold each step up to {step} once; its rows are those of the checkpoint now")
    if path.exists() or expected:
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in expected))


def restore_rollouts(path: Path, mark: dict[str, Any], step: int, log: Log) -> None:
    """Make rollouts.jsonl hold what it held after `step`, as far as that is there."""
    data = path.read_bytes() if path.exists() else b""
    kept = data[: mark["bytes"]]
    if len(kept) == mark["bytes"] and hashlib.sha256(kept).hexdigest() == mark["sha256"]:
        text = kept.decode()
    else:
        rows, _ = read_what_can_be(path)
        lines = dict.fromkeys(json.dumps(row) for row in rows if row["step"] <= step)
        text = "".join(f"{line}\n" for line in lines)
        log(f"{path} is damaged; {len(lines)} of its samples up to step {step} are kept")
    if path.exists() or text:
        write_atomic(path, text)


def restore_evaluations(run_dir: Any, expected: dict[str, Row], step: int, log: Log) -> None:
    """Make the evaluations up to `step` those that were made; one of `step` that is damaged will be made again."""
    found = run_dir.evaluations()
    for evaluated in sorted(found.keys() | {int(s) for s in expected}):
        path = run_dir.evaluation(evaluated)
        if evaluated > step:  # of weights that will be computed again
            path.unlink(missing_ok=True)
            path.with_suffix(".jsonl").unlink(missing_ok=True)
            continue
        result, known = _evaluation(path), expected.get(str(evaluated))
        sound = result is not None and _has_rows(path.with_suffix(".jsonl"), result)
        if known is not None and result != known:
            log(f"{path} was {'lost' if not path.exists() else 'damaged'}; it is that of the checkpoint now")
            write_json(path, known)
        if sound or (known is not None and _has_rows(path.with_suffix(".jsonl"), known)):
            continue
        if evaluated == step:
            log(f"{path} is damaged; the evaluation is made again")
            path.unlink(missing_ok=True)
        elif known is not None:
            log(f"{path.with_suffix('.jsonl')} does not hold the answers of that evaluation any more")


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a metrics file, without a last line that a kill cut short. Raises TrapoError for one that is
    damaged."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        row = _row(line)
        if row is None:
            raise TrapoError(f"{path}:{number}: damaged: not a row of a step; continuing the run restores it")
        rows.append(row)
    return rows


def read_what_can_be(path: Path) -> tuple[list[Row], bool]:
    """Returns the rows that can be read, and whether there are others. A last line that a kill cut short is none."""
    found = [_row(line) for line in _lines(path)] if path.exists() else []
    return [row for row in found if row is not None], None in found


def _lines(path: Path) -> Iterable[bytes]:
    return path.read_bytes().split(b"\n")[:-1]


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _evaluation(path: Path) -> Row | None:
    try:
        found = read_json(path)
    except (OSError, TrapoError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("accuracy"), (int, float)) else None


def _has_rows(path: Path, result: Row) -> bool:
    """Returns whether the answers of an evaluation are all there."""
    try:
        rows = [json.loads(line.decode()) for line in _lines(path)]
    except (OSError, ValueError, RecursionError):
        return False
    return len(rows) == result.get("problems", -1) * result.get("samples", 1)
