"""The file system of a run on two ranks is full, or a rank dies while a server gets weights: the ranks say so in a line
each, and the same command ends as if nothing had been."""

import json
import os
import signal
import subprocess

import pytest
from killed_run import settings
from rank_processes import start_ranks
from safetensors.torch import load_file
from test_resume import timeless

from trapo.config import save_config

SMALL = (
    "train.steps=2", "train.updates_per_step=1", "train.prompts_per_step=1", "eval.every=1", "data.eval_limit=2",
    "checkpoint.every=1", "rollout.max_response_tokens=8", "log.rollouts_every=1",
)  # fmt: skip
FULL = "No space left on device"
SERVER = ("rollout.engine=vllm_server", "rollout.server_url=http://stand-in", "rollout.guard_tokens=0")


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """A file system of its own, that can be full."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96M", "tmpfs", folder]
    done = subprocess.run(mount, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
    monkeypatch.setenv("BALLAST", str(folder / "ballast"))
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def command(what, run_dir, model, *overrides, name="train"):
    save_config(settings(model, run_dir, *SMALL, *overrides), run_dir.parent / "c.yaml")
    return start_ranks(2, "full", what, name, run_dir.parent / "c.yaml", *overrides)


def outcome(run_dir):
    rows = [timeless(json.loads(line)) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    names = ["rollouts.jsonl", "final/model.safetensors", *(f"eval/step-00000{i}.json" for i in (0, 1, 2))]
    return rows, {name: (run_dir / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def whole(tiny_model_path, tmp_path_factory):
    """(engine's overrides) -> what an undisturbed run leaves."""
    made = {}

    def make(overrides):
        if overrides not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("BALLAST", os.devnull)
                run_dir = tmp_path_factory.mktemp("whole") / "run"
                assert [rank.returncode for rank in command("", run_dir, tiny_model_path, *overrides)] == [0, 0]
            made[overrides] = outcome(run_dir)
        return made[overrides]

    return make


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("metrics", "metrics.jsonl could not be read or written: " + FULL),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("rollouts", "rollouts.jsonl could not be read or written: " + FULL),
                ("evaluation", "eval/step-000000.json could not be read or written: " + FULL),
                ("final", "run could not be written: "),
                ("weights", ".tmp-.tmp-server-weights-file could not be read or written: " + FULL),
            ]
        ),
    ],
)
def test_all_ranks_say_that_the_disk_is_full_and_go_on_once_it_is_not(what, said, whole, disk, tiny_model_path):
    overrides = SERVER if what == "weights" else ()
    for rank in command(what, disk / "run", tiny_model_path, *overrides):
        assert rank.returncode == 2, rank
        (line,) = (line for line in rank.stderr.splitlines() if line.startswith("trapo: "))
        assert said in line
        assert "Traceback" not in rank.stderr
    (disk / "ballast").unlink()
    again = command("", disk / "run", tiny_model_path, *overrides)
    assert [rank.returncode for rank in again] == [0, 0], again
    assert outcome(disk / "run") == whole(overrides)


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_stops_neither_rank(whole, disk, tiny_model_path):
    first, second = command("checkpoint", disk / "run", tiny_model_path)
    assert (first.returncode, second.returncode) == (0, 0), (first, second)
    assert " ".join(first.stdout.split()).count("training goes on, last checkpoint: none yet") == 2
    assert not list((disk / "run" / "checkpoints").iterdir())
    assert outcome(disk / "run") == whole(())


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["written:2", "told:2"])
def test_a_rank_that_dies_in_a_weight_sync_leaves_whole_weights_and_the_command_goes_on(
    dies, whole, disk, monkeypatch, tiny_model_path
):
    folder = disk / "run" / ".tmp-server-weights"
    with monkeypatch.context() as patch:
        patch.setenv("DIES", dies)
        first, second = command("", disk / "run", tiny_model_path, *SERVER)
    assert (first.returncode, second.returncode) == (-signal.SIGKILL, 2), (first, second)
    assert second.stderr.count("trapo: rank 1 of 2: another rank is gone (") == 1
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]  # what a server may be told to read
    found, initial = (load_file(f / "model.safetensors") for f in (folder, tiny_model_path))
    assert found.keys() == initial.keys()
    assert all(found[name].equal(value) for name, value in initial.items()) == (dies == "written:2")
    assert [p.name for p in disk.glob("run/.tmp-*-file")] == [".tmp-.tmp-server-weights-file"] * (dies == "written:2")
    again = command("", disk / "run", tiny_model_path, *SERVER)
    assert [rank.returncode for rank in again] == [0, 0], again
    assert not list(disk.glob("run/.tmp-*-file"))
    assert outcome(disk / "run") == whole(SERVER)


@pytest.mark.slow
def test_a_benchmark_whose_answers_do_not_fit_keeps_those_before_and_asks_the_rest(disk, tiny_model_path, tmp_path):
    rows = [{"prompt": f"What is {i} + {9 - i}?", "answer": "9"} for i in range(9)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = (
        f"eval.benchmarks=[{tmp_path / 'mine.jsonl'}@3]", "eval.temperature=0.6", "rollout.batch_size=3",
        "rollout.max_response_tokens=64", "data.eval_limit=9",
    )  # fmt: skip
    for rank in command("answers", disk / "run", tiny_model_path, *overrides, name="eval"):
        assert rank.returncode == 2, rank
        (line,) = rank.stderr.strip().splitlines()[-1:]
        assert line == f"trapo: {disk}/run/benchmarks/mine.answered.jsonl could not be read or written: {FULL}"
        assert "Traceback" not in rank.stderr
    kept = (disk / "run" / "benchmarks" / "mine.answered.jsonl").read_text().splitlines()
    assert 1 < len(kept) < 10
    (disk / "ballast").unlink()
    again = command("", disk / "run", tiny_model_path, *overrides, name="eval")
    assert [rank.returncode for rank in again] == [0, 0], again
    assert f"9 problems, {len(kept) - 1} answered earlier, 3 samples each" in again[0].stdout
    command("", tmp_path / "whole", tiny_model_path, *overrides, name="eval")
    for name in ("benchmarks.json", "benchmarks/mine.json", "benchmarks/mine.jsonl"):
        assert (disk / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
