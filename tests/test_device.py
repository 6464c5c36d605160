"""The suite's own device: `pytest --device` moves what tests make, and says what it cannot do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import device
import pytest
import torch
from kernel_cases import BACKENDS, make_case

ROOT = Path(__file__).parent.parent


def suite(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {n: v for n, v in os.environ.items() if n != device.ENV and not n.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_whatever_a_test_makes_is_on_the_device():
    case = make_case(5, 7, with_bias=True)
    inline = torch.zeros(3), torch.tensor([1.0]), torch.arange(3), torch.randn(2, generator=torch.Generator())
    for t in (*case.params(), case.targets, *case.inputs.values(), *inline, torch.nn.Linear(2, 3).weight):
        assert t.device.type == device.name()


def test_the_backends_are_those_of_the_device():
    assert set(device.BACKENDS[device.name()]) <= set(BACKENDS)
    assert ("cpu" in BACKENDS) == (device.name() == "cpu")


@pytest.mark.skipif(device.name() != "cpu", reason="the suite runs elsewhere already")
def test_the_suite_runs_on_a_device_that_takes_no_tensor_of_the_cpu():
    files = [f"tests/test_{name}.py" for name in ("device", "conformance", "columns")]
    ours = "whatever or backends or pretended"  # this file asks where tensors are
    done = suite("--device", "pretend", *files, "-k", f"{ours} or torch and (preset or changes_nothing or plain-torch)")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "kernels are tested on: pretend" in done.stdout


@pytest.mark.skipif(device.name() != "pretend", reason="about the device `pretend`")
def test_the_pretended_device_takes_no_tensor_of_the_cpu():
    here, there = torch.ones(3), torch.ones(3, device="cpu")
    for mixed in (lambda: here + there, lambda: torch.add(here, here, out=there), lambda: here[there.long()]):
        with pytest.raises(RuntimeError, match="on the same device, but got pretend and cpu"):
            mixed()
    assert torch.equal(here.to("cpu"), there)
    assert there.to("pretend").device == here.device
    assert (here + torch.ones((), device="cpu")).device == here.device


def test_a_device_that_is_not_here_or_not_known_is_refused_in_one_line():
    assert device.refuse("tpu") == "--device must be one of cpu, cuda, pretend; got 'tpu'"
    if not torch.cuda.is_available():
        assert device.refuse("cuda") == f"--device cuda: torch {torch.__version__} finds no CUDA device"
        done = suite("--device", "cuda", "tests/test_device.py")
        assert done.returncode == pytest.ExitCode.USAGE_ERROR
        assert f"ERROR: {device.refuse('cuda')}" in done.stderr


def test_naming_the_cpu_changes_nothing():
    listed = ("-q", "--collect-only", "tests/test_columns.py")
    with_it, without = (suite(*option, *listed).stdout.splitlines()[:-1] for option in (("--device", "cpu"), ()))
    assert with_it == without
    assert len(without) > 50
