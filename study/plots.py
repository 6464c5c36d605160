"""Pictures of docs/study.md, and the tables in it. One message per picture; readable on white and on a dark page."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from study.ablations import ABLATION_TASK
from study.arms import ARMS
from study.jobs import Study
from study.regime_tables import regime_tables
from study.regimes import of_study
from study.summary import NOTHING, accuracy, all_tables, base_scores, exact_rows, finished_by_arm
from trapo.tools.files import write_atomic

ROOT = Path(__file__).parents[1]
# Distinct on white and under colour blindness; one colour per arm in every picture.
COLOURS = dict(
    zip(
        ARMS,
        ["#0b6bcb", "#c4420b", "#1f883d", "#8250df", "#9a6700", "#57606a", "#bf3989", "#d29922", "#0a8a8a", "#6e4b2a"],
        strict=True,
    )
)


def draw_all(study: Study) -> None:
    """Draws every picture that there is data for, and fills in the tables. The smoke version writes beside its
    results."""
    smoke = study.settings.name == "smoke"
    pictures = study.results / "study" if smoke else ROOT / "docs/study"
    pictures.mkdir(parents=True, exist_ok=True)
    drawn = [name for name, (draw, _) in PICTURES.items() if _save(study, draw, pictures / f"{name}.png")]
    page = ROOT / "docs/study.md"
    text = fill(page.read_text(), regions(study, drawn))
    write_atomic(study.results / "study.md" if smoke else page, text)


def regions(study: Study, drawn: Sequence[str]) -> dict[str, str]:
    """Returns what stands in each marked region of the page: tables, and the pictures that were drawn."""
    pictures = {
        f"picture-{name}": f"![{caption}](study/{name}.png)" if name in drawn else NOTHING
        for name, (_, caption) in PICTURES.items()
    }
    return all_tables(study) | regime_tables(of_study(study)) | pictures


def fill(page: str, regions: dict[str, str]) -> str:
    """Replace what stands between `<!-- begin:NAME -->` and `<!-- end:NAME -->`.

    Raises ValueError for a mark that no region has."""

    def region(match: re.Match[str]) -> str:
        name = match[1]
        if name not in regions:
            raise ValueError(f"fill: {name!r} is no region; known: {', '.join(regions)}")
        return f"<!-- begin:{name} -->\n{regions[name]}\n<!-- end:{name} -->"

    return re.sub(r"<!-- begin:([\w-]+) -->\n.*?<!-- end:\1 -->", region, page, flags=re.DOTALL)


def _save(study: Study, draw: Callable[[Study, Any], bool], path: Path) -> bool:
    """Saves a picture; returns whether there was anything to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(9, 4.2), facecolor="white", layout="constrained")
    drawn = draw(study, figure)
    if drawn:
        figure.savefig(path, dpi=110)
    plt.close(figure)
    return drawn


def draw_void(study: Study, figure: Any) -> bool:
    """Draws the void mass of the one-token tables over the mixture."""
    found = exact_rows(study, "tables")
    if not found:
        return False
    axes = figure.subplots(1, 2, sharex=True)
    names = list(dict.fromkeys(r["objective"] for r in found))
    for name, colour in zip(names, COLOURS.values(), strict=False):
        mine = [r for r in found if r["objective"] == name]
        shares = [100 * r["share_of_style_a"] for r in mine]
        for axis, key in zip(axes, ("void", "style_b"), strict=True):
            axis.plot(shares, [100 * r[key] for r in mine], marker="o", label=name, color=colour)
    axes[0].set(title="strings in neither style", ylabel="% of probability mass")
    axes[1].set(title="strings in the minority style B")
    expert = sorted({r["share_of_style_a"] for r in found})
    axes[1].plot([100 * s for s in expert], [100 * (1 - s) for s in expert], "k:", label="the expert")
    for axis in axes:
        axis.set(xlabel="expert's share of style A, %")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return True


def draw_arms(study: Study, figure: Any) -> bool:
    """Draws the test accuracy of every arm: mean and interval, a dot per seed."""
    found, count = finished_by_arm(study, "arms"), study.settings.test_problems
    if not found:
        return False
    axes = np.atleast_1d(figure.subplots(1, len(study.settings.tasks), sharey=True))
    names = [arm for arm in reversed(ARMS) if any((task, arm) in found for task in study.settings.tasks)]
    axes[0].set_yticks(range(len(names)), [ARMS[arm].label for arm in names])  # shared by all tasks
    for axis, task in zip(axes, study.settings.tasks, strict=True):
        for y, arm in enumerate(names):
            rows = found.get((task, arm))
            if not rows:
                continue
            e = accuracy(rows, count)
            axis.plot([100 * e.low, 100 * e.high], [y, y], color=COLOURS[arm], linewidth=4, alpha=0.5)
            axis.plot([100 * row["test"] for row in rows], [y] * len(rows), "o", color=COLOURS[arm], markersize=4)
            axis.plot(100 * e.mean, y, "|", color=COLOURS[arm], markersize=16, markeredgewidth=2)
        for row in base_scores(study, task):
            axis.axvline(100 * row["test"], color="#57606a", linestyle=":", label="base")
        axis.set(title=task, xlabel="test accuracy, greedy, %")
        axis.grid(alpha=0.3, axis="x")
        axis.legend(fontsize=8)
    return True


def draw_passes(study: Study, figure: Any) -> bool:
    """Draws pass@k before and after."""
    found = finished_by_arm(study, "arms")
    shown = ("sft", "grpo", "sft_then_rl", "luffy", "micro_groups_nll", "trapo_paper")
    if not found:
        return False
    axes = np.atleast_1d(figure.subplots(1, len(study.settings.tasks)))
    for axis, task in zip(axes, study.settings.tasks, strict=True):
        lines = {"base": base_scores(study, task), **{a: found.get((task, a), []) for a in shown}}
        for arm, rows in lines.items():
            rows = [row["pass_at"] for row in rows if "pass_at" in row]
            if rows:
                ks = [int(k) for k in rows[0]]
                means = [100 * np.mean([row[str(k)] for row in rows]) for k in ks]
                style = {"color": "#24292f", "linestyle": ":"} if arm == "base" else {"color": COLOURS[arm]}
                axis.plot(ks, means, marker="o", label="base" if arm == "base" else ARMS[arm].label, **style)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(title=task, xlabel="k", ylabel="pass@k at T = 1, %")
        axis.grid(alpha=0.3)
    lines = {name: line for axis in axes for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), fontsize=8, loc="outside lower center", ncols=len(lines))
    return True


def draw_guidance(study: Study, figure: Any) -> bool:
    """Draws how guidance falls as the model learns: the share of rollouts with a prefix, by ratio."""
    rows = finished_by_arm(study, "arms").get((ABLATION_TASK, "trapo_paper"), [])
    if not rows:
        return False
    axis = figure.subplots()
    steps = [point["step"] for point in rows[0]["series"]]
    ratios = sorted({r for row in rows for point in row["series"] for r in point["rollouts_by_ratio"]}, key=float)
    for ratio, colour in zip([r for r in ratios if float(r) > 0], COLOURS.values(), strict=False):
        shares = [
            [
                (point["rollouts_by_ratio"].get(ratio) or 0)
                / (study.settings.prompts_per_step * study.settings.rollouts)
                for point in row["series"]
            ]
            for row in rows
        ]
        axis.plot(steps, 100 * np.mean(shares, axis=0), label=f"prefix of {float(ratio):.0%}", color=colour)
    axis.set(title=f"guided rollouts of TRAPO paper, {ABLATION_TASK}", xlabel="step", ylabel="% of rollouts")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return True


PICTURES: dict[str, tuple[Callable[[Study, Any], bool], str]] = {
    "void": (draw_void, "Void mass of the tables by the expert's mixture"),
    "arms": (draw_arms, "Test accuracy of every arm: mean, 95% interval, and a dot per seed"),
    "passes": (draw_passes, "pass@k before and after"),
    "guidance": (draw_guidance, "Guided rollouts over the steps"),
}
