"""The GPU's one command, exercised on a CPU: everybody is checked before anybody is timed, and nothing that fails is
the end of the rest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("bench.providers", reason="bench/ is not here")

from bench.gpu import __main__ as command
from bench.gpu import build, first_call, graphs, losses, page, picture, sanitizer, stages, suite
from bench.gpu.results import Results, slug
from bench.gpu.rows import Rows, read
from bench.providers import EVERYBODY, on

SHAPE = "128,16,300"


@pytest.fixture
def rows(tmp_path):
    return tmp_path / "rows.jsonl"


def losses_of(rows, *only):
    assert losses.main(["--device", "cpu", "--shape", SHAPE, "--rows", str(rows), "--worker", "--only", *only]) == 0
    return {(r["provider"], r["part"]): r for r in read(rows) if r["what"] == "loss"}


# Losses --------------------------------------------------------------------------------------------------------------


def test_every_part_is_checked_and_timed_and_written_down(rows):
    found = losses_of(rows, "trapo_kernels torch", "GEMMs", "eager")
    assert {part for _, part in found} == {losses.BOTH, losses.FORWARD}
    for who, row in found.items():
        assert row["ms"] > 0, who
        assert row["error"] < 1e-4, who


def only(monkeypatch, *providers):
    monkeypatch.setattr(losses, "on", lambda device: list(providers))


def eager():
    return next(p for p in EVERYBODY if p.name == "eager")


def test_a_provider_that_is_wrong_is_not_timed(rows, monkeypatch):
    only(monkeypatch, replace(eager(), name="wrong", run=lambda case: 2 * eager().run(case)))
    (row,) = losses_of(rows, "wrong").values()
    assert row["failed"].startswith("wrong: error")
    assert "ms" not in row


def test_a_nan_is_wrong(rows, monkeypatch):
    only(monkeypatch, replace(eager(), name="nan", run=lambda case: eager().run(case) * torch.nan))
    (row,) = losses_of(rows, "nan").values()
    assert row["failed"] == "wrong: error nan"


@pytest.mark.parametrize("error", [RuntimeError("no\nway"), AssertionError(), ImportError("gone"), KeyError("x")])
def test_an_exception_of_a_peer_is_a_row_and_the_next_one_runs(rows, monkeypatch, error):
    def raises(case):
        raise error

    only(monkeypatch, replace(eager(), name="peer", run=raises), eager())
    found = losses_of(rows, "peer", "eager")
    assert found["peer", losses.BOTH]["failed"].startswith(type(error).__name__)
    assert found["eager", losses.BOTH]["ms"] > 0


def test_who_is_not_installed_is_a_row_that_says_so(rows, monkeypatch):
    peer = next(p for p in EVERYBODY if p.package == "quack-kernels")
    if peer.absent() is None:
        pytest.skip("quack is installed")
    only(monkeypatch, peer)
    (row,) = losses_of(rows, "quack").values()
    assert row["left_out"] == "quack-kernels is not installed"


def test_a_crash_of_a_peer_is_a_row_and_the_others_go_on_in_a_new_process(rows, monkeypatch):
    runs = []

    def process(line, **_):
        runs.append(line)
        file = Rows(rows)
        known = {r["provider"] for r in read(rows) if r["what"] == "loss"}
        for name in ("first", "crashes", "last"):
            if name in known:
                continue
            who = {"shape": [128, 16, 300], "part": losses.BOTH, "provider": name, "gives": "nll"}
            file.add(what="begin", **who)
            if name == "crashes":
                return subprocess.CompletedProcess(line, -signal.SIGSEGV)
            file.add(what="loss", **who, ms=1.0)
        return subprocess.CompletedProcess(line, 0)

    monkeypatch.setattr(losses.subprocess, "run", process)
    assert losses.main(["--device", "cpu", "--shape", SHAPE, "--rows", str(rows)]) == 0
    found = {r["provider"]: r for r in read(rows) if r["what"] == "loss"}
    assert found["crashes"]["failed"] == "its process ended by SIGSEGV"
    assert found["last"]["ms"] == found["first"]["ms"] == 1.0
    assert len(runs) == 2
    assert "--worker" in runs[0]


def test_a_process_that_cannot_start_ends_the_stage(rows, monkeypatch):
    monkeypatch.setattr(losses.subprocess, "run", lambda line, **_: subprocess.CompletedProcess(line, 1))
    assert losses.main(["--device", "cpu", "--shape", SHAPE, "--rows", str(rows)]) == 1


def test_one_list_has_everybody_and_names_are_unique():
    names = [p.name for p in EVERYBODY]
    assert len(set(names)) == len(names)
    wanted = {"trl", "liger-kernel", "cut-cross-entropy", "verl", "quack-kernels"}
    assert wanted <= {p.package for p in on("cuda")}
    assert {"cuda", "triton", "torch"} <= {p.backend for p in on("cuda")}
    assert {p.name for p in on("cpu")} < set(names)


# Other stages --------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_replayed_is_compared_on_other_inputs(monkeypatch):
    error = graphs.compared("trapo", "torch", "cpu")["error"]
    assert error == 0.0

    def stale(step, device):  # a graph that does not see its new inputs
        outputs = step()
        return lambda: outputs

    monkeypatch.setattr(graphs, "captured", stale)
    assert graphs.compared("trapo", "torch", "cpu")["error"] > 0.1


def test_the_first_call_says_which_backend_it_got(rows):
    assert first_call.main(["--device", "cpu", "--rows", str(rows)]) == 0
    (row,) = read(rows)
    assert row["picked"] in ("cpu", "torch")
    assert row["then_us"] < 1e6 * max(row["first_s"], 1)


def test_the_sanitizers_count_is_read_from_its_summary():
    assert sanitizer.summary("========= ERROR SUMMARY: 0 errors") == 0
    assert sanitizer.summary("x\n========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)") == 3
    assert sanitizer.summary("Segmentation fault") is None


class _Report:
    nodeid, when, longreprtext = "tests/test_x.py::test_y[triton]", "call", "def f():\nE   AssertionError: off by 1\n"

    def __init__(self, outcome):
        self.outcome = outcome


def test_the_suite_leaves_a_row_for_each_failure_and_a_count(rows):
    reporter = suite._Reporter(rows)
    for outcome in ("passed", "failed", "passed"):
        reporter.pytest_runtest_logreport(_Report(outcome))
    reporter.pytest_sessionfinish()
    failed, counts = read(rows)
    assert failed == {"what": "failed", "test": _Report.nodeid, "why": "AssertionError: off by 1"}
    assert counts == {"what": "tests", "passed": 2, "failed": 1, "skipped": 0}


def test_nvcc_makes_code_for_the_card_alone():
    every = ["nvcc", "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a",
             "-gencode=arch=compute_90,code=compute_90", "-o", "x"]  # fmt: skip
    assert build.for_capability(every, (9, 0)) == ["nvcc", every[2], "-o", "x"]
    assert build.for_capability(every, (8, 0)) == ["nvcc", every[1], "-o", "x"]
    assert build.for_capability(every, (12, 0)) == ["nvcc", every[3], "-o", "x"]  # PTX, compiled at load


def test_the_command_that_compiles_comes_from_setup(monkeypatch):
    lines = []
    monkeypatch.setattr(build.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(build.subprocess, "run", lambda line, **_: lines.append(line))
    build.compile_here("out.so")
    (line,) = lines
    assert line[-1] == "out.so"
    assert [part for part in line if part.startswith("-gencode")] == ["-gencode=arch=compute_90a,code=sm_90a"]
    assert any(part.endswith("row_kernels.cu") for part in line)


def test_stages_that_measure_nothing_run_side_by_side_on_a_gpu_alone():
    on_gpu = [[s.name for s in group] for group in command.groups(stages.stages("cuda"), "cuda")]
    assert ["smoke", "suite", "sanitizer"] in on_gpu
    assert all(len(group) == 1 for group in on_gpu if group[0] not in ("smoke",))
    assert all(len(group) == 1 for group in command.groups(stages.stages("cpu"), "cpu"))
    assert [g for g in on_gpu if g[0].startswith("losses")] == [[f"losses {s}"] for s in stages.SHAPES["cuda"]]


# The command ---------------------------------------------------------------------------------------------------------

_SAYS = (
    "import sys, json; print('x'); open(sys.argv[1], 'a').write(json.dumps({'what': 'copy', 'tb_per_s': 1.5}) + '\\n')"
)
_FAKE = {
    "good": _SAYS,
    "bad": f"{_SAYS}; raise ValueError('no such thing')",
    "dies": f"{_SAYS}; import os; os.kill(os.getpid(), 11)",
    "torn": f"{_SAYS}; open(sys.argv[1], 'a').write('{{\"what\": \"co')",
    "slow": f"{_SAYS}; import time; time.sleep(60)",
}


@pytest.fixture
def faked(monkeypatch):
    """Stages that need no torch, of names in `_FAKE`."""

    def use(*names, limit=30.0):
        made = [stages.Stage(name, name, (limit, limit)) for name in names]
        monkeypatch.setattr(command, "stages", lambda device: made)
        monkeypatch.setattr(command, "command", lambda stage, device, rows: ["-c", _FAKE[stage.module], rows])

    return use


def run(folder, *more):
    status = command.main(["--device", "cpu", "--out", str(folder), *more])
    return status, json.loads((folder / "cpu.json").read_text())["stages"]


def test_what_fails_is_a_line_and_its_rows_are_kept(faked, tmp_path, capsys):
    faked("good", "bad", "dies", "torn")
    status, found = run(tmp_path)
    assert status == 1
    assert {name: stage["status"] for name, stage in found.items()} == {
        "good": "done", "bad": "failed", "dies": "failed", "torn": "done",
    }  # fmt: skip
    assert all(stage["rows"] == [{"what": "copy", "tb_per_s": 1.5}] for stage in found.values())
    assert found["bad"]["why"] == "ended with status 1: ValueError: no such thing"
    assert found["dies"]["why"].startswith("ended by SIGSEGV")
    printed = capsys.readouterr().out
    assert "ValueError: no such thing" in printed.rpartition("forward and both gradients")[2]
    assert {path.name for path in tmp_path.iterdir()} == {"cpu.json", "cpu.md", "cpu.logs.tgz"}  # no plot of nothing


def test_a_stage_past_its_limit_is_ended_and_the_next_one_runs(faked, tmp_path):
    faked("slow", "good", limit=2.0)
    start = time.monotonic()
    status, found = run(tmp_path)
    assert time.monotonic() - start < 30
    assert status == 1
    assert found["slow"]["status"] == "late"
    assert found["slow"]["why"].startswith("stopped after 2 s")
    assert found["slow"]["rows"]
    assert found["good"]["status"] == "done"


def test_when_the_time_is_over_the_rest_is_left_out(faked, tmp_path):
    faked("good")
    status, found = run(tmp_path, "--minutes", "0.1")
    assert status == 1
    assert found["good"] == {"status": "left out", "why": "the time is over", "rows": []}


def test_a_run_continues_only_if_asked(faked, tmp_path):
    faked("good", "bad")
    run(tmp_path)
    first = json.loads((tmp_path / "cpu.json").read_text())
    status, found = run(tmp_path, "--continue", "--only", "good")
    assert status == 0
    assert found == first["stages"]  # nothing was done again, and what failed is still there
    _, found = run(tmp_path, "--only", "good")
    assert set(found) == {"good"}


def test_a_run_that_is_terminated_leaves_what_it_found(tmp_path):
    script = f"""
import sys
from bench.gpu import __main__ as command, stages
command.stages = lambda device: [stages.Stage("slow", "slow", (60.0, 60.0)), stages.Stage("good", "good", (9.0, 9.0))]
command.command = lambda stage, device, rows: ["-c", {_FAKE["slow"]!r}, rows]
sys.exit(command.main(["--device", "cpu", "--out", {str(tmp_path)!r}]))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    path, until = tmp_path / "cpu.json", time.monotonic() + 120
    while not (path.exists() and json.loads(path.read_text())["stages"].get("slow", {}).get("rows")):
        assert time.monotonic() < until
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "interrupted: what was found is kept" in out
    stage = json.loads(path.read_text())["stages"]["slow"]
    assert stage["rows"] == [{"what": "copy", "tb_per_s": 1.5}]
    assert stage["status"] == "failed"
    assert "1.5 TB/s" in (tmp_path / "cpu.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "there is no CUDA device here"),
        (["--device", "cpu", "--minutes", "-1"], "--minutes must be above 0; got -1"),
        (["--device", "cpu", "--only", "loses"], "no stage begins with 'loses'; there are environment, build"),
    ],
)
def test_bad_options_are_refused(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


# The page ------------------------------------------------------------------------------------------------------------


def filled(tmp_path):
    results = Results(tmp_path / "x.json", "cuda", "NVIDIA H200", keep=False)
    shape = [8192, 3584, 152064]
    both = {"what": "loss", "shape": shape, "part": losses.BOTH, "gives": "entropy"}
    results.data["stages"]["losses"] = {
        "status": "done", "seconds": 3.0, "limit": 50.0,
        "rows": [
            {**both, "provider": page.FLOOR, "ms": 34.0, "error": 0.0},
            {**both, "provider": "trapo_kernels cuda", "ms": 40.8, "error": 1e-3, "peak_gib": 4.25},
            {**both, "provider": "peer", "failed": "RuntimeError: a | b"},
            {**both, "provider": "trapo_kernels cuda", "part": losses.FORWARD, "ms": 12.0},
        ],
    }  # fmt: skip
    return results


def test_the_page_and_the_table_show_times_ratios_memory_and_failures(tmp_path):
    results = filled(tmp_path)
    text = page.markdown(results)
    assert "| trapo_kernels cuda | entropy | 40.80 (1.20×), 4.2 GiB |" in text
    assert "| peer | entropy | RuntimeError: a / b |" in text
    assert "| trapo_kernels cuda | entropy | 12.00 |" in text
    table = page.summary(results)
    assert "NVIDIA H200" in table
    assert "40.80 (1.20×), 4.2 GiB" in table
    assert "peer" not in table
    assert picture.draw(results, tmp_path / "x.png") is None
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_a_devices_name_is_a_files_name():
    assert slug("NVIDIA H200") == "nvidia-h200"
    assert slug("NVIDIA GeForce RTX 4090 (Ada)") == "nvidia-geforce-rtx-4090-ada"
