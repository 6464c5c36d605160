"""What happens to a run's folder between two commands: damage, strangers, other processes. No model is trained here."""

import json
import shutil
from pathlib import Path

import pytest
from test_run_dir import evaluate, make_checkpoint, open_run, row, settings

from trapo.config import merge_config
from trapo.errors import TrapoError
from trapo.runs.inputs import Inputs, fingerprints, refuse_changed
from trapo.runs.manifest import find_damage, refuse_damaged, write_manifest
from trapo.runs.run_dir import RunDir, append_rows

CONFIG = settings({})


def a_run(path, config=CONFIG):
    """A run of 5 steps with checkpoints after 2 and 4, evaluations after 0, 2 and 4 and a sample of each step."""
    run = RunDir(path)
    open_run(run, config)
    evaluate(run, 0)
    for step in (1, 2, 3, 4, 5):
        append_rows(run.rollouts, [row(step) | {"own": "x\u2028y"}])
        run.log(row(step))
        if step in (2, 4):
            make_checkpoint(run, step, config)
            evaluate(run, step, accuracy=step / 10)
    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return a_run(tmp_path_factory.mktemp("made") / "run").path


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made, tmp_path / "run")
    return RunDir(tmp_path / "run")


def contents(path):
    """Everything in the folder that is the run's, by name."""
    return {
        p.relative_to(path).as_posix(): p.read_bytes()
        for p in path.rglob("*")
        if p.is_file() and not p.name.startswith(".")
    }


def resume(run, config=CONFIG, **options):
    """What was logged while the run was made ready to go on, and after which step."""
    said = []
    found = run.look(config, log=said.append, **options)
    run.claim(config, found, log=said.append)
    return said, found.step if found else None


@pytest.fixture(scope="module")
def sound(made, tmp_path_factory):
    """What a run that goes on finds when nothing was damaged."""
    path = tmp_path_factory.mktemp("sound") / "run"
    shutil.copytree(made, path)
    assert resume(RunDir(path)) == ([], 4)
    return contents(path)


def lines(path):
    return path.read_bytes().splitlines(keepends=True)


def without(number):
    return lambda path: path.write_bytes(b"".join(line for i, line in enumerate(lines(path), 1) if i != number))


def doubled(path):
    path.write_bytes(b"".join([*lines(path)[:2], *lines(path)[1:]]))


def with_line(line):
    return lambda path: path.write_bytes(b"".join([*lines(path)[:2], line, *lines(path)[2:]]))


DAMAGE = {
    "a row is gone": without(2),
    "the first row is gone": without(1),
    "deleted": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "a row is there twice": doubled,
    "garbage": with_line(b"garbage\n"),
    "a blank line": with_line(b"\n"),
    "NUL": with_line(b"\0\0\0\n"),
    "not UTF-8": with_line(b'{"step": 2, "x": "\xff"}\n'),
    "a row of no step": with_line(b'{"x": 1}\n'),
    "a list": with_line(b"[1]\n"),
    "deep nesting": with_line(b"[" * 100_000 + b"\n"),
    "other order": lambda path: path.write_bytes(b"".join(reversed(lines(path)))),
    "another value": lambda path: path.write_bytes(path.read_bytes().replace(b"0.5", b"0.7", 1)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_metrics_come_back_from_the_checkpoint_and_it_is_said(damage, run, sound):
    damage(run.metrics)
    said, step = resume(run)
    assert step == 4
    assert contents(run.path) == sound
    assert len(said) == 1
    assert "metrics.jsonl did not hold each step up to 4 once" in said[0]


@pytest.mark.parametrize("tail", [b'{"step": 6, "rew', '{"step": 6, "x": "ü'.encode()[:-1], b"\0\0\0"])
def test_a_last_line_that_a_kill_cut_short_is_no_damage(tail, run, sound):
    for log in (run.metrics, run.rollouts):
        with open(log, "ab") as file:
            file.write(tail)
    assert resume(run) == ([], 4)
    assert contents(run.path) == sound


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_samples_are_kept_as_far_as_they_can_be_read_and_it_is_said(damage, run, sound):
    damage(run.rollouts)
    said, step = resume(run)
    assert step == 4
    assert len(said) == 1
    assert "rollouts.jsonl is damaged;" in said[0]
    steps = [r["step"] for r in map(json.loads, lines(run.rollouts))] if run.rollouts.exists() else []
    assert len(set(steps)) == len(steps)
    assert set(steps) <= {1, 2, 3, 4}
    assert {k: v for k, v in contents(run.path).items() if k != "rollouts.jsonl"} == {
        k: v for k, v in sound.items() if k != "rollouts.jsonl"
    }


@pytest.mark.parametrize("damage", [Path.unlink, lambda p: p.write_bytes(b"{"), lambda p: p.write_bytes(b"[\xff")])
def test_a_damaged_evaluation_comes_back_or_is_made_again(damage, run, sound):
    damage(run.evaluation(2))
    said, _ = resume(run)
    assert len(said) == 1
    assert "step-000002.json was " in said[0]
    assert contents(run.path) == sound
    damage(run.evaluation(4))
    said, _ = resume(run)
    assert sorted(run.evaluations()) == [0, 2]  # the trainer makes that after step 4 when it goes on


def test_answers_of_an_evaluation_that_are_lost_are_reported(run):
    run.evaluation(2).with_suffix(".jsonl").write_text("")
    run.evaluation(4).with_suffix(".jsonl").write_text("garbage\n")
    said, _ = resume(run)
    assert len(said) == 2
    assert "step-000002.jsonl does not hold the answers" in said[0]
    assert "step-000004.json is damaged; the evaluation is made again" in said[1]
    assert sorted(run.evaluations()) == [0, 2]


def test_what_is_no_run_s_is_left_alone(run, sound):
    strangers = [run.path / "eval" / "step-best.json", run.checkpoints / "step-000009", run.path / "notes.txt"]
    for path in strangers:
        path.write_text("mine")
    (run.checkpoints / ".tmp-x").write_text("half")
    (run.path / "eval" / ".tmp-step-000002.json").write_text("half")
    (run.path / ".tmp-final").mkdir()
    assert resume(run) == ([], 4)
    assert all(path.read_text() == "mine" for path in strangers)
    assert not list(run.path.rglob(".tmp-*"))


# ------------------------------------------------------------------------------------------------ checkpoints


def test_every_flip_of_a_bit_of_a_manifest_is_seen(run):
    manifest = run.checkpoints / "step-000004" / "manifest.json"
    good = manifest.read_bytes()
    for place in range(len(good) * 8):
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        manifest.write_bytes(bad)
        assert find_damage(manifest.parent) is not None, bytes(bad)
    said, step = resume(run)
    assert (step, len(said)) == (2, 1)


@pytest.mark.parametrize(
    "text", ["[]", "{}", "null", '{"files": []}', '{"files": {"weights": 1}}', '{"files": {"../x": {}}}', "[" * 99999]
)
def test_a_manifest_of_another_shape_is_damage(text, run):
    (run.checkpoints / "step-000004" / "manifest.json").write_text(text)
    said, step = resume(run)
    assert step == 2
    assert "manifest.json is not readable" in said[0]


def test_a_checkpoint_of_another_run_is_not_continued_and_not_deleted(run, tmp_path):
    other = a_run(tmp_path / "other")
    shutil.rmtree(run.checkpoints / "step-000004")
    shutil.copytree(other.checkpoints / "step-000004", run.checkpoints / "step-000004")
    said, step = resume(run)
    assert step == 2
    assert "step-000004 is not of this run (but of run " in said[0]
    assert find_damage(run.checkpoints / "not-used-step-000004") is None


@pytest.mark.parametrize(("new", "names"), [(2, "it was saved after step 4"), (99, "it was saved after step 4")])
def test_a_renamed_checkpoint_is_not_used(new, names, run):
    shutil.rmtree(run.checkpoints / "step-000002")
    (run.checkpoints / "step-000004").rename(run.checkpoints / f"step-{new:06d}")
    with pytest.raises(TrapoError, match=r"every checkpoint in .* is damaged or of another run"):
        resume(run)


def test_a_file_that_was_dropped_into_a_checkpoint_is_seen(run):
    (run.checkpoints / "step-000004" / "adapter_config.json").write_text("{}")
    said, step = resume(run)
    assert step == 2
    assert "adapter_config.json was not saved with it" in said[0]
    for harmless in (".DS_Store", "README.md"):
        (run.checkpoints / "step-000002" / harmless).write_text("")
    assert resume(run)[1] == 2


def test_a_checkpoint_of_other_settings_is_not_used_even_where_config_yaml_agrees(run):
    other = settings({}, ["optim.lr=0.5"])
    text = run.config.read_text().replace("lr: 1.0e-06", "lr: 0.5")
    run.config.write_text(text)
    with pytest.raises(TrapoError, match="every checkpoint"):
        resume(run, other)


def test_a_damaged_configuration_is_written_anew_when_the_checkpoint_is_of_the_same(run, sound):
    run.config.write_bytes(b"mode: [\xff")
    said, step = resume(run)
    assert step == 4
    assert "config.yaml is damaged" in said[0]
    assert contents(run.path) == sound


@pytest.mark.parametrize("damage", [Path.unlink, lambda p: p.write_text(p.read_text().replace("0", "1", 1) + " ")])
def test_the_id_of_a_run_comes_back_from_its_checkpoint(damage, run, sound):
    before = Inputs.load(run.inputs_file)
    damage(run.inputs_file)
    said, step = resume(run)
    assert step == 4
    assert Inputs.load(run.inputs_file) == before
    assert len(said) == 1 or before == Inputs.load(run.inputs_file)


def test_a_final_model_is_checked_and_may_be_changed_on_purpose(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    refuse_damaged(tmp_path)  # of others: no manifest
    write_manifest(tmp_path)
    refuse_damaged(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"wEights")
    with pytest.raises(TrapoError, match=r"model\.path: .* is damaged: model\.safetensors does not have its checksum"):
        refuse_damaged(tmp_path)
    (tmp_path / "manifest.json").unlink()
    refuse_damaged(tmp_path)


# ---------------------------------------------------------------------------------------- restarts and lengths


def finish(run, steps=100):
    run.finish({"steps": steps})


def test_a_restart_through_a_link_empties_the_folder_and_keeps_link_and_strangers(run, tmp_path):
    finish(run)
    (run.path / "precious").write_text("x")
    link = tmp_path / "link"
    link.symlink_to(run.path)
    said, _ = resume(RunDir(link), restart_finished=True)
    assert link.is_symlink()
    assert sorted(p.name for p in run.path.iterdir()) == ["checkpoints", "config.yaml", "inputs.json", "precious"]
    assert "also holds precious" in said[0]


def test_a_restart_does_not_follow_links_out_of_the_folder(run, tmp_path):
    finish(run)
    (run.checkpoints).rename(tmp_path / "elsewhere")
    run.checkpoints.symlink_to(tmp_path / "elsewhere")
    resume(run, restart_finished=True)
    assert (tmp_path / "elsewhere" / "step-000004").exists()


def test_a_restart_in_the_current_folder(run, monkeypatch):
    finish(run)
    monkeypatch.chdir(run.path)
    resume(RunDir(Path(".")), restart_finished=True)
    assert not list(Path("checkpoints").iterdir())


def test_a_folder_with_the_longest_name_can_be_restarted(tmp_path):
    run = a_run(tmp_path / ("n" * 255))
    finish(run)
    resume(run, restart_finished=True)
    assert run.rows() == []
    with pytest.raises(TrapoError, match="cannot be written: File name too long"):
        RunDir(tmp_path / ("n" * 256)).look(CONFIG)


def test_a_restart_that_is_killed_leaves_a_run_that_can_be_restarted(run, monkeypatch):
    finish(run)
    rename, calls = Path.rename, []

    def deadly(self, target):
        calls.append(self)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", deadly)
        with pytest.raises(KeyboardInterrupt):
            resume(run, restart_finished=True)
    again = RunDir(run.path)
    with pytest.raises(TrapoError, match="holds a finished run"):
        again.look(CONFIG)
    assert resume(RunDir(run.path), restart_finished=True)[1] is None
    assert not list(run.path.glob(".tmp-*"))


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_can_be_lengthened_and_not_shortened(finished, tmp_path):
    config = settings({}, ["train.steps=5"])
    run = a_run(tmp_path / "run", config)
    if finished:
        finish(run, 5)
        with pytest.raises(TrapoError, match=r"holds a finished run; .* more train\.steps"):
            run.look(config)
    with pytest.raises(TrapoError, match=r"train\.steps: got 3; .* holds a run of 5 steps, which can be lengthened"):
        run.look(settings({}, ["train.steps=3"]))
    with pytest.raises(TrapoError, match=r"other settings \(seed\)"):
        run.look(settings({}, ["train.steps=9", "seed=3"]))
    said, step = resume(run, settings({}, ["train.steps=9"]))
    assert step == 4
    assert said == ["train.steps: 5 before, now 9; the run goes on"]
    assert not run.summary.exists()
    said, _ = resume(run, settings({}, ["train.steps=9"]))
    assert said == []


def test_what_becomes_of_the_learning_rate_of_a_lengthened_run_is_said(tmp_path):
    run = a_run(tmp_path / "run", settings({}, ["train.steps=5", "optim.schedule=cosine"]))
    said, _ = resume(run, settings({}, ["train.steps=9", "optim.schedule=cosine"]))
    assert "optim.schedule=cosine is from now on that of 9 steps: the learning rate may jump" in said[0]


def test_a_finished_run_without_checkpoints_cannot_be_lengthened(run):
    shutil.rmtree(run.checkpoints)
    finish(run)
    with pytest.raises(TrapoError, match="holds a finished run without checkpoints, which cannot go on to"):
        run.look(settings({}, ["train.steps=200"]))


def test_another_number_of_threads_is_allowed_and_said(run):
    said, step = resume(run, settings({}, ["train.threads=3"]))
    assert step == 4
    assert said[0].startswith("train.threads: None before, now 3;")
    assert "last bits may differ" in said[0]


def test_a_run_without_a_checkpoint_says_that_it_starts_anew(tmp_path):
    run = RunDir(tmp_path / "run")
    open_run(run, CONFIG)
    run.log(row(1))
    said, step = resume(run)
    assert step is None
    assert said == [f"{run.path} holds no checkpoint: its 1 steps are computed again"]


# ----------------------------------------------------------------------------------------------------- inputs


def test_data_and_reward_code_that_changed_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "eval.jsonl", "prior.txt", "my_reward_of_this_test.py"):
        Path(name).write_text("old")
    Path("model").mkdir()
    Path("model/model.safetensors").write_text("old")
    overrides = ["data.train=train.jsonl", "data.eval=eval.jsonl", "reward.function=my_reward_of_this_test:f"]
    config = merge_config({}, [*overrides, "model.path=model"])
    code = {"reward.function": config.reward.function}

    def now():
        return fingerprints(config.data, code, config.model.path, prior="prior.txt")

    before = now()
    assert sorted(before) == ["data.eval", "data.train", "eval.prior", "model.path", "reward.function"]
    refuse_changed(before, now(), tmp_path)
    for key, name in [
        ("data.eval", "eval.jsonl"),
        ("eval.prior", "prior.txt"),
        ("reward.function", "my_reward_of_this_test.py"),
        ("model.path", "model/model.safetensors"),
    ]:
        Path(name).write_text("new")
        with pytest.raises(TrapoError, match=f"{key}: the contents have changed .* --if-changed continue") as error:
            refuse_changed(before, now(), tmp_path)
        assert "\n" not in str(error.value)
        Path(name).write_text("old")
    generated = merge_config({}, ["data.train=task://word_problems?n=1"])
    assert fingerprints(generated.data, {"reward.function": "math"}) == {}
