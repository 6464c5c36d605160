"""`report.html` is one file that opens offline. Texts of rollouts are hostile input: the template escapes them, and the
page's content security policy runs no script but its own and loads nothing."""

from __future__ import annotations

import base64
import dataclasses
import functools
import gzip
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import trapo_kernels
from trapo.errors import TrapoError
from trapo.report.figures import sections
from trapo.report.groups import groups_of
from trapo.report.run_data import RunData
from trapo.report.summary import PRIOR, change
from trapo.report.words import run_colour
from trapo.tools.files import write_atomic

SEED_KEYS = ("run_dir", "seed")  # in which repetitions of a run differ


def write_page(runs: Sequence[RunData], path: Path) -> Path:
    """Write one page on all runs. Raises TrapoError when jinja2 or plotly is not installed."""
    try:
        import jinja2

        plotly = _plotly()
    except ImportError as error:
        raise TrapoError(f"report: needs {error.name} (pip install {error.name})") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "duration": _duration}
    drawn = sections(runs)
    figures = [dataclasses.asdict(figure) for section in drawn for figure in section.figures]
    html = environment.get_template("page.html.j2").render(
        title=" · ".join(run.name for run in runs),
        nonce=secrets.token_urlsafe(16),
        runs=[_head(index, run) for index, run in enumerate(runs)],
        sections=drawn,
        figures=figures,
        groups=[group for run in runs for group in groups_of(run)],
        axes=_axes(runs),
        settings=_settings(runs),
        version=trapo_kernels.__version__,
        plotly=plotly,
    )
    write_atomic(path, html)
    return path


@functools.cache
def _plotly() -> str:
    """Returns Plotly's JavaScript, packed for the page."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def _head(index: int, run: RunData) -> dict[str, Any]:
    """Returns what the top of the page says of a run."""
    summary, evaluations = run.summary, run.evaluations
    last = run.rows[-1]
    before = evaluations[0] if evaluations and evaluations[0]["step"] == 0 else None
    after = evaluations[-1] if evaluations and evaluations[-1]["step"] > 0 else None
    before, after = before or _evaluated(summary, "before", 0), after or _evaluated(summary, "after", last["step"])
    failures: dict[str, int] = {}
    for row in (*run.rows, *evaluations):
        for kind, count in (row.get("reward_failures") or {}).items():
            failures[kind] = failures.get(kind, 0) + count
    own = [value for value in run.series("own_reward") if value is not None]
    part = max(len(own) // 5, 1)
    return {
        "name": run.name,
        "own_first": sum(own[:part]) / part if own else None,
        "own_last": sum(own[-part:]) / part if own else None,
        "own_steps": part,
        "colour": run_colour(index),
        "mode": summary.get("mode") or run.config.get("mode", "?"),
        "model": summary.get("model") or run.config.get("model.path", "?"),
        "finished": bool(summary),
        "steps": last["step"],
        "of_steps": run.config.get("train.steps", last["step"]),
        "before": before,
        "after": after,
        "knowledge": [
            (name, change(key, (before or {}).get(key), after[key]))
            for name, key in PRIOR
            if after is not None and after.get(key) is not None
        ],
        "seconds": summary.get("seconds") or last.get("seconds"),
        "memory": summary.get("peak_memory_gb") or last.get("peak_memory_gb"),
        "backend": summary.get("backend"),
        "failures": failures,
        "skipped": sum(row.get("skipped_steps") or 0 for row in run.rows),
    }


def _evaluated(summary: Mapping[str, Any], when: str, step: int) -> dict[str, Any] | None:
    """Returns an evaluation whose file is gone, as the summary has it."""
    accuracy = summary.get(f"eval_{when}")
    interval = summary.get(f"eval_{when}_interval")
    return None if accuracy is None else {"step": step, "accuracy": accuracy, "interval": interval}


def _axes(runs: Sequence[RunData]) -> dict[str, dict[str, Any]]:
    """Returns what may stand under a curve of each run in place of its steps, and which runs repeat one another."""
    alike: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        settings = {key: value for key, value in run.config.items() if key not in SEED_KEYS}
        # Without a configuration nothing is known of it.
        alike.setdefault(repr(sorted(settings.items())) if settings else str(index), []).append(index)
    repeats = {index: members for members in alike.values() for index in members}
    return {
        run.name: {
            "step": run.steps,
            "tokens": run.tokens,
            "time": [row.get("seconds") for row in run.rows],
            "repeats": _together([runs[i].name for i in repeats[index]]),
            "colour": run_colour(repeats[index][0]),
        }
        for index, run in enumerate(runs)
    }


def _together(names: Sequence[str]) -> str:
    """Returns what runs that repeat one another are called as one; "" for a run that nothing repeats."""
    return f"{names[0]} and {len(names) - 1} more of its kind" if len(names) > 1 else ""


def _settings(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Returns all configuration keys with each run's value; those in which runs differ come first."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = []
    for key in keys:
        values = [run.config.get(key) for run in runs]
        differs = key != "run_dir" and any(value != values[0] for value in values)
        rows.append({"key": key, "values": values, "differs": differs})
    return sorted(rows, key=lambda row: not row["differs"])


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"
