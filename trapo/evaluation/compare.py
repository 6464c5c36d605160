"""`trapo compare A B` makes a paired test of two evaluations over the same problems.

A problem's value is its mean reward over samples. Pairing takes the problems' difficulty out of the comparison: the
interval is a bootstrap over problems of B − A; the p-value is McNemar's exact one where both runs answered once with
reward 0 or 1, else that of random sign flips.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from trapo.errors import TrapoError
from trapo.evaluation.stats import mcnemar_exact, paired_interval, sign_flip_test

Rewards = dict[str, list[float]]  # by problem id, one value a sample


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Holds B − A on one problem set."""

    name: str
    problems: int
    first: float  # accuracy of A
    second: float
    difference: float
    low: float  # 95% interval of the difference
    high: float
    p_value: float
    test: str
    better: int  # problems on which B is better
    worse: int
    all_failed: str = ""  # A, B or both: each of that side's rewards failed, so that its zeros say nothing


def compare(first: Path, second: Path) -> list[Comparison]:
    """Returns the comparisons of all evaluations that both have. Raises TrapoError when there are none or their
    problems differ."""
    a, b = _evaluations(first), _evaluations(second)
    if len(a) == len(b) == 1:  # two files, whatever their names
        (name_a, path_a), (name_b, path_b) = *a.items(), *b.items()
        return [_compare(name_a if name_a == name_b else f"{name_a} / {name_b}", path_a, path_b)]
    common = [name for name in a if name in b]
    if not common:
        raise TrapoError(f"compare: no evaluation in common; {first} has {', '.join(a)}, {second} has {', '.join(b)}")
    return [_compare(name, a[name], b[name]) for name in common]


def knowledge(first: Path, second: Path) -> list[str]:
    """Returns a line for each likelihood, and accuracy on eval.prior, that the last evaluations of both have: what
    either model still knows."""
    a, b = (_last_result(path) for path in (first, second))
    names = {
        "prior_accuracy": "accuracy on what the base could do",
        "prior_nll": "NLL of what the base knew",
        "trace_nll": "NLL of held-out traces",
    }
    shown = {k: (a[k], b[k]) for k in names if a.get(k) is not None and b.get(k) is not None}
    return [f"{names[k]}: A {x:.4g}, B {y:.4g}, B − A {y - x:+.3g}" for k, (x, y) in shown.items()]


def _last_result(path: Path) -> dict[str, Any]:
    """Returns the last evaluation of a run, or that of `trapo eval`; {} where there is none."""
    files = [*sorted((path / "eval").glob("step-*.json")), path / "eval.json"]
    found = next((f for f in (path / "eval.json", *reversed(files[:-1])) if f.exists()), None)
    return {} if found is None else json.loads(found.read_text())


def table(found: list[Comparison], first: str, second: str) -> Table:
    """Returns one row a problem set."""
    shown = Table(
        box=None, padding=(0, 1), header_style="bold", title=Text(f"A: {first}\nB: {second}"), title_justify="left"
    )
    shown.add_column("problems of")
    for column in ("number", "A", "B", "B − A, points", "95% interval", "p", "test", "better", "worse"):
        shown.add_column(column, justify="right")
    for c in found:
        points = [f"{100 * value:+.1f}" for value in (c.difference, c.low, c.high)]
        numbers = (f"{c.first:.1%}", f"{c.second:.1%}", points[0], f"{points[1]} to {points[2]}")
        shown.add_row(Text(c.name), str(c.problems), *numbers, f"{c.p_value:.3g}", c.test, str(c.better), str(c.worse))
    warnings = [f"WARNING: {c.name}: every reward of {c.all_failed} failed" for c in found if c.all_failed]
    if warnings:
        shown.caption = Text(
            "\n".join([*warnings, "Their zeros say nothing of the model; detail in the rows has the reasons."])
        )
        shown.caption_justify = "left"
    return shown


def as_json(found: list[Comparison], first: str, second: str) -> dict[str, Any]:
    return {"first": first, "second": second, "comparisons": [dataclasses.asdict(c) for c in found]}


def _evaluations(path: Path) -> dict[str, Path]:
    """Returns the files of responses by evaluation: of `trapo eval`, or a run's last evaluation as "held-out"."""
    if path.is_file():
        return {path.stem: path}
    # NAME.json is written when the benchmark is finished.
    found = {p.stem: p for p in sorted((path / "benchmarks").glob("*.jsonl")) if p.with_suffix(".json").exists()}
    if (single := path / "eval.jsonl").exists():
        found["eval"] = single
    steps = {int(m[1]): p for p in (path / "eval").glob("step-*.jsonl") if (m := re.fullmatch(r"step-(\d+)", p.stem))}
    if steps:
        found["held-out"] = steps[max(steps)]
    if not found:
        raise TrapoError(f"compare: {path} holds no evaluation (benchmarks/*.jsonl, eval.jsonl or eval/step-*.jsonl)")
    return found


def _compare(name: str, first: Path, second: Path) -> Comparison:
    a, b = _read(first), _read(second)
    if a.keys() != b.keys():
        a, b = _by_content(a), _by_content(b)
    if a.keys() != b.keys():
        only_a, only_b = sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())
        example = (only_a or only_b)[0]
        raise TrapoError(
            f"compare: the problems differ: {len(only_a)} only in {first}, {len(only_b)} only in {second}, "
            f"{len(a.keys() & b.keys())} in both (for instance {example})"
        )
    means = [(sum(a[i]) / len(a[i]), sum(b[i]) / len(b[i])) for i in sorted(a)]
    values_a, values_b = [m[0] for m in means], [m[1] for m in means]
    interval = paired_interval(values_a, values_b)
    better, worse = sum(y > x for x, y in means), sum(y < x for x, y in means)
    binary = all(len(v) == 1 and v[0] in (0.0, 1.0) for side in (a, b) for v in side.values())
    return Comparison(
        name,
        len(means),
        sum(values_a) / len(means),
        sum(values_b) / len(means),
        sum(y - x for x, y in means) / len(means),
        interval.low,
        interval.high,
        mcnemar_exact(worse, better) if binary else sign_flip_test([y - x for x, y in means]),
        "McNemar" if binary else "sign flips",
        better,
        worse,
        " and ".join(side for side, path in (("A", first), ("B", second)) if _all_failed(path)),
    )


def _all_failed(path: Path) -> bool:
    """Returns whether no row holds a reward that the function gave."""
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    return all(json.loads(line).get("status", "ok") != "ok" for line in lines)


def _finite(value: Any) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"not finite: {number}")
    return number


def _by_content(rewards: Rewards) -> Rewards:
    """Returns the rewards by the digest that an id by content ends in (SOURCE/DIGEST): a copy of a file has another
    source."""
    digests = [match[1] if (match := re.fullmatch(r".+/([0-9a-f]{16})", name)) else name for name in rewards]
    return dict(zip(digests, rewards.values(), strict=True)) if len({*digests}) == len(digests) else rewards


def _read(path: Path) -> Rewards:
    rewards: Rewards = {}
    # Lines of JSON end in \n alone; a text may hold U+2028 and other separators that str.splitlines() ends a line at.
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rewards.setdefault(str(row["id"]), []).append(_finite(row["reward"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise TrapoError(f"compare: {path}:{number}: not a row with id and reward") from None
    if not rewards:
        raise TrapoError(f"compare: {path} has no rows")
    return rewards
