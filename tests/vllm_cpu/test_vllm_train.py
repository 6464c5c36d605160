"""The commands with vLLM and real weights, each in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

SMALL = ["data.eval_limit=4", "train.steps=2", "train.prompts_per_step=1", "rollout.max_response_tokens=24"]


def trapo(*arguments):
    command = [sys.executable, "-c", "from trapo.cli import main; main()", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("vllm") / "run"
    trapo("train", "demo", "rollout.engine=vllm", "objective.tis_cap=2", f"run_dir={path}", *SMALL)
    return path


def test_training_with_vllm_keeps_engine_and_learner_in_agreement(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all(0 < row["engine_mismatch"] < 1e-3 for row in rows)
    assert any(row["trained_tokens"] for row in rows)


def test_importance_weights_of_vllms_own_tokens_are_one(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    weights = [row["tis_weight"] for row in rows if row.get("tis_weight") is not None]
    assert weights
    assert weights == pytest.approx([1.0] * len(weights), abs=1e-3)


def test_eval_gives_what_transformers_gives(run_dir):
    """Greedy answers of one model through both engines."""
    common = ["demo", f"model.path={run_dir / 'final'}", "data.eval_limit=4", "rollout.max_response_tokens=24"]
    texts = {}
    for engine in ("vllm", "hf"):
        out = run_dir.parent / engine
        trapo("eval", *common, f"rollout.engine={engine}", f"run_dir={out}")
        texts[engine] = [json.loads(line)["text"] for line in (out / "eval.jsonl").read_text().splitlines()]
    assert texts["vllm"] == texts["hf"]
