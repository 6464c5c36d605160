"""SIGTERM, full disks, damaged checkpoints, updates that are not finite: the run survives, says so, and goes on."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
from killed_run import settings, train_here
from test_resume import outcome

from trapo import rollouts, trainer
from trapo.config import load_config, save_config
from trapo.engines.hf import HFEngine
from trapo.errors import TrapoError
from trapo.evaluation import evaluate, held_out
from trapo.learner import Learner
from trapo.runs import checkpoint
from trapo.runs.manifest import find_damage, write_manifest
from trapo.runs.run_dir import RunDir
from trapo.runs.skips import SkipLimit
from trapo.runs.stopping import Stopped, StopSignal

TRAPO = Path(sys.executable).with_name("trapo")


def train(model, run_dir, *overrides):
    """What the run wrote to its console; it runs in this process, and draws no report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "write_report", lambda *_: None)
        return train_here(settings(model, run_dir, *overrides))


def assert_same_outcome(run_dir, expected):
    rows, weights, accuracy, evals = outcome(run_dir)
    expected_rows, expected_weights, expected_accuracy, expected_evals = outcome(expected)
    assert rows == expected_rows
    assert weights.keys() == expected_weights.keys()
    assert all(weights[name].equal(expected_weights[name]) for name in weights)
    assert (accuracy, evals) == (expected_accuracy, expected_evals)


def steps_kept(run_dir):
    return [c.step for c in checkpoint.find(run_dir / "checkpoints")]


@pytest.fixture(scope="module")
def undisturbed(tiny_model_path, tmp_path_factory):
    """A finished run that keeps its two newest checkpoints."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    train(tiny_model_path, run_dir, "checkpoint.keep=2")
    return run_dir


@pytest.fixture
def unfinished(undisturbed, tmp_path):
    """A copy of it, as if it had been killed before its last evaluation."""
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    (run_dir / "summary.json").unlink()
    (run_dir / "eval" / "step-000006.json").unlink()
    config = load_config(run_dir / "config.yaml")
    save_config(dataclasses.replace(config, run_dir=str(run_dir)), run_dir / "config.yaml")
    return run_dir


# ------------------------------------------------------------------------------------------------------- SIGTERM


def terminate_in_call(monkeypatch, owner, name, number):
    """SIGTERM to this process from within the N-th call of a function."""
    function, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(None)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


# The run draws 4 micro-groups a step, takes 2 optimizer steps a step and saves at 2, 4, 6.
# What is saved: the steps that were complete when the signal came, and the one whose update it came into.
@pytest.mark.parametrize(
    ("owner", "name", "number", "last"),
    [
        pytest.param(HFEngine, "generate", 1, 0, id="first evaluation", marks=pytest.mark.slow),
        pytest.param(rollouts, "_generate", 14, 3, id="rollouts"),
        pytest.param(Learner, "_step", 9, 5, id="update"),
        pytest.param(torch, "save", 2, 4, id="save", marks=pytest.mark.slow),
        pytest.param(evaluate, "decode_text", 10, 6, id="last evaluation", marks=pytest.mark.slow),
    ],
)
def test_sigterm_saves_what_is_complete_and_the_same_command_ends_as_if_nothing_had_been(
    owner, name, number, last, monkeypatch, undisturbed, tiny_model_path, tmp_path
):
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        terminate_in_call(patch, owner, name, number)
        with pytest.raises(Stopped, match=f"stopped by SIGTERM after step {last}"):
            train(tiny_model_path, run_dir)
    assert steps_kept(run_dir) == ([last] if last else [])
    assert not (run_dir / "summary.json").exists()
    train(tiny_model_path, run_dir)
    assert_same_outcome(run_dir, undisturbed)


def test_a_terminated_command_says_what_it_did_and_exits_with_0(undisturbed, tiny_model_path, tmp_path):
    run_dir = tmp_path / "run"
    save_config(settings(tiny_model_path, run_dir), tmp_path / "config.yaml")
    command = [str(TRAPO), "train", str(tmp_path / "config.yaml")]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # All runs the same: what a thread of the run computes may depend on how many threads it may start.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, **options)
    deadline = time.monotonic() + 240
    while not (run_dir / "metrics.jsonl").exists() or not (run_dir / "metrics.jsonl").read_text().count("\n"):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=240)
    assert (process.returncode, errors) == (0, "")
    last = steps_kept(run_dir)[-1]
    assert f"trapo: stopped by SIGTERM after step {last}; the same command continues from there" in output
    assert "Traceback" not in output
    assert forked.run("trapo.tools.command:main", command[1:]).returncode == 0
    assert_same_outcome(run_dir, undisturbed)


def test_a_signal_outside_abandonable_work_waits_for_it():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        finished = True
        with pytest.raises(Stopped), stop.abandonable():
            finished = False
    assert finished
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# ----------------------------------------------------------------------------------------------------- full disks


def test_a_save_that_does_not_fit_leaves_the_previous_checkpoint_and_the_run_goes_on(
    monkeypatch, file_size_limit, undisturbed, tiny_model_path, tmp_path
):
    """The second save hits a real limit in the middle of the optimizer's state."""
    run_dir, save, calls = tmp_path / "run", torch.save, []

    def save_with_limit(*args, **kwargs):
        calls.append(None)
        with file_size_limit(2_000_000 if len(calls) == 2 else -1):
            save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", save_with_limit)
    output = train(tiny_model_path, run_dir)
    told = [line for line in output.splitlines() if "no checkpoint after step 4" in line]
    assert len(told) == 1
    assert "could not be written" in told[0]
    assert told[0].endswith("training goes on, last checkpoint: step 2")
    assert_same_outcome(run_dir, undisturbed)
    assert steps_kept(run_dir) == [6]


def test_a_full_disk_stops_no_run_and_the_last_whole_checkpoint_is_continued(undisturbed, tiny_model_path, tmp_path):
    """On a disk (tmpfs) that has room for the final model and one checkpoint but not for two."""
    sizes = {
        p: sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) for p in (undisturbed / "checkpoints").iterdir()
    }
    final = sum(f.stat().st_size for f in (undisturbed / "final").iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    size = max(sizes.values()) + final + 2_000_000
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
    try:
        output = train(tiny_model_path, disk / "run", "checkpoint.keep=2")
        told = [line for line in output.splitlines() if "no checkpoint after step" in line]
        assert len(told) == 2  # after steps 4 and 6
        assert all(line.endswith("training goes on, last checkpoint: step 2") for line in told)
        assert all("could not be written: no space left on the disk;" in line for line in told)
        assert steps_kept(disk / "run") == [2]
        assert not list((disk / "run").rglob(".tmp-*"))
        assert_same_outcome(disk / "run", undisturbed)
        (disk / "run" / "summary.json").unlink()
        shutil.rmtree(disk / "run" / "final")
        assert "after step 2" in train(tiny_model_path, disk / "run", "checkpoint.keep=1")
        assert_same_outcome(disk / "run", undisturbed)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # weights may still be mapped


# ------------------------------------------------------------------------------------------- damaged checkpoints


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    """One bit, in the middle."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("model.safetensors", cut, "model.safetensors has "),
        ("trainer_state.pt", flip, "trainer_state.pt does not have its checksum"),
        ("config.json", Path.unlink, "config.json is missing"),
        ("manifest.json", Path.unlink, "manifest.json is missing"),
        ("manifest.json", cut, "manifest.json is not readable"),
    ],
)
def test_damage_to_a_checkpoint_is_seen(name, damage, reason, undisturbed, tmp_path):
    shutil.copytree(undisturbed / "checkpoints" / "step-000006", tmp_path / "copy")
    assert find_damage(tmp_path / "copy") is None
    damage(tmp_path / "copy" / name)
    assert find_damage(tmp_path / "copy").startswith(reason)


def test_a_half_written_checkpoint_is_reported_in_a_line_and_the_one_before_it_continued(
    unfinished, undisturbed, tiny_model_path
):
    cut(unfinished / "checkpoints" / "step-000006" / "model.safetensors")
    output = train(tiny_model_path, unfinished, "checkpoint.keep=2")
    told = [line for line in output.splitlines() if "is damaged" in line]
    assert len(told) == 1
    assert "step-000006 is damaged (model.safetensors has" in told[0]
    assert f"continuing {unfinished} after step 4" in output
    assert_same_outcome(unfinished, undisturbed)
    assert steps_kept(unfinished) == [4, 6]
    assert find_damage(unfinished / "checkpoints" / "step-000006") is None


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_anew_unasked(unfinished, tiny_model_path):
    for folder in (unfinished / "checkpoints").iterdir():
        cut(folder / "trainer_state.pt")
    with pytest.raises(TrapoError, match=r"every checkpoint in .* is damaged; delete that folder to start"):
        train(tiny_model_path, unfinished, "checkpoint.keep=2")


# ------------------------------------------------------------------------------------------------- what is kept


def test_the_best_checkpoint_by_held_out_accuracy_outlives_newer_ones(monkeypatch, tiny_model_path, tmp_path):
    accuracies = iter([0.9, 0.1, 0.6, 0.3, 0.2, 0.1, 0.4])  # the first is of the untrained model
    real = held_out.evaluate

    def scripted(*args, **kwargs):
        return dataclasses.replace(real(*args, **kwargs), accuracy=next(accuracies))

    monkeypatch.setattr(held_out, "evaluate", scripted)
    train(
        tiny_model_path,
        tmp_path / "run",
        "eval.every=1",
        "checkpoint.every=0",
        "checkpoint.keep_best=1",
        "checkpoint.keep=1",
    )
    assert steps_kept(tmp_path / "run") == [2, 6]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["best_step"] == 2


def test_pruning_keeps_the_newest_and_the_named(tmp_path):
    for step in (2, 4, 6, 8):
        (tmp_path / f"step-{step:06d}").mkdir()
        write_manifest(tmp_path / f"step-{step:06d}")
    checkpoint.prune(tmp_path, 1, also=[4])
    assert [c.step for c in checkpoint.find(tmp_path)] == [4, 8]


# --------------------------------------------------------------------------------------------------- not finite


def test_updates_that_are_not_finite_are_skipped_counted_and_end_the_run_at_the_limit(tiny_model_path, tmp_path):
    run_dir = tmp_path / "run"
    limits = (
        "train.max_skipped_steps=2", "reward.function=reward_fixtures:by_length", "train.updates_per_step=1",
        "objective.policy=reward_fixtures:too_large", "objective.clip_low=inf", "objective.clip_high=inf",
    )  # fmt: skip
    with pytest.raises(TrapoError, match=r"train\.max_skipped_steps: 2 steps in a row, up to step 2, had a loss"):
        train(tiny_model_path, run_dir, "mode=grpo", "advantage.std=false", *limits)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(row["skipped_steps"], row["optimizer_steps"]) for row in rows] == [(1, 0), (1, 0)]


def test_skips_before_an_interruption_count_and_an_optimizer_step_starts_anew(tmp_path):
    run, notes = RunDir(tmp_path), []
    limit = SkipLimit(3, run)

    def step(number, skipped, taken=0):
        row = {"step": number, "skipped_steps": skipped, "optimizer_steps": taken}
        run.log(row)
        return row

    step(1, 1), step(2, 1)  # logged by the process that was interrupted
    limit.check(step(3, 0), notes.append)  # nothing to learn
    limit.check(step(4, 1, 1), notes.append)
    assert notes == ["step 4: 1 of 2 updates skipped, loss or gradient not finite"]
    limit.check(step(5, 1), notes.append)
    limit.check(step(6, 1), notes.append)
    with pytest.raises(TrapoError, match="3 steps in a row, up to step 7"):
        limit.check(step(7, 1), notes.append)
    with pytest.raises(TrapoError, match="4 steps in a row, up to step 8"):
        SkipLimit(4, run).check(step(8, 1), notes.append)
