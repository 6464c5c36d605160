"""Part 4: SFT, GRPO and TRAPO from the same start on real weights: SmolLM2-135M on generated word problems.

Whole runs of trapo's trainer, with the fused head. There is no budget for sweeps: GRPO and TRAPO run at the demo's
learning rate, SFT at three, and all of them are reported. One seed: intervals are over the test problems alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from study.jobs import Study
from study.results import Row

STEPS, SMOKE_STEPS = 25, 1
ARMS: dict[str, dict[str, Any]] = {
    "sft lr=2e-5": {"mode": "sft", "optim.lr": 2e-5, "optim.schedule": "linear", "train.prompts_per_step": 32},
    "sft lr=5e-5": {"mode": "sft", "optim.lr": 5e-5, "optim.schedule": "linear", "train.prompts_per_step": 32},
    "sft lr=1e-4": {"mode": "sft", "optim.lr": 1e-4, "optim.schedule": "linear", "train.prompts_per_step": 32},
    "grpo": {"mode": "grpo", "optim.lr": 5e-5},
    "trapo": {"mode": "trapo", "optim.lr": 5e-5, "advantage.baseline": "own_tokens"},
}


def overrides(name: str, run_dir: Path, *, smoke: bool) -> list[str]:
    """Returns the changes to the preset `demo` for an arm."""
    steps = SMOKE_STEPS if smoke else STEPS
    common = {
        "run_dir": run_dir,
        "train.steps": steps,
        "train.prompts_per_step": 2 if smoke else 8,
        "data.eval_limit": 4 if smoke else 200,
        "guidance.sizes": "[4,2,1,1]",
        "guidance.ratios": "[0,0.2,0.5,1.0]",
        "guidance.thresholds": "[-1,0.5,0.7,0.9]",
        "optim.schedule": "constant",
        "eval.every": 25,
        "checkpoint.every": 5,
    }
    chosen = {**common, **ARMS[name]}
    if smoke:
        chosen["train.prompts_per_step"] = 2
    return [f"{key}={value}" for key, value in chosen.items()]


def run_all(study: Study) -> None:
    """Runs all arms, one after the other; an interrupted one goes on from its last checkpoint."""
    table = study.part("smollm")
    smoke = study.settings.name == "smoke"
    for name in ["sft lr=5e-5", "trapo"] if smoke else ARMS:
        run_dir = study.scratch / "smollm" / name.replace(" ", "-").replace("=", "-")
        table.run(name, {"task": "word_problems", "arm": name, "seed": 0}, lambda n=name, d=run_dir: _run(n, d, smoke))


def _run(name: str, run_dir: Path, smoke: bool) -> Row:
    os.environ.setdefault("TQDM_DISABLE", "1")
    from rich.console import Console
    from transformers.utils import logging

    from trapo import trainer
    from trapo.config import load_config
    from trapo.runs.run_dir import RunDir

    logging.disable_progress_bar()
    config = load_config("demo", overrides(name, run_dir, smoke=smoke))
    folder = RunDir(run_dir)
    if not folder.summary.exists():
        trainer.train(config, console=Console(width=120))
    summary, rows = json.loads(folder.summary.read_text()), folder.rows()
    curve = {step: json.loads(path.read_text()) for step, path in folder.evaluations().items()}
    last = folder.evaluation(config.train.steps).with_suffix(".jsonl")
    return {
        **{
            k: summary[k]
            for k in ("eval_before", "eval_after", "eval_after_interval", "eval_problems", "steps", "seconds")
        },
        "backend": summary["backend"],
        "test_curve": [[step, e["accuracy"], *e["interval"]] for step, e in curve.items()],
        "test_rewards": [json.loads(line)["reward"] for line in last.read_text().splitlines()],
        "generated_tokens": sum(row["generated_tokens"] for row in rows),
        "trained_tokens": sum(row["trained_tokens"] for row in rows),
        "expert_tokens": sum(row["supervised_tokens"] for row in rows),
        "guided": [row["guided"] for row in rows],
    }
