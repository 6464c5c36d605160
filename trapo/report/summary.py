"""A run's summary.json says what is left of it, from what is on disk: an interruption loses none of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import trapo_kernels as tk
from trapo.evaluation.evaluate import EvalResult
from trapo.models.loading import device_of
from trapo.report.metrics import peak_gpu_memory_gb, peak_memory_gb
from trapo.runs.run_dir import RunDir
from trapo.settings.groups import ModelConfig
from trapo.tools.timing import BETWEEN, PARTS, parts_in


def summarise(
    run_dir: RunDir, mode: str, model: ModelConfig, steps: int, seconds: float, last: Mapping[str, float]
) -> dict[str, Any]:
    """Returns the summary of a run that is at its end after so many steps, `seconds` after its start. last: seconds by
    part of what came after the last step."""
    rows = run_dir.rows()
    before, after = (_evaluation(run_dir, step) for step in (0, steps))
    return {
        "mode": mode,
        "model": model.path,
        "backend": tk.default_backend(device_of(model.device)),
        "steps": steps,
        "seconds": round(seconds, 1),
        "seconds_by_part": _by_part([*rows, last]),  # what is missing to `seconds` are starts and what was interrupted
        "skipped_steps": sum(row["skipped_steps"] for row in rows),
        "eval_before": before.accuracy if before else None,
        "eval_before_interval": before.interval if before else None,
        "eval_after": after.accuracy if after else None,
        "eval_after_interval": after.interval if after else None,
        "eval_problems": after.problems if after else 0,
        **_prior(before, after),
        "best_step": next(iter(run_dir.best_steps(1)), None),
        "reward_failures": _reward_failures(run_dir, rows),
        "peak_memory_gb": max([peak_memory_gb(), *(row["peak_memory_gb"] for row in rows)]),
        **_peak_gpu_memory(rows),
    }


def _by_part(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    total = dict.fromkeys((*PARTS, "sync", *BETWEEN), 0.0)
    for row in rows:
        for part, seconds in parts_in(row).items():
            total[part] = total.get(part, 0.0) + seconds
    return {part: round(seconds, 1) for part, seconds in total.items()}


def summary_lines(folder: Path, summary: Mapping[str, Any]) -> list[str]:
    """Returns what a person at a terminal is told of it."""
    lines = []
    if summary["eval_before"] is not None and summary["eval_after"] is not None:
        for when in ("before", "after"):
            low, high = summary[f"eval_{when}_interval"]
            value = summary[f"eval_{when}"]
            lines.append(f"held-out accuracy {when + ':':7} {value:.1%}  (95% interval {low:.1%} to {high:.1%})")
    lines += [
        f"{name}: {change(key, summary.get(f'{key}_before'), summary[f'{key}_after'])}"
        for name, key in PRIOR
        if summary.get(f"{key}_after") is not None
    ]
    if summary["reward_failures"]:
        lines.append(f"reward failures (scored 0): {summary['reward_failures']}")
    gpu = f" and {summary['peak_gpu_memory_gb']:.1f} GB of the GPU" if "peak_gpu_memory_gb" in summary else ""
    lines.append(
        f"{summary['steps']} steps in {summary['seconds']:.0f} s, peak memory {summary['peak_memory_gb']:.1f} GB{gpu}, "
        f"backend {summary['backend']}"
    )
    return [*lines, f"{folder}/report.html  {folder}/summary.json  {folder}/final (loads with transformers)"]


# What was measured of eval.prior, and the summary's key of it.
PRIOR = (
    ("accuracy on what the base could do", "prior_accuracy"),
    ("NLL of what the base knew", "prior_nll"),
    ("NLL of held-out traces", "trace_nll"),
)


def _prior(before: EvalResult | None, after: EvalResult | None) -> dict[str, float | None]:
    """Returns what the model knew before and knows after, where it was measured."""
    found: dict[str, float | None] = {}
    for _, key in PRIOR:
        values = {when: getattr(result, key, None) for when, result in (("before", before), ("after", after))}
        if any(value is not None for value in values.values()):
            found |= {f"{key}_{when}": value for when, value in values.items()}
    return found


def change(key: str, before: float | None, after: float | None) -> str:
    """Returns a quantity of PRIOR before and after, for people."""
    shown = ["–" if v is None else f"{v:.1%}" if key == "prior_accuracy" else f"{v:.3f}" for v in (before, after)]
    return " → ".join(shown) + ("" if key == "prior_accuracy" else " nats a token")


def _peak_gpu_memory(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    name = "peak_gpu_memory_gb"
    found = [row[name] for row in [*rows, peak_gpu_memory_gb()] if name in row]
    return {name: max(found)} if found else {}


def _evaluation(run_dir: RunDir, step: int) -> EvalResult | None:
    path = run_dir.evaluation(step)
    return EvalResult.load(path) if path.exists() else None


def _reward_failures(run_dir: RunDir, rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for row in rows:
        total.update(row["reward_failures"])
    for path in run_dir.evaluations().values():
        total.update(EvalResult.load(path).reward_failures)
    return dict(total)
