import json

import pytest

from trapo.config import merge_config
from trapo.errors import TrapoError
from trapo.runs import checkpoint
from trapo.runs.run_dir import RunDir, read_rows
from trapo.settings.text import tree_of
from trapo.tools.files import append_line, write_atomic, write_folder_atomic, write_json


def settings(*of):
    return tree_of(merge_config(*of))


def open_run(run, config, **options):
    found = run.look(config, **options)
    run.claim(config, found)
    return found


def row(step):
    return {"step": step, "reward": 0.5}


def make_checkpoint(run, step, config=None):
    """A checkpoint after `step` of the claimed run; its record has no row after it."""

    def write(folder):
        (folder / "weights").write_text(f"of step {step}")

    rows = run.metrics.read_bytes() if run.metrics.exists() else b""
    lines = [line for line in rows.split(b"\n")[:-1] if json.loads(line)["step"] <= step]
    run.metrics.write_bytes(b"".join(line + b"\n" for line in lines))
    record = run.record(config or settings({}), step)
    run.metrics.write_bytes(rows)
    return checkpoint.save(run.checkpoints, step, write, {}, record=record).path


def evaluate(run, step, accuracy=0.5):
    """An evaluation of one problem after `step`."""
    path = run.evaluation(step)
    write_atomic(path.with_suffix(".jsonl"), '{"id": "a"}\n')
    write_json(path, {"accuracy": accuracy, "problems": 1, "samples": 1})


def test_metrics_after_the_checkpoint_are_dropped_and_a_cut_line_is_survived(tmp_path):
    run = RunDir(tmp_path / "run")
    assert open_run(run, settings({})) is None
    for step in (1, 2, 3):
        run.log(row(step))
    with open(run.metrics, "a") as file:
        file.write('{"step": 4, "rew')  # what a kill in the middle of a write leaves
    assert [r["step"] for r in read_rows(run.metrics)] == [1, 2, 3]
    make_checkpoint(run, 2)
    found = open_run(run, settings({}))
    assert found.step == 2
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2]


def test_an_unfinished_save_is_removed_and_not_taken_for_a_checkpoint(tmp_path):
    run = RunDir(tmp_path)
    open_run(run, settings({}))
    (run.checkpoints / ".tmp-step-000004").mkdir()
    assert open_run(run, settings({})) is None
    assert list(run.checkpoints.iterdir()) == []


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(TrapoError, match=r"holds thesis\.txt and no run"):
        open_run(RunDir(tmp_path), settings({}))


def test_a_finished_run_is_replaced_only_when_asked(tmp_path):
    run = RunDir(tmp_path / "run")
    open_run(run, settings({}))
    run.log(row(1))
    run.finish({"steps": 1})
    with pytest.raises(TrapoError, match="--if-finished restart"):
        open_run(run, settings({}))
    assert open_run(run, settings({}, ["seed=5"]), restart_finished=True) is None
    assert run.rows() == []


def test_settings_that_change_nothing_computed_may_differ_on_resume(tmp_path):
    run = RunDir(tmp_path)
    open_run(run, settings({}))
    run.log(row(1))
    open_run(run, settings({}, ["checkpoint.keep=3", "reward.workers=2"]))
    assert "keep: 3" in run.config.read_text()
    run.log(row(1))
    with pytest.raises(TrapoError, match=r"other settings \(optim\.lr, seed\)"):
        open_run(run, settings({}, ["seed=1", "optim.lr=1"]))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_atomic(path, "old")

    def fail(folder):
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert path.read_text() == "old"
    with pytest.raises(OSError, match="disk full"):
        write_folder_atomic(tmp_path / "folder", fail)
    assert not (tmp_path / "folder").exists()


def test_a_run_that_computed_nothing_yet_may_be_started_with_other_settings(tmp_path):
    run = RunDir(tmp_path / "run")
    open_run(run, settings({}, ["data.train=typo.jsonl"]))
    open_run(run, settings({}, ["data.train=right.jsonl"]))
    assert "right.jsonl" in run.config.read_text()


def test_looking_changes_nothing(tmp_path):
    run = RunDir(tmp_path / "run")
    run.look(settings({}))
    assert not run.path.exists()
    open_run(run, settings({}))
    run.finish({"steps": 1})
    before = sorted(tmp_path.rglob("*"))
    run.look(settings({}), restart_finished=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_restarting_never_deletes_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(TrapoError, match=r"holds summary\.json and no run"):
        RunDir(tmp_path).look(settings({}), restart_finished=True)


def test_a_folder_that_trapo_eval_wrote_to_can_hold_a_run(tmp_path):
    (tmp_path / "eval.json").write_text("{}")
    assert open_run(RunDir(tmp_path), settings({})) is None


def test_a_run_dir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrapoError, match="is a file; give a folder"):
        RunDir(tmp_path / "file").look(settings({}))


def test_evaluations_of_weights_that_will_be_computed_again_are_dropped(tmp_path):
    run = RunDir(tmp_path)
    open_run(run, settings({}))
    evaluate(run, 0)
    evaluate(run, 2)
    make_checkpoint(run, 2)
    evaluate(run, 4)
    open_run(run, settings({}))
    assert sorted(run.evaluations()) == [0, 2]
    assert len(list((tmp_path / "eval").iterdir())) == 4


def test_a_line_that_does_not_fit_on_the_disk_leaves_the_log_as_it_was(tmp_path, file_size_limit):
    path = tmp_path / "metrics.jsonl"
    append_line(path, "first")
    with file_size_limit(10), pytest.raises(OSError, match="File too large"):
        append_line(path, "second" * 10)
    append_line(path, "third")
    assert path.read_text().splitlines() == ["first", "third"]


def test_a_replaced_folder_survives_a_failed_replacement(tmp_path, file_size_limit):
    folder = tmp_path / "final"
    write_folder_atomic(folder, lambda path: (path / "weights").write_text("old"))
    with file_size_limit(10), pytest.raises(OSError, match="File too large"):
        write_folder_atomic(folder, lambda path: (path / "weights").write_text("new" * 10))
    assert (folder / "weights").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_the_best_evaluations_are_found_ties_going_to_the_later_step(tmp_path):
    run = RunDir(tmp_path)
    for step, accuracy in {0: 0.9, 2: 0.5, 4: 0.7, 6: 0.5}.items():
        write_json(run.evaluation(step), {"accuracy": accuracy})
    assert run.best_steps(3) == [4, 6, 2]  # step 0 is not trained
    assert run.best_steps(0) == []
