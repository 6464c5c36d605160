"""What a run's folder does where other processes hold it, and where it cannot be written."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_run_dir import make_checkpoint
from test_run_repair import CONFIG, made, run  # noqa: F401

from trapo.errors import TrapoError
from trapo.runs import checkpoint
from trapo.runs.inputs import Inputs
from trapo.runs.run_dir import RunDir, refuse_unwritable
from trapo.runs.run_lock import RunLock, refuse_busy
from trapo.tools.files import append_line, remove, write_atomic, write_folder_atomic

HOLD = "import sys, time; from pathlib import Path; from trapo.runs.run_lock import RunLock\n"
HOLD += "with RunLock(Path(sys.argv[1]), print):\n    print('held', flush=True)\n    time.sleep(100)\n"


def test_a_second_process_is_refused_until_the_first_is_gone_however_it_ends(run):  # noqa: F811
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    for refused in (lambda: run.look(CONFIG), lambda: RunLock(run.path, print).__enter__()):
        with pytest.raises(TrapoError, match=f"is in use by process {process.pid} on ") as error:
            refused()
        assert "\n" not in str(error.value)
    process.kill()
    process.wait()
    run.look(CONFIG)
    with RunLock(run.path, print):
        pass


def test_a_forked_child_does_not_keep_the_lock(run):  # noqa: F811
    lock = RunLock(run.path, print)
    with lock:
        child = os.fork()
        if child == 0:
            time.sleep(100)
            os._exit(0)
    try:
        deadline = time.monotonic() + 60  # the child closes it when it first runs
        while True:
            try:
                refuse_busy(run.path)
                break
            except TrapoError:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_file_system_without_locks_is_reported_and_used(run, monkeypatch):  # noqa: F811
    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    said = []
    refuse_busy(run.path)
    with RunLock(run.path, said.append):
        pass
    assert "cannot be locked (Operation not supported): keep other runs out of it" in said[0]


def test_what_another_process_did_between_looking_and_starting_is_seen(run):  # noqa: F811
    found = run.look(CONFIG)
    make = RunDir(run.path)
    make.inputs = Inputs.load(run.inputs_file)
    make_checkpoint(make, 5)
    with pytest.raises(TrapoError, match="was changed by another process meanwhile"):
        run.claim(CONFIG, found)


# ------------------------------------------------------------------------------------------------------ disks


@pytest.fixture
def read_only(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk], capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_done(read_only, tmp_path):
    (tmp_path / "file").write_text("")
    for path, reason in [
        (read_only, "Read-only file system"),
        (read_only / "a" / "b", "Read-only file system"),
        (tmp_path / "file" / "run", "Not a directory"),
        (Path("/proc/run"), "No such file or directory"),
    ]:
        with pytest.raises(TrapoError, match=f"run_dir: {path} cannot be written: {reason}"):
            refuse_unwritable(path)


def test_looking_whether_a_folder_can_be_written_leaves_nothing(tmp_path):
    refuse_unwritable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_through_a_link_that_lies_in_the_way(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".tmp-a.json").symlink_to(victim)
    write_atomic(tmp_path / "a.json", "new")
    assert (victim.read_text(), (tmp_path / "a.json").read_text()) == ("mine", "new")
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / ".tmp-b").symlink_to(folder)
    write_folder_atomic(tmp_path / "b", lambda path: (path / "x").write_text(""))
    assert not list(folder.iterdir())
    remove(tmp_path / "none")


def test_long_names_can_be_written(tmp_path):
    write_atomic(tmp_path / ("x" * 255), "x")
    append_line(tmp_path / ("x" * 255), "y")
    write_folder_atomic(tmp_path / ("y" * 255), lambda path: (path / "x").write_text(""))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "error", [Exception("No space left on device (os error 28)"), OSError(5, "Input/output error")]
)
def test_whatever_a_library_raises_when_it_cannot_write_is_a_failed_save(error, run):  # noqa: F811
    def write(_):
        raise error

    with pytest.raises(checkpoint.SaveError, match="could not be written: "):
        checkpoint.save(run.checkpoints, 5, write, {})
    assert [c.step for c in checkpoint.find(run.checkpoints)] == [2, 4]

    def wrong(_):
        raise TypeError("a mistake of ours")

    with pytest.raises(TypeError):
        checkpoint.save(run.checkpoints, 5, wrong, {})
