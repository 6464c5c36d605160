"""`report.html` is one file that opens offline. Texts of rollouts are hostile input: the template escapes them, and the
page's content security policy runs no script but its own and loads nothing."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trapo_kernels
from trapo.errors import TrapoError
from trapo.report.figures import sections
from trapo.report.run_data import RunData
from trapo.report.words import level_colours, level_name, run_colour
from trapo.tools.files import write_atomic

SAMPLES = 40  # rollouts of a run on the page
SHOWN = 6000  # characters of a text; of a longer one the middle is left out


def write_page(runs: Sequence[RunData], path: Path) -> Path:
    """Write one page on all runs. Raises TrapoError when jinja2 or plotly is not installed."""
    try:
        import jinja2
        from plotly.offline import get_plotlyjs
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
        rollouts=[_card(run, row) for run in runs for row in _spread(run.rollouts, SAMPLES)],
        settings=_settings(runs),
        version=trapo_kernels.__version__,
        plotly=base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode(),
    )
    write_atomic(path, html)
    return path


def _head(index: int, run: RunData) -> dict[str, Any]:
    """Returns what the top of the page says of a run."""
    summary, evaluations = run.summary, run.evaluations
    last = run.rows[-1]
    before = evaluations[0] if evaluations and evaluations[0]["step"] == 0 else None
    after = evaluations[-1] if evaluations and evaluations[-1]["step"] > 0 else None
    failures: dict[str, int] = {}
    for row in (*run.rows, *evaluations):
        for kind, count in (row.get("reward_failures") or {}).items():
            failures[kind] = failures.get(kind, 0) + count
    return {
        "name": run.name,
        "colour": run_colour(index),
        "mode": summary.get("mode") or run.config.get("mode", "?"),
        "model": summary.get("model") or run.config.get("model.path", "?"),
        "finished": bool(summary),
        "steps": last["step"],
        "of_steps": run.config.get("train.steps", last["step"]),
        "before": before,
        "after": after,
        "seconds": summary.get("seconds") or last.get("seconds"),
        "memory": summary.get("peak_memory_gb") or last.get("peak_memory_gb"),
        "backend": summary.get("backend"),
        "failures": failures,
        "skipped": sum(row.get("skipped_steps") or 0 for row in run.rows),
    }


def _card(run: RunData, row: dict[str, Any]) -> dict[str, Any]:
    """Returns a sample rollout as the page shows it."""
    ratio = f"{row['ratio']:g}"
    levels = sorted({*run.levels("rollouts_by_ratio"), ratio}, key=float)
    texts = {key: _shortened(row[key]) for key in ("prompt", "prefix", "own")}
    return {**row, **texts, "run": run.name, "level_name": level_name(ratio), "colour": level_colours(levels)[ratio]}


def _spread(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Returns the rows of whole steps, spread evenly over the run, the first and the last among them; about `count`
    rows."""
    steps = sorted({row["step"] for row in rows})
    wanted = max(count * len(steps) // max(len(rows), 1), 1)
    if len(steps) > wanted:
        steps = [steps[round(i * (len(steps) - 1) / max(wanted - 1, 1))] for i in range(wanted)]
    return [row for row in rows if row["step"] in set(steps)]


def _shortened(text: str) -> str:
    if len(text) <= SHOWN:
        return text
    return f"{text[: SHOWN // 2]}\n[… {len(text) - SHOWN} characters …]\n{text[-SHOWN // 2 :]}"


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
