"""Every mode trains to its end, its report included. Interruptions: test_resume.py and test_restarts.py."""

import json

import pytest
from killed_run import settings, train_here

from trapo.modes import MODES

# What a mode cannot do without.
NEEDED = {
    "sft_then_rl": ["train.sft_steps=2"],
    "distill": ["distill.teacher={model}"],
    "amft": ["train.updates_per_step=1"],
    "bridge": ["train.updates_per_step=1", "lora.rank=4", "optim.weight_decay=0"],
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_evaluates_and_draws_its_report(mode, tiny_model_path, tmp_path):
    if mode == "bridge":
        pytest.importorskip("peft", reason="pip install 'trapo-kernels[lora]'")
    run_dir = tmp_path / "run"
    needed = [words.format(model=tiny_model_path) for words in NEEDED.get(mode, [])]
    steps = ["train.steps=3", "checkpoint.every=0", "eval.every=3"]
    train_here(settings(tiny_model_path, run_dir, f"mode={mode}", *steps, *needed))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["optimizer_steps"] + row["skipped_steps"] > 0 for row in rows)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["mode"], summary["steps"]) == (mode, 3)
    assert summary["eval_after"] is not None
    assert (run_dir / "report.png").stat().st_size > 10_000
    assert "</html>" in (run_dir / "report.html").read_text()
