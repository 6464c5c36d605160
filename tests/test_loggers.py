"""TensorBoard and W&B, each with the real package where it is installed."""

import importlib.util
import json
import os
import signal
import subprocess
import sys

import pytest
from report_runs import full_row
from test_resume import run as run_killed

from trapo.config import merge_config
from trapo.errors import TrapoError
from trapo.evaluation.evaluate import EvalResult
from trapo.report import loggers
from trapo.report.loggers import Loggers, check_loggers, flat_numbers
from trapo.runs.run_dir import RunDir
from trapo.settings.text import tree_of

needs_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")


def scalars(path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    return events


def wandb_records(path):
    """Records of a .wandb file: LevelDB's log format after 7 bytes of W&B's own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits into the rest of a block
            at += 32768 - at % 32768
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


def test_rows_become_flat_numbers_by_name():
    row = {"step": 3, "phase": "trapo", "reward": None, "lr": 0.5, "reward_by_ratio": {"0": 0.25}, "histogram": [1, 2]}
    assert flat_numbers(row) == {"lr": 0.5, "reward_by_ratio/0": 0.25}


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_logger_that_is_asked_for_and_missing_is_refused_in_one_line(name, monkeypatch):
    monkeypatch.setitem(loggers.LOGGERS, name, ("no_such_package", loggers.LOGGERS[name][1]))
    with pytest.raises(TrapoError, match=rf"log\.{name}: got true, but no_such_package is not installed"):
        check_loggers(merge_config({}, [f"log.{name}=true"]).log)
    check_loggers(merge_config({}).log)


@needs_wandb
def test_wandb_without_a_key_is_refused_before_anything_is_computed(tmp_path):
    imports = "from trapo import config; from trapo.report import loggers; "
    asked = imports + "loggers.check_loggers(config.merge_config({}, ['log.wandb=true']).log)"
    # In a process of its own: W&B remembers what it was asked.
    variables = {k: v for k, v in os.environ.items() if not k.startswith("WANDB") and k != "NETRC"}
    variables |= {"HOME": str(tmp_path), "WANDB_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", asked], env=variables, capture_output=True, text=True, check=False)
    assert "TrapoError: log.wandb: got true, but there is no key" in done.stderr
    variables["WANDB_MODE"] = "offline"
    subprocess.run([sys.executable, "-c", asked], env=variables, check=True)


@needs_tensorboard
def test_tensorboard_gets_numbers_histograms_and_evaluations(tmp_path):
    config = merge_config({}, ["log.tensorboard=true"])
    result = EvalResult(0.25, (0.2, 0.3), 100, 1, {"1": 0.25}, 1.0, 10.0, {})
    with Loggers(config.log, RunDir(tmp_path), 0, tree_of(config)) as opened:
        opened.evaluation(0, result)
        for step in (1, 2):
            opened.update(full_row(step))
    events = scalars(tmp_path / "tensorboard")
    guided = events.Scalars("reward_by_ratio/0.5")
    assert [event.step for event in guided] == [1, 2]
    assert [event.value for event in guided] == pytest.approx([0.9, 0.9])
    assert events.Scalars("eval/accuracy")[0].value == 0.25
    histogram = events.Histograms("expert_prob_histogram")[1].histogram_value
    assert histogram.num == sum(full_row(2)["expert_prob_histogram"])
    assert histogram.bucket_limit[0] == pytest.approx(0.05)


@needs_tensorboard
@needs_wandb
def test_a_killed_run_continues_the_same_tensorboard_and_wandb_run(tmp_path, tiny_model_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir, asked = tmp_path / "run", ("log.tensorboard=true", "log.wandb=true")
    run_killed(tiny_model_path, run_dir, "log:4", *asked, expect=-signal.SIGKILL)  # the last checkpoint has step 2
    run_killed(tiny_model_path, run_dir, "none", *asked)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    logged = scalars(run_dir / "tensorboard").Scalars("reward")
    assert [event.step for event in logged] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in logged] == pytest.approx([row["reward"] for row in rows])
    wandb_runs = [p.name.rsplit("-", 1)[1] for p in (run_dir / "wandb").glob("offline-run-*")]
    assert wandb_runs == [(run_dir / "wandb_id").read_text()] * 2
    assert "wandb" not in os.listdir(tmp_path)


@needs_wandb
def test_wandb_gets_the_rows_and_the_configuration(tmp_path, monkeypatch):
    """Read back from what an offline run leaves for `wandb sync`."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    config = merge_config({}, ["log.wandb=true", "optim.lr=0.25"])
    with Loggers(config.log, RunDir(tmp_path), 0, tree_of(config)) as opened:
        for step in (1, 2):
            opened.update(full_row(step))
    wandb.teardown()  # its service process holds the last records until it ends
    history, settings = [], {}
    for record in wandb_records(next((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))):
        history.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
        settings |= {update.key: json.loads(update.value_json) for update in record.run.config.update}
    rewards = [row["reward"] for row in history if "reward" in row]
    assert rewards == [full_row(1)["reward"], full_row(2)["reward"]]
    assert settings["optim"]["lr"] == 0.25
