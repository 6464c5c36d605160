"""This file draws `report.png` of a run, and writes `report.json`: the numbers behind every line in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trapo.report.run_data import RunData
from trapo.report.words import QUANTITIES, RUN_COLOURS, UNGUIDED, level_colours, level_name, run_colour
from trapo.tools.files import write_json


def write_picture(run: RunData) -> Path:
    """Write report.png and report.json into the run's folder."""
    data = report_data(run)
    write_json(run.path / "report.json", data)
    _draw(data, run.path / "report.png")
    return run.path / "report.png"


def report_data(run: RunData) -> dict[str, Any]:
    """Returns the series by name, each a list over steps with None where a step has no such value."""
    names = [
        "own_reward",
        "reward",
        "trsft_clipped",
        "expert_prob",
        "entropy",
        "guided",
        "tokens_per_second",
        "grad_norm",
        "generated_length",
    ]
    return {
        "summary": run.summary,
        "evaluations": run.evaluations,
        "step": run.steps,
        "series": {name: run.series(name) for name in names},
        # Levels of their own: SFT's full traces have no rewards.
        "reward_by_ratio": {x: run.by_ratio("reward_by_ratio", x) for x in run.levels("reward_by_ratio")},
        "rollouts_by_ratio": {x: run.rollouts_at(x) for x in run.levels("rollouts_by_ratio")},
    }


def _draw(data: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(15, 8), facecolor="white", layout="constrained")
    figure.suptitle(_title(data["summary"]), fontsize=13)
    series, steps = data["series"], data["step"]
    _accuracy(axes[0, 0], data["evaluations"])
    _reward_by_level(axes[0, 1], steps, data)
    _rollouts_by_level(axes[0, 2], steps, data)
    expert = {QUANTITIES[name].title: series[name] for name in ("trsft_clipped", "expert_prob")}
    _lines(axes[1, 0], steps, expert, "Expert tokens", "share, mean p")
    for axis, name in ((axes[1, 1], "entropy"), (axes[1, 2], "tokens_per_second")):
        words = QUANTITIES[name]
        _lines(axis, steps, {words.title: series[name]}, words.title, words.unit)
    temporary = path.with_name(f".tmp-{path.name}")
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    temporary.replace(path)


def _title(summary: dict[str, Any]) -> str:
    if not summary:
        return "unfinished run"
    parts = [f"{summary['mode']} · {summary['model']} · {summary['steps']} steps · {summary['seconds']:.0f} s"]
    if summary.get("eval_before") is not None and summary.get("eval_after") is not None:
        parts.append(f"held-out accuracy {summary['eval_before']:.1%} → {summary['eval_after']:.1%}")
    return "\n".join(parts)


def _accuracy(axis: Any, evaluations: list[dict[str, Any]]) -> None:
    words = QUANTITIES["accuracy"]
    axis.set(title=f"{words.title}, 95% interval", xlabel="step", ylabel=words.unit)
    axis.set_ylim(0, 1)
    axis.margins(x=0.12)  # room for the last label
    axis.grid(alpha=0.3)
    if not evaluations:
        axis.text(0.5, 0.5, "not evaluated", ha="center", transform=axis.transAxes)
        return
    steps = [e["step"] for e in evaluations]
    middle = [e["accuracy"] for e in evaluations]
    low = [max(e["accuracy"] - e["interval"][0], 0) for e in evaluations]
    high = [max(e["interval"][1] - e["accuracy"], 0) for e in evaluations]
    axis.errorbar(steps, middle, yerr=[low, high], marker="o", capsize=5, linewidth=2, color=run_colour(0))
    for step, value in zip(steps, middle, strict=True):
        axis.annotate(f"{value:.1%}", (step, value), xytext=(8, 6), textcoords="offset points")


def _reward_by_level(axis: Any, steps: list[int], data: dict[str, Any]) -> None:
    words, by_level = QUANTITIES["reward_by_ratio"], data["reward_by_ratio"]
    colours = level_colours(list(data["rollouts_by_ratio"]))
    named = {level_name(x): values for x, values in by_level.items()}
    _lines(axis, steps, named, words.title, words.unit, [colours.get(x, UNGUIDED) for x in by_level])
    axis.set_ylim(-0.03, 1.03)


def _rollouts_by_level(axis: Any, steps: list[int], data: dict[str, Any]) -> None:
    words, counts = QUANTITIES["rollouts_by_ratio"], data["rollouts_by_ratio"]
    names, colours = [level_name(x) for x in counts], list(level_colours(list(counts)).values())
    axis.stackplot(steps, list(counts.values()), labels=names, colors=colours, alpha=0.75, step="mid")
    axis.set(title=words.title, xlabel="step", ylabel=words.unit)
    axis.legend(loc="lower left", fontsize=8)


def _lines(
    axis: Any,
    steps: list[int],
    series: dict[str, list[float | None]],
    title: str,
    unit: str,
    colours: Sequence[str] = RUN_COLOURS,
) -> None:
    for colour, (name, values) in zip(colours, series.items(), strict=False):
        numbers = [math.nan if v is None else v for v in values]
        axis.plot(steps, numbers, label=name, color=colour, linewidth=1.8, marker=".", markersize=5)
    axis.set(title=title, xlabel="step", ylabel=unit)
    axis.grid(alpha=0.3)
    if len(series) > 1:
        axis.legend(fontsize=8)
