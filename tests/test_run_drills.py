"""Whole runs that something happens to: interruptions at an evaluation, weights that are no numbers, files that changed
meanwhile, more steps than were asked for at first. Damage to files is in test_run_repair.py."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from killed_run import settings
from rank_processes import free_port
from rich.console import Console
from test_restarts import assert_same_outcome, flip, steps_kept
from transformers import PreTrainedTokenizerBase

from trapo import trainer
from trapo.config import merge_config, save_config
from trapo.errors import TrapoError
from trapo.evaluation import held_out
from trapo.learner import Learner
from trapo.models.finite import not_finite
from trapo.models.loading import load_model
from trapo.runs.manifest import find_damage
from trapo.runs.ranks import Ranks, lost_rank
from trapo.runs.run_dir import RunDir
from trapo.runs.stopping import Stopped, StopSignal
from trapo.trainer import make_learner

PROMPT = "data.system_prompt=Write ${x} #1: \\${y}"  # which has to survive config.yaml and the report
SHORT = ("train.steps=4", "eval.every=2", "train.updates_per_step=1", "train.prompts_per_step=1", PROMPT)
SMALL = ("rollout.max_response_tokens=20", "log.rollouts_every=1", "optim.schedule=constant", "checkpoint.keep=2")


class Killed(BaseException):
    """Stands for a SIGKILL: nothing is tidied up that is not tidied up by leaving."""


def train(model, run_dir, *overrides, report=False, **options):
    """What the run wrote to its console."""
    console, threads = Console(width=300, file=io.StringIO()), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        if not report:
            patch.setattr(trainer, "write_report", lambda *_: None)
        try:
            trainer.train(settings(model, run_dir, *SHORT, *SMALL, *overrides), console=console, **options)
        finally:
            torch.set_num_threads(threads)
    return console.file.getvalue()


@contextlib.contextmanager
def interrupted_evaluation(number, how):
    """The N-th evaluation is begun and not finished."""
    real, calls = held_out.evaluate, []

    def evaluate(*args, **kwargs):
        calls.append(None)
        if len(calls) == number:
            how()
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "evaluate", evaluate)
        yield


def kill():
    raise Killed


@pytest.fixture(scope="module")
def undisturbed(tiny_model_path, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run[b]"
    train(tiny_model_path, run_dir, report=True)
    return run_dir


def test_a_run_with_dollars_in_its_prompt_ends_with_its_report(undisturbed):
    assert "Write ${x} #1: \\${y}" in (undisturbed / "report.html").read_text()
    assert sorted(RunDir(undisturbed).evaluations()) == [0, 2, 4]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_evaluation_that_a_kill_fell_into_is_made_up(number, undisturbed, tiny_model_path, tmp_path):
    with interrupted_evaluation(number, kill), pytest.raises(Killed):
        train(tiny_model_path, tmp_path / "run")
    (tmp_path / "run" / "eval").mkdir(exist_ok=True)
    (tmp_path / "run" / "eval" / ".tmp-step-000002.json").write_text("half")
    train(tiny_model_path, tmp_path / "run")
    assert_same_outcome(tmp_path / "run", undisturbed)
    assert not list((tmp_path / "run").rglob(".tmp-*"))


@pytest.mark.parametrize("mode", ["sft_then_rl", pytest.param("grpo", marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_an_evaluation_that_a_signal_cut_short_is_made_up(number, mode, tiny_model_path, tmp_path):
    options = [f"mode={mode}", "checkpoint.every=0", "checkpoint.keep_best=1"]
    options += ["train.sft_steps=2"] if mode == "sft_then_rl" else []
    train(tiny_model_path, tmp_path / "whole", *options)
    said = f"stopped by {number.name} after step 2; the same command continues from there"
    with interrupted_evaluation(2, lambda: os.kill(os.getpid(), number)), pytest.raises(Stopped, match=said):
        train(tiny_model_path, tmp_path / "run", *options)
    assert steps_kept(tmp_path / "run") == [2]
    train(tiny_model_path, tmp_path / "run", *options)
    assert_same_outcome(tmp_path / "run", tmp_path / "whole")
    assert steps_kept(tmp_path / "run") == steps_kept(tmp_path / "whole")


def test_before_the_first_step_the_message_says_that_nothing_was_saved(tiny_model_path, tmp_path):
    said = r"by SIGINT after step 0; there is nothing to save yet, and .* starts at step 1"
    with (
        interrupted_evaluation(1, lambda: os.kill(os.getpid(), signal.SIGINT)),
        pytest.raises(Stopped, match=said),
    ):
        train(tiny_model_path, tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("finished", [True, False])
def test_a_lengthened_run_equals_the_one_that_was_long_from_the_start(finished, undisturbed, tiny_model_path, tmp_path):
    run_dir = tmp_path / "run"
    # The third evaluation is that after step 3, the shorter run's last.
    ends = contextlib.nullcontext() if finished else pytest.raises(Killed)
    with interrupted_evaluation(0 if finished else 3, kill), ends:
        train(tiny_model_path, run_dir, "train.steps=3")
    assert (run_dir / "summary.json").exists() == finished
    output = train(tiny_model_path, run_dir)
    assert "train.steps: 3 before, now 4; the run goes on" in output
    for name in ("step-000003.json", "step-000003.jsonl"):  # the shorter run ended with it
        (run_dir / "eval" / name).unlink(missing_ok=True)
    assert_same_outcome(run_dir, undisturbed)


def test_the_schedule_of_a_lengthened_run_is_the_longer_one_s(tiny_model_path):
    model, tokenizer = load_model(merge_config({}, [f"model.path={tiny_model_path}"]).model)
    short, long = (
        make_learner(
            merge_config({}, ["optim.schedule=cosine", "optim.lr=1", f"train.steps={steps}"]),
            model,
            pad_id=tokenizer.pad_token_id,
        )
        for steps in (4, 8)
    )
    for _ in range(3):
        short.optimizer.step(), short.schedule.step()
        long.optimizer.step(), long.schedule.step()
    expected = long.lr
    long.load_state_dict(short.state_dict())
    assert long.lr == expected != short.lr
    assert long.optimizer.param_groups[0]["lr"] == expected
    before = short.lr
    short.load_state_dict(short.state_dict())
    assert short.lr == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_end_the_run_and_are_not_saved(
    value, monkeypatch, undisturbed, tiny_model_path, tmp_path
):
    update, calls = Learner.update, []

    def spoil(self, *args, **kwargs):
        done = update(self, *args, **kwargs)
        calls.append(None)
        if len(calls) == 2:
            with torch.no_grad():
                next(p for n, p in self.model.named_parameters() if "layers.1" in n).view(-1)[3] = value
        return done

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "update", spoil)
        with pytest.raises(
            TrapoError, match=r"weights are not finite after step 2 \(the first: model\.layers\.1\."
        ) as e:
            train(tiny_model_path, tmp_path / "run", "checkpoint.every=1")
    assert "the checkpoint of step 1 is sound: the same command goes on from there" in str(e.value)
    assert steps_kept(tmp_path / "run") == [1]
    train(tiny_model_path, tmp_path / "run", "checkpoint.every=1")
    assert_same_outcome(tmp_path / "run", undisturbed)


def test_every_parameter_is_looked_at():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert not_finite(model) is None
    model[1].bias.data[1] = torch.inf
    model[1].bias.requires_grad_(False)
    assert not_finite(model) == "1.bias"
    assert not_finite(model, trained=True) is None


def test_a_run_whose_every_update_was_skipped_does_not_end_well(tiny_model_path, tmp_path):
    options = (
        "mode=grpo", "advantage.std=false", "reward.function=reward_fixtures:by_length", "data.eval=null",
        "objective.policy=reward_fixtures:too_large", "objective.clip_low=inf", "objective.clip_high=inf",
    )  # fmt: skip
    with pytest.raises(TrapoError, match="no update of the run had a finite loss and gradient"):
        train(tiny_model_path, tmp_path / "run", *options, "train.steps=1")
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_tokenizer_that_cannot_be_written_costs_a_checkpoint_and_not_the_run(
    monkeypatch, undisturbed, tiny_model_path, tmp_path
):
    save, calls = PreTrainedTokenizerBase.save_pretrained, []

    def full(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == 1:
            raise Exception("No space left on device (os error 28)")  # what tokenizers' Rust raises
        return save(self, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
    output = train(tiny_model_path, tmp_path / "run")
    told = [line for line in output.splitlines() if "no checkpoint after step 2" in line]
    assert len(told) == 1
    assert told[0].endswith("training goes on, last checkpoint: none yet")
    assert_same_outcome(tmp_path / "run", undisturbed)


def test_data_that_changed_meanwhile_stop_a_run_that_goes_on(tiny_model_path, tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"prompt": "2 + 2?", "answer": "4", "trace": "2 + 2 = 4\n#### 4"}) + "\n")
    options = [f"data.train={data}", "train.steps=3"]
    with interrupted_evaluation(2, kill), pytest.raises(Killed):
        train(tiny_model_path, tmp_path / "run", *options)
    data.write_text(data.read_text().replace("2 + 2", "1 + 3"))
    with pytest.raises(TrapoError, match=r"data\.train: the contents have changed since the run in .* began; put them"):
        train(tiny_model_path, tmp_path / "run", *options)
    output = train(tiny_model_path, tmp_path / "run", *options, accept_changed=True)
    assert "data.train: the contents have changed since the run began; it goes on with the new ones" in output


def test_the_final_model_is_checked_before_it_is_used(undisturbed, tmp_path):
    assert find_damage(undisturbed / "final") is None
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        shutil.rmtree(tmp_path / "final", ignore_errors=True)
        shutil.copytree(undisturbed / "final", tmp_path / "final")
        flip(tmp_path / "final" / name)
        with pytest.raises(TrapoError, match=f"model.path: .*final is damaged: {name} does not have its checksum"):
            load_model(merge_config({}, [f"model.path={tmp_path / 'final'}"]).model)


# ----------------------------------------------------------------------------------------------------- signals

SECOND = """
import os, signal, sys, time
from trapo.runs.stopping import StopSignal
with StopSignal():
    os.kill(os.getpid(), signal.SIGINT)
    print("one", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
    print("two", flush=True)
"""


def test_a_second_ctrl_c_ends_the_run_at_once():
    done = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "one\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_each_signal_waits_for_work_that_can_be_abandoned(number):
    previous = signal.signal(number, signal.SIG_DFL)  # under nohup a hangup is ignored
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), number)
            with pytest.raises(Stopped) as stopped, stop.abandonable():
                pass
    finally:
        signal.signal(number, previous)
    assert stopped.value.number == number
    assert stop.name == number.name


def test_a_hangup_that_is_ignored_stays_so():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            with stop.abandonable():
                pass
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


# ------------------------------------------------------------------------------------------------------- ranks


def test_an_error_that_says_that_another_rank_is_gone_is_told_from_others():
    gone = RuntimeError("[../gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:1\nmore")
    said = str(lost_rank(Ranks(0, 2), gone))
    assert said.startswith("rank 0 of 2: another rank is gone ([../gloo/pair.cc:534] Connection closed by peer")
    assert "\n" not in said
    assert lost_rank(Ranks(0, 2), RuntimeError("shape mismatch")) is None
    assert lost_rank(Ranks(), gone) is None


@pytest.mark.slow
def test_the_death_of_a_rank_is_one_line_on_the_others(tiny_model_path, tmp_path):
    save_config(settings(tiny_model_path, tmp_path / "run", "train.steps=200"), tmp_path / "c.yaml")
    port, running = free_port(), []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        environment |= {name: str(value) for name, value in place.items()}
        command = [sys.executable, "-m", "trapo.cli", "train", str(tmp_path / "c.yaml")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running.append(subprocess.Popen(command, env=environment, text=True, **pipes))
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        assert running[0].poll() is None, running[0].communicate()
        time.sleep(0.1)
    running[1].kill()
    _, errors = running[0].communicate(timeout=300)
    running[1].communicate()
    assert running[0].returncode == 2
    assert "Traceback" not in errors
    assert errors.count("trapo: rank 0 of 2: another rank is gone (") == 1
