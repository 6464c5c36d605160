"""Which backends `backend=None` trusts: verdicts made in child processes, kept on disk, and read by picks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
import verify_plants
from kernel_cases import BACKENDS, slow

import trapo_kernels as tk
from trapo_kernels.backends import dispatch
from trapo_kernels.verify import cases, keep, trial

# The package hides its module behind the function.
verify = sys.modules["trapo_kernels.verify"]
CPU = torch.device("cpu")
FEW = ("loss bfloat16 7x257 trapo", "loss float32 3x2 everything")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A folder of its own, nothing known, and children that have the planted backends."""
    for name in ("TRAPO_KERNELS_BACKEND", "TRAPO_KERNELS_VERIFY", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(verify, "_known", {})
    monkeypatch.setattr(verify, "_said", set())
    monkeypatch.setattr(trial, "PRELOAD", ("verify_plants:register",))
    return tmp_path / "trapo_kernels"


@pytest.fixture
def offered(monkeypatch):
    """Sets which planted backends there are, before `torch`."""

    def offer(*names):
        planted = [verify_plants.planted(name) for name in names]
        monkeypatch.setattr(dispatch, "_BACKENDS", [*planted, tk.backends()["torch"], tk.backends()["reference"]])

    return offer


@pytest.fixture
def trials(monkeypatch):
    """Counts trials, and answers them at once: `right` says what of."""
    made = []

    def run(names, device, limit, enough, cases=None):
        made.append(tuple(names))
        time.sleep(0.2)
        return {n: keep.Verdict(n, *trials.right.get(n, (True, None)), 9, 0.1) for n in names}

    trials = type("Trials", (), {"made": made, "right": {}})
    monkeypatch.setattr(trial, "run", run)
    return trials


# The trial -----------------------------------------------------------------------------------------------------------


def test_each_planted_bug_is_a_verdict_and_not_the_end_of_this_process():
    names = ["sound", "wrong", "nan", "raises", "dies", "is-killed", "needs-memory"]
    found = trial.run(names, CPU, 240.0, 2, FEW)
    assert {name: found[name].right for name in names} == {
        "sound": True, "wrong": False, "nan": False, "raises": False, "dies": False, "is-killed": None,
        "needs-memory": None,
    }  # fmt: skip
    assert found["sound"].cases == 2
    reasons = {name: v.reason for name, v in found.items()}
    assert reasons["wrong"].startswith("case loss ")
    assert ": d_" in reasons["wrong"]
    assert " is off by 0.0" in reasons["wrong"]
    assert "is off by nan" in reasons["nan"]
    assert reasons["raises"].endswith("RuntimeError: CUDA error: an illegal memory access was encountered")
    assert reasons["dies"] == f"case {FEW[0]}: its process ended by SIGSEGV"
    assert reasons["is-killed"] == f"case {FEW[0]}: its process was ended by SIGKILL"
    assert reasons["needs-memory"].endswith("OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")
    assert not any("\n" in reason for reason in reasons.values() if reason)

    limit = 6.0 + 2 * found["sound"].seconds
    start = time.monotonic()
    hangs = trial.run(["hangs"], CPU, limit, 2, FEW)["hangs"]
    assert time.monotonic() - start < limit + 5
    assert hangs.right is False
    assert hangs.reason == f"case {FEW[0]}: no answer, its process was killed after {limit:g} s"


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b in ("triton", "cuda-on-cpu", "cpu")])
def test_the_compiled_backends_prove_themselves_on_cases_of_each_kind(backend):
    largest = 300 if slow(backend) else 5_000
    faults = {c.name: cases.fault(c, backend, CPU) for c in cases.CASES if c.vocab <= largest and c.rows < 100}
    assert {name: fault for name, fault in faults.items() if fault} == {}
    assert len(faults) >= 10


def test_the_cases_are_named_once_and_the_first_of_them_are_of_every_kind():
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)
    first = cases.CASES[: cases.ENOUGH]  # what is tried in any case
    assert {case.call for case in first} == {"loss", "logprobs", "logits"}
    assert {case.dtype for case in first} == {"bfloat16", "float16", "float32"}
    assert {case.layout for case in first} == {"contiguous", "strided"}
    assert min(case.vocab for case in first) == 1
    assert max(case.nats for case in first) == 30
    assert max(case.vocab for case in first) > 150_000
    assert {case.rows for case in cases.CASES} >= {1}


def _said(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line]


def test_a_child_that_sees_another_machine_says_so(capsys):
    expected = {**keep.machine(CPU), "device": "NVIDIA H200 (9.0)"}
    trial.child("sound", "cpu", time.time() + 60, expected, FEW, [])
    (line,) = _said(capsys)
    assert line["trapo_kernels"] == "unable"
    assert line["reason"].startswith("its process sees device 'cpu ")
    assert line["reason"].endswith("not 'NVIDIA H200 (9.0)'")


def test_a_child_that_cannot_use_the_device_is_no_verdict_on_the_backend(capsys):
    trial.child("sound", "cuda:99", time.time() + 60, {}, FEW, [])
    (line,) = _said(capsys)
    assert line["trapo_kernels"] == "unable"
    assert line["reason"].startswith("its process cannot use cuda:99: ")


def test_a_child_begins_no_case_when_its_time_is_over(capsys):
    trial.child("torch", "cpu", time.time() - 1, keep.machine(CPU), FEW, [])
    assert [line["trapo_kernels"] for line in _said(capsys)] == ["ready", "end"]


def test_a_program_that_embeds_python_starts_one_that_it_finds_or_none(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/usr/bin/blender")
    assert os.path.basename(trial.interpreter()).startswith("python")
    monkeypatch.setattr(sys, "exec_prefix", "/nowhere")
    monkeypatch.setattr(sys, "_base_executable", "", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert trial.interpreter() is None
    verdict = trial.run(["sound"], CPU, 20.0, 2)["sound"]
    assert verdict.right is None
    assert "no Python interpreter" in verdict.reason


def test_too_little_time_is_no_proof():
    verdict = trial.run(["sound"], CPU, 1e-3, 2, FEW)["sound"]
    assert verdict.right is None
    assert verdict.reason == "its process did not start within 0.001 s"


# The pick ------------------------------------------------------------------------------------------------------------


def test_a_pick_makes_the_verdict_once_and_says_so_once(offered, trials, capsys, cache):
    offered("sound", "wrong")
    trials.right = {"wrong": (False, "case x: off")}
    assert dispatch.pick(None, "f", CPU).name == "sound"
    assert dispatch.pick(None, "f", CPU).name == "sound"
    assert trials.made == [("sound", "wrong")]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("trapo_kernels: trying sound, wrong on cpu ")
    assert "once on this machine (at most 20 s; TRAPO_KERNELS_VERIFY=0 does without)" in line
    verify._known.clear()  # as another process
    assert dispatch.pick(None, "f", CPU).name == "sound"
    assert len(trials.made) == 1
    assert capsys.readouterr().err == ""
    assert len(list(cache.glob("verify-*.json"))) == 1


def test_a_known_pick_takes_microseconds(offered, trials):
    offered("sound")
    dispatch.pick(None, "f", CPU)
    start = time.perf_counter()
    for _ in range(1000):
        dispatch.pick(None, "f", CPU)
    assert time.perf_counter() - start < 0.2  # 200 microseconds each, on the slowest machine


def test_what_fails_is_left_out_with_its_reason_and_the_next_is_picked(offered, trials, capsys):
    offered("wrong", "hangs", "sound")
    trials.right = {"wrong": (False, "case x: off"), "hangs": (None, "no answer")}
    assert dispatch.pick(None, "f", CPU).name == "sound"
    assert dispatch.pick(None, "f", CPU).name == "sound"
    errors = capsys.readouterr().err
    assert errors.count("backend 'wrong' is left out") == 1
    assert errors.count("backend 'hangs' is left out") == 1
    assert str(tk.backends()["wrong"]) == "wrong: planted; not picked unasked: case x: off"
    assert tk.backends()["wrong"].left_out == "case x: off"
    assert tk.backends()["sound"].left_out is None
    assert str(tk.backends()["sound"]) == "sound: planted"
    assert dispatch.pick("wrong", "f", CPU).name == "wrong"  # who asks for it gets it


def test_without_any_that_is_right_torch_is_picked(offered, trials):
    offered("wrong")
    trials.right = {"wrong": (False, "case x: off")}
    assert tk.default_backend("cpu") == "torch"


def test_verification_can_be_turned_off(offered, trials, monkeypatch, cache):
    offered("sound")
    monkeypatch.setenv("TRAPO_KERNELS_VERIFY", "0")
    assert dispatch.pick(None, "f", CPU).name == "torch"
    assert trials.made == []
    assert not cache.exists()


def test_another_value_of_the_variable_is_refused(offered, trials, monkeypatch):
    offered("sound")
    monkeypatch.setenv("TRAPO_KERNELS_VERIFY", "off")
    with pytest.raises(ValueError, match=r"^TRAPO_KERNELS_VERIFY must be 0 .* or 1; got 'off'$"):
        dispatch.pick(None, "f", CPU)


def test_turned_off_what_is_known_is_not_used_either(offered, trials, monkeypatch):
    offered("sound")
    assert dispatch.pick(None, "f", CPU).name == "sound"
    monkeypatch.setenv("TRAPO_KERNELS_VERIFY", "0")
    assert dispatch.pick(None, "f", CPU).name == "torch"


def test_nothing_is_tried_while_a_graph_is_traced_or_captured(offered, trials, monkeypatch, capsys):
    offered("sound")
    assert dispatch.backend_name(None, "f", CPU) == "torch"
    assert "'torch' is used while a compiler traces; call verify() before" in capsys.readouterr().err
    monkeypatch.setattr(verify, "_capturing", lambda device: True)
    assert dispatch.pick(None, "f", CPU).name == "torch"
    assert "while a CUDA graph is captured" in capsys.readouterr().err
    assert trials.made == []
    monkeypatch.setattr(verify, "_capturing", lambda device: False)
    assert dispatch.pick(None, "f", CPU).name == "sound"
    # What is known is used in both.
    monkeypatch.setattr(verify, "_capturing", lambda device: True)
    verify._known.clear()
    assert dispatch.pick(None, "f", CPU).name == "sound"
    assert dispatch.backend_name(None, "f", CPU) == "sound"
    assert len(trials.made) == 1


def test_a_compiled_loss_traces_without_trying_anything(offered, trials):
    offered("sound")

    @torch.compile(backend="eager", fullgraph=True)
    def loss(hidden, weight, targets):
        return tk.linear_logprobs(hidden, weight, targets).logprobs.sum()

    loss(torch.randn(3, 4), torch.randn(7, 4), torch.zeros(3, dtype=torch.int64))
    assert trials.made == []


def test_threads_that_pick_at_once_make_one_verdict(offered, trials):
    offered("sound")
    threads = [threading.Thread(target=dispatch.pick, args=(None, "f", CPU)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(trials.made) == 1


# On disk -------------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_said_once_and_the_verdict_holds_here(offered, trials, capsys, monkeypatch):
    offered("sound", "wrong")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/self")  # not even root writes there
    assert dispatch.pick(None, "f", CPU).name == "sound"
    assert dispatch.pick(None, "f", CPU).name == "sound"
    assert len(trials.made) == 1
    assert capsys.readouterr().err.count("the verdict cannot be kept") == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"machine": {}}', "null", '{"verdicts": 3}', "\xff"])
def test_a_damaged_file_is_made_anew(offered, trials, cache, text):
    offered("sound")
    dispatch.pick(None, "f", CPU)
    (path,) = cache.glob("verify-*.json")
    path.write_bytes(text.encode("latin-1"))
    verify._known.clear()
    assert dispatch.pick(None, "f", CPU).name == "sound"
    assert len(trials.made) == 2
    assert json.loads(path.read_text())["verdicts"]["sound"]["right"] is True


@pytest.mark.parametrize("change", ["driver", "torch", "triton", "device", "trapo_kernels"])
def test_a_verdict_holds_for_its_machine_and_versions_alone(offered, trials, monkeypatch, change):
    offered("sound")
    dispatch.pick(None, "f", CPU)
    verify._known.clear()
    other = {**keep.machine(CPU), change: "another"}
    monkeypatch.setattr(keep, "machine", lambda device: other)
    dispatch.pick(None, "f", CPU)
    assert len(trials.made) == 2


def test_who_could_not_be_tried_is_tried_again_later(offered, trials, monkeypatch):
    offered("sound")
    trials.right = {"sound": (None, "out of memory")}
    assert dispatch.pick(None, "f", CPU).name == "torch"
    verify._known.clear()
    assert dispatch.pick(None, "f", CPU).name == "torch"  # a rank that waited for the lock
    assert len(trials.made) == 1
    verify._known.clear()
    monkeypatch.setattr(keep, "RETRY_AFTER", 0.0)
    trials.right = {}
    assert dispatch.pick(None, "f", CPU).name == "sound"
    assert len(trials.made) == 2


_RANK = """
import sys, time, torch, verify_plants
from trapo_kernels.backends import dispatch
from trapo_kernels.verify import keep, trial
verify_plants.register()
dispatch._BACKENDS[:] = [b for b in dispatch._BACKENDS if b.name in ("sound", "torch")]
def run(names, device, limit, enough, cases=None):
    open(sys.argv[1], "a").write("tried ")
    time.sleep(2)
    return {n: keep.Verdict(n, True, None, 9, 2.0) for n in names}
trial.run = run
print(dispatch.pick(None, "f", torch.device("cpu")).name)
"""


def test_of_processes_that_pick_at_once_one_makes_the_verdict(tmp_path):
    log = tmp_path / "log"
    ranks = [
        subprocess.Popen([sys.executable, "-c", _RANK, str(log)], stdout=subprocess.PIPE, cwd="tests", text=True,
                         env={**os.environ, "PYTHONPATH": os.pathsep.join(["..", *sys.path])})
        for _ in range(2)
    ]  # fmt: skip
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == ["sound\n"] * 2
    assert log.read_text() == "tried "


# The report ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cuda:x", 3.5])
def test_a_device_that_is_not_here_is_refused_in_one_line(trials, device):
    with pytest.raises(ValueError, match=r"^verify: device must be a device that is here, .*; got ") as raised:
        tk.verify(device)
    assert "\n" not in str(raised.value)
    assert trials.made == []


def test_verify_tries_what_is_compiled_anew_and_reports(trials, cache, monkeypatch):
    monkeypatch.setattr(dispatch, "_BACKENDS", [verify_plants.planted("sound"), *dispatch._BACKENDS])
    trials.right = {"sound": (False, "case x: off")}
    first, second = tk.verify(), tk.verify("cpu")
    assert len(trials.made) == 2
    assert "sound" in trials.made[0]
    assert not {"torch", "reference"} & set(trials.made[0])
    assert second.kept is not None
    assert second.kept.is_file()
    assert not first
    assert "sound: wrong: " in str(first)
    monkeypatch.setattr(dispatch, "_BACKENDS", [verify_plants.planted("sound"), tk.backends()["torch"]])
    assert dispatch.pick(None, "f", CPU).name == "torch"  # by that verdict
    assert len(trials.made) == 2
