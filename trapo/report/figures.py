"""This file makes the figures of the page, as data for Plotly: traces and what is special about a layout. Fonts, grids
and backgrounds are the page's, which knows whether it is light or dark; words and colours are those of words.py."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from trapo.report.run_data import RunData
from trapo.report.words import (
    DASHES,
    INSIDE,
    OUTSIDE,
    PARTS,
    QUANTITIES,
    RUN_COLOURS,
    UNGUIDED,
    level_colours,
    level_name,
    run_colour,
)  # fmt: skip
from trapo.tools.timing import parts_in

Trace = dict[str, Any]
HEAT = (0.01, 0.1, 0.25, 0.5, 1.0)  # shares that the heat map's scale names
MARKERS = 40  # steps that have a point each


@dataclasses.dataclass(frozen=True)
class Figure:
    title: str
    traces: list[Trace]
    y: str  # title of the y axis, with its unit
    note: str = ""
    x: str = "step"
    layout: dict[str, Any] = dataclasses.field(default_factory=dict)
    run: str = ""  # of which it is alone; empty: of all
    log: bool = False  # whether its y axis may be logarithmic


@dataclasses.dataclass(frozen=True)
class Section:
    title: str
    figures: list[Figure]


def sections(runs: Sequence[RunData]) -> list[Section]:
    """Returns all figures that these runs have numbers for."""
    found = [
        Section("Learning", [_accuracy(runs), _curve(runs, "own_reward", unit_range=True)]),
        Section(
            "Guidance",
            [
                *_each(runs, _rollouts_by_level),
                *_each(runs, _reward_by_level),
                _guided(runs),
                _curve(runs, "reward", unit_range=True),
            ],
        ),
        Section(
            "Trust region",
            [
                _inside(runs),
                _curve(runs, "expert_prob", unit_range=True),
                *([_early_and_late(runs[0])] if len(runs) == 1 else [_histograms(runs)]),
                *_each(runs, _histogram_over_time),
            ],
        ),
        Section(
            "Policy",
            [
                *(
                    _curve(runs, name, zero=True)
                    for name in ("kl_ref_k3", "kl_old_k3", "clipped")
                    if _moves(runs, name)
                ),
                _curve(runs, "entropy", zero=True),
                _curve(runs, "generated_length", zero=True),
                _curve(runs, "finished", unit_range=True),
                _curve(runs, "zero_advantage", unit_range=True),
                _curve(runs, "grad_norm", zero=True),
                _curve(runs, "lr", zero=True, smooth=False),
            ],
        ),
        Section(
            "Cost",
            [
                _curve(runs, "tokens_per_second", zero=True),
                *_each(runs, _time_by_part),
                _time_of_runs(runs),
                _curve(runs, "peak_memory_gb", "so far", zero=True, smooth=False),
                _curve(runs, "peak_gpu_memory_gb", "so far", zero=True, smooth=False),
            ],
        ),
    ]
    drawn = [Section(s.title, [f for f in s.figures if f.traces]) for s in found]
    return [section for section in drawn if section.figures]


def _each(runs: Sequence[RunData], draw: Callable[[RunData], Figure]) -> list[Figure]:
    """Returns a figure for each run, named after it when there are several."""
    figures = [draw(run) for run in runs]
    if len(runs) == 1:
        return figures
    named = zip(figures, runs, strict=True)
    return [dataclasses.replace(f, title=f"{f.title} · {r.name}", run=r.name) for f, r in named]


def _moves(runs: Sequence[RunData], metric: str) -> bool:
    """Returns whether a metric is ever anything but 0: the ratio of a policy to itself says nothing."""
    return any(value for run in runs for value in run.series(metric))


def _figure(metric: str, traces: list[Trace], note: str = "", x: str = "step", layout: Any = None) -> Figure:
    """Returns a figure of a quantity, under its own title and with its own unit."""
    words = QUANTITIES[metric]
    return Figure(words.title, traces, words.unit, note, x, layout or {})


def _curve(
    runs: Sequence[RunData],
    metric: str,
    note: str = "",
    *,
    zero: bool = False,
    unit_range: bool = False,
    smooth: bool = True,
) -> Figure:
    """Returns one metric over the steps, a line a run; zero: the axis starts there; unit_range: it is [0, 1]."""
    traces: list[Trace] = []
    for index, run in enumerate(runs):
        values = run.series(metric)
        if any(v is not None for v in values):
            style = {"color": run_colour(index), "dash": DASHES[index // len(RUN_COLOURS) % len(DASHES)]}
            traces.append(_line(run.name, run, values, style, smooth=smooth))
    axis: dict[str, Any] = {"rangemode": "tozero"} if zero else {}
    if unit_range:
        axis = {"range": [-0.03, 1.03]} if all(_in_unit_range(t["y"]) for t in traces) else {}
    log = not unit_range and any(v is not None and v > 0 for trace in traces for v in trace["y"])
    return dataclasses.replace(_figure(metric, traces, note, layout={"yaxis": axis}), log=log)


def _line(name: str, run: RunData, values: list[float | None], style: dict[str, Any], *, smooth: bool = True) -> Trace:
    """Returns a line over the steps of a run. The page smooths it, and puts other quantities than steps under it."""
    mode = "lines+markers" if len(values) <= MARKERS else "lines"
    return {
        "type": "scatter",
        "name": name,
        "x": run.steps,
        "y": values,
        "mode": mode,
        "line": {"width": 2, **style},
        "marker": {"size": 5},
        "meta": {"run": run.name, "smooth": smooth, "curve": True},
    }


def _in_unit_range(values: Sequence[float | None]) -> bool:
    return all(v is None or 0 <= v <= 1 for v in values)


def _accuracy(runs: Sequence[RunData]) -> Figure:
    traces = []
    for index, run in enumerate(runs):
        found = run.evaluations
        if not found:
            continue
        accuracy = [e["accuracy"] for e in found]
        error = {
            "type": "data",
            "symmetric": False,
            "array": [e["interval"][1] - e["accuracy"] for e in found],
            "arrayminus": [e["accuracy"] - e["interval"][0] for e in found],
            "thickness": 1.5,
            "width": 5,
        }
        traces.append(
            {
                "type": "scatter",
                "name": run.name,
                "x": [e["step"] for e in found],
                "y": accuracy,
                "error_y": error,
                "mode": "lines+markers" + ("+text" if len(runs) == 1 and len(found) <= 8 else ""),
                "text": [f"{a:.1%}" for a in accuracy],
                "textposition": "bottom right",
                "cliponaxis": False,
                "line": {"color": run_colour(index), "width": 2},
                "marker": {"size": 9},
                "meta": {"run": run.name, "smooth": False, "curve": True},
                "hovertemplate": "%{text} of " + str(found[-1].get("problems", "?")) + " problems",
            }
        )
    last = max((run.steps[-1] for run in runs), default=1)
    layout = {
        "yaxis": {"tickformat": ".0%", "rangemode": "tozero"},
        "xaxis": {"range": [-0.03 * last, 1.12 * last]},  # room for the last label
    }
    return _figure("accuracy", traces, "with 95% intervals", layout=layout)


def _rollouts_by_level(run: RunData) -> Figure:
    ratios = run.levels("rollouts_by_ratio")
    colours = level_colours(ratios)
    traces = [
        {
            "type": "scatter",
            "name": level_name(ratio),
            "x": run.steps,
            "y": run.rollouts_at(ratio),
            "mode": "lines",
            "stackgroup": "rollouts",
            "line": {"width": 0.5, "color": colours[ratio]},
            "fillcolor": colours[ratio],
            "meta": {"run": run.name},
        }
        for ratio in ratios
    ]
    return _figure("rollouts_by_ratio", traces, "by length of the expert prefix")


def _reward_by_level(run: RunData) -> Figure:
    ratios = run.levels("reward_by_ratio")
    colours = level_colours(ratios)
    traces = [_line(level_name(r), run, run.by_ratio("reward_by_ratio", r), {"color": colours[r]}) for r in ratios]
    axis = {"range": [-0.03, 1.03]} if all(_in_unit_range(t["y"]) for t in traces) else {}
    return _figure("reward_by_ratio", traces, layout={"yaxis": axis})


def _guided(runs: Sequence[RunData]) -> Figure:
    if len(runs) == 1 or not any(any(run.series("guided")) for run in runs):  # of one run it is in _rollouts_by_level
        return Figure("", [], "")
    return _curve(runs, "guided", unit_range=True)


def _inside(runs: Sequence[RunData]) -> Figure:
    alphas = sorted({run.alpha for run in runs if run.alpha is not None})
    note = "p ≥ α = " + ", ".join(f"{a:g}" for a in alphas) if alphas else "p ≥ α"
    return _curve(runs, "trsft_inside", note, unit_range=True)


def _counts(run: RunData) -> list[tuple[int, list[int]]]:
    """Returns (step, expert tokens by probability) of the steps that had any."""
    found = [(row["step"], row.get("expert_prob_histogram")) for row in run.rows]
    return [(step, counts) for step, counts in found if counts]


def _shares(histograms: Sequence[list[int]]) -> list[float]:
    total = [sum(column) for column in zip(*histograms, strict=True)]
    return [count / sum(total) for count in total]


def _middles(bins: int) -> list[float]:
    return [(i + 0.5) / bins for i in range(bins)]


def _at_alpha(alphas: Sequence[float], axis: str) -> dict[str, Any]:
    """Returns the lines at α across a figure whose `axis` (x or y) is probability."""
    other = "y" if axis == "x" else "x"
    shapes, labels = [], []
    for alpha in alphas:
        ends = {f"{axis}0": alpha, f"{axis}1": alpha, f"{other}0": 0, f"{other}1": 1, f"{other}ref": "paper"}
        shapes.append({"type": "line", "line": {"color": OUTSIDE, "width": 2, "dash": "dash"}, **ends})
        place = {axis: alpha, other: 1, f"{other}ref": "paper", f"{axis}anchor": "left" if axis == "x" else "bottom"}
        labels.append(
            {
                "text": f"α = {alpha:g}",
                "showarrow": False,
                "font": {"color": "#a34400"},
                "bgcolor": "rgba(255,255,255,0.85)",
                **place,
            }
        )
        labels[-1][f"{other}anchor"] = "top" if other == "y" else "right"
    return {"shapes": shapes, "annotations": labels}


def _early_and_late(run: RunData) -> Figure:
    """Returns the histogram of the first third of the steps against that of the last."""
    found = [counts for _, counts in _counts(run)]
    if not found:
        return Figure("", [], "")
    third = max(len(found) // 3, 1)
    parts = {"all steps": found} if len(found) < 2 else {"first third": found[:third], "last third": found[-third:]}
    colours = [UNGUIDED, INSIDE] if len(parts) == 2 else [INSIDE]
    traces = [
        {
            "type": "bar",
            "name": f"{name} of the steps" if len(parts) == 2 else name,
            "x": _middles(len(histograms[0])),
            "y": _shares(histograms),
            "marker": {"color": colour},
            "hovertemplate": "p ≈ %{x:.3f}: %{y:.1%}",
        }
        for colour, (name, histograms) in zip(colours, parts.items(), strict=True)
    ]
    alphas = [] if run.alpha is None else [run.alpha]
    layout = {"bargap": 0.08, "yaxis": {"tickformat": ".0%"}, "xaxis": {"range": [0, 1]}} | _at_alpha(alphas, "x")
    note = "left of α the gradient is bounded" if alphas else ""
    return _figure("expert_prob_histogram", traces, note, "probability p", layout)


def _histograms(runs: Sequence[RunData]) -> Figure:
    traces = []
    for index, run in enumerate(runs):
        if found := [counts for _, counts in _counts(run)]:
            line = {"shape": "hvh", "width": 2, "color": run_colour(index)}
            place = {"x": _middles(len(found[0])), "y": _shares(found)}
            traces.append({"type": "scatter", "name": run.name, "mode": "lines", "line": line, **place})
    alphas = sorted({run.alpha for run in runs if run.alpha is not None})
    layout = {"yaxis": {"tickformat": ".0%", "rangemode": "tozero"}, "xaxis": {"range": [0, 1]}}
    layout |= _at_alpha(alphas, "x")
    return _figure("expert_prob_histogram", traces, "all steps", "probability p", layout)


def _histogram_over_time(run: RunData) -> Figure:
    found = _counts(run)
    if len(found) < 2:
        return Figure("", [], "")
    shares = [_shares([counts]) for _, counts in found]
    trace = {
        "type": "heatmap",
        "name": run.name,
        "x": [step for step, _ in found],
        "y": _middles(len(shares[0])),
        # Most tokens are all but certain: a linear scale would show one bright row and nothing else.
        "z": [[math.sqrt(share) for share in column] for column in zip(*shares, strict=True)],
        "text": [[f"{share:.1%}" for share in column] for column in zip(*shares, strict=True)],
        "zmin": 0,
        "zmax": 1,
        "colorscale": "Cividis",
        "colorbar": {
            "tickvals": [math.sqrt(share) for share in HEAT],
            "ticktext": [f"{share:.0%}" for share in HEAT],
            "thickness": 12,
            "outlinewidth": 0,
        },
        "hovertemplate": "step %{x}, p ≈ %{y:.3f}: %{text}<extra></extra>",
    }
    layout: dict[str, Any] = {"yaxis": {"range": [0, 1], "showgrid": False}, "xaxis": {"showgrid": False}}
    layout |= _at_alpha([] if run.alpha is None else [run.alpha], "y") | {"hovermode": "closest"}
    title = f"{QUANTITIES['expert_prob_histogram'].title} over time"
    return Figure(title, [trace], "probability p", "share of a step's", layout=layout)


def _time_by_part(run: RunData) -> Figure:
    traces = [_bars(part, run.steps, run.series(f"seconds_{part}")) for part in _parts(run.rows)]
    note = "evaluations and saves: with the step after them"
    return _figure("seconds_step", traces, note, layout={"barmode": "stack", "bargap": 0.15})


def _parts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the parts of time that any of the rows has, in their order on the page."""
    parts = {part for row in rows for part in parts_in(row)}
    if "generate" in parts:  # the parts of collecting
        parts -= {"collect"}
    order = {part: place for place, part in enumerate(PARTS)}
    return sorted(parts, key=lambda part: (order.get(part, len(order)), part))


def _bars(part: str, x: Sequence[Any], y: Sequence[float | None], **more: Any) -> Trace:
    return {"type": "bar", "name": part, "x": x, "y": y, "marker": {"color": PARTS.get(part, UNGUIDED)}, **more}


def _time_of_runs(runs: Sequence[RunData]) -> Figure:
    """Returns each run's time by part; of a finished one with what came after its last step."""
    names = [run.name for run in runs]
    found = [run.summary.get("seconds_by_part") or _summed(run) for run in runs]
    whole = [sum(of_run.values()) for of_run in found]
    traces = []
    for part in _parts([{f"seconds_{part}": 0.0 for part in of_run} for of_run in found]):
        seconds = [of_run.get(part, 0.0) for of_run in found]
        shares = [f"{part} {s / max(all_, 1e-9):.0%}" for s, all_ in zip(seconds, whole, strict=True)]
        if any(seconds):
            traces.append(_bars(part, names, seconds, text=shares, textposition="inside"))
    layout = {"barmode": "stack", "bargap": 0.5, "xaxis": {"type": "category"}, "hovermode": "closest"}
    return Figure("Time of the run by part", traces, "seconds", "", "run", layout)


def _summed(run: RunData) -> dict[str, float]:
    return {part: sum(value or 0.0 for value in run.series(f"seconds_{part}")) for part in _parts(run.rows)}
