"""A run that is killed with SIGKILL and started again ends like one that nobody disturbed, bit for bit."""

import json
import signal

import forked
import pytest
from safetensors.torch import load_file

CLOCKS = ("tokens_per_second", "peak_memory_gb", "peak_gpu_memory_gb")


def timeless(row):
    """A row of metrics.jsonl without what a clock or the machine's memory says."""
    return {key: value for key, value in row.items() if key not in CLOCKS and not key.startswith("seconds")}


def run(model, run_dir, kill_at="none", *overrides, expect=0):
    done = forked.run("killed_run:main", [model, run_dir, kill_at, *overrides])
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def outcome(run_dir):
    """Everything of a run that must not depend on interruptions."""
    rows = [timeless(json.loads(line)) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run_dir / "summary.json").read_text())
    evals = {f.name: f.read_text() for f in sorted((run_dir / "eval").iterdir())}
    evals["rollouts"] = (run_dir / "rollouts.jsonl").read_text()
    return rows, load_file(run_dir / "final" / "model.safetensors"), summary["eval_after"], evals


@pytest.fixture(scope="module")
def undisturbed(tiny_model_path, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    run(tiny_model_path, run_dir)
    return run_dir


# Two optimizer steps a step, so step:8 and step:9 are just before and after the checkpoint of step 4; evaluations are
# at steps 0, 3 and 6.
KILLS = ["step:8", "save:1", "save:2", "log:4", "eval:3", "report:1"]
KILLS += [pytest.param(when, marks=pytest.mark.slow) for when in ("step:1", "step:9", "eval:1", "eval:2")]


@pytest.mark.parametrize("kill_at", KILLS)
def test_a_killed_run_continues_to_the_same_weights_and_metrics(kill_at, undisturbed, tiny_model_path, tmp_path):
    run_dir = tmp_path / "run"
    run(tiny_model_path, run_dir, kill_at, expect=-signal.SIGKILL)
    assert not (run_dir / "summary.json").exists()
    run(tiny_model_path, run_dir)
    rows, weights, accuracy, evals = outcome(run_dir)
    expected_rows, expected_weights, expected_accuracy, expected_evals = outcome(undisturbed)
    assert rows == expected_rows
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert weights.keys() == expected_weights.keys()
    assert all(weights[name].equal(expected_weights[name]) for name in weights)
    assert (accuracy, evals) == (expected_accuracy, expected_evals)
    assert not list((run_dir / "checkpoints").glob(".tmp-*"))


def test_the_run_that_is_compared_with_did_train(undisturbed, tiny_model_path):
    """Or the comparison above would pass on a trainer that does nothing."""
    before = load_file(tiny_model_path / "model.safetensors")
    rows, after, _, _ = outcome(undisturbed)
    assert any(not before[name].equal(after[name]) for name in before)
    assert all(row["optimizer_steps"] == 2 for row in rows)
    assert len({row["grad_norm"] for row in rows}) == len(rows)
    samples = (undisturbed / "rollouts.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in samples] == [
        step for step in (1, 3, 5) for _ in range(8)
    ]  # a prompt's


def test_transformers_loads_the_final_checkpoint(undisturbed):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(undisturbed / "final")
    tokenizer = AutoTokenizer.from_pretrained(undisturbed / "final")
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.chat_template


def test_only_the_newest_checkpoints_are_kept(undisturbed):
    assert [p.name for p in (undisturbed / "checkpoints").iterdir()] == ["step-000006"]


def test_a_finished_run_is_not_overwritten_unasked(undisturbed, tiny_model_path):
    done = run(tiny_model_path, undisturbed, expect=1)
    assert "holds a finished run" in done.stderr


def test_an_unfinished_run_is_not_continued_with_other_settings(tiny_model_path, tmp_path):
    run(tiny_model_path, tmp_path / "run", "step:1", expect=-signal.SIGKILL)
    done = run(tiny_model_path, tmp_path / "run", "none", "optim.lr=0.5", expect=1)
    assert "other settings (optim.lr)" in done.stderr
