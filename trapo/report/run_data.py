"""This file reads what is on disk of a run, as a report needs it. Whatever an older or unfinished run lacks is empty or
None."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trapo.config import load_config
from trapo.errors import TrapoError
from trapo.modes import phases
from trapo.runs.history import read_rows
from trapo.runs.run_dir import RunDir
from trapo.settings.text import shown_yaml
from trapo.tools.files import read_json


def _own_reward(row: Mapping[str, Any]) -> float | None:
    if "own_reward" in row:
        return row["own_reward"]
    return (row.get("reward_by_ratio") or {}).get("0")  # rows of earlier versions


def _inside(row: Mapping[str, Any]) -> float | None:
    outside = row.get("trsft_clipped")
    return None if outside is None else 1 - outside


def _clipped(row: Mapping[str, Any]) -> float | None:
    shares = [row.get(name) for name in ("clip_low", "clip_high", "clip_dual")]
    found = [share for share in shares if share is not None]
    return sum(found) if found else None


# What a row says without holding it.
DERIVED: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "own_reward": _own_reward,
    "trsft_inside": _inside,
    "clipped": _clipped,
}


@dataclasses.dataclass(frozen=True)
class RunData:
    name: str
    path: Path
    rows: list[dict[str, Any]]  # of metrics.jsonl, never empty
    evaluations: list[dict[str, Any]]  # by step
    rollouts: list[dict[str, Any]]  # of rollouts.jsonl
    summary: dict[str, Any]  # empty: not finished
    config: dict[str, Any]  # key (optim.lr) -> value
    alpha: float | None  # of TrSFT

    @property
    def steps(self) -> list[int]:
        return [row["step"] for row in self.rows]

    @property
    def tokens(self) -> list[int]:
        """Tokens of the run up to the end of each step: generated ones and trained ones."""
        counts = [(row.get("generated_tokens") or 0) + (row.get("trained_tokens") or 0) for row in self.rows]
        return list(itertools.accumulate(counts))

    def series(self, name: str) -> list[float | None]:
        """Returns a metric over the steps: one of metrics.jsonl, or of DERIVED."""
        read = DERIVED.get(name, lambda row: row.get(name))
        return [read(row) for row in self.rows]

    def levels(self, name: str) -> list[str]:
        """Returns the prefix ratios that a by-ratio metric has, ascending."""
        return sorted({ratio for row in self.rows for ratio in row.get(name) or {}}, key=float)

    def by_ratio(self, name: str, ratio: str) -> list[float | None]:
        return [(row.get(name) or {}).get(ratio) for row in self.rows]

    def rollouts_at(self, ratio: str) -> list[int]:
        """Returns how many rollouts had such a prefix, over the steps."""
        return [int(count or 0) for count in self.by_ratio("rollouts_by_ratio", ratio)]


def read_run(path: Path, summary: dict[str, Any] | None = None) -> RunData:
    """Returns the run in `path`; summary: of one that is about to be finished. Raises TrapoError when there are no
    steps."""
    run_dir = RunDir(path)
    rows = run_dir.rows()
    if not rows:
        raise TrapoError(f"RUN: {path} holds no steps (metrics.jsonl)")
    if summary is None and run_dir.summary.exists():
        summary = read_json(run_dir.summary)
    return RunData(
        name=path.resolve().name,
        path=path,
        rows=rows,
        evaluations=[{"step": step, **read_json(f)} for step, f in run_dir.evaluations().items()],
        rollouts=read_rows(run_dir.rollouts),
        summary=summary or {},
        config=dict(_flat(shown_yaml(run_dir.config))) if run_dir.config.exists() else {},
        alpha=_alpha(run_dir),
    )


def with_distinct_names(runs: Sequence[RunData]) -> list[RunData]:
    """Returns the runs, named by as much of the end of their path as tells them apart."""
    parts = [run.path.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            break
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _alpha(run_dir: RunDir) -> float | None:
    try:
        objectives = [phase.objective for phase in phases(load_config(run_dir.config))]
    except TrapoError:  # no configuration, or that of another version
        return None
    return next((o.alpha for o in objectives if o.expert == "trsft"), None)


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
