"""The CUDA extension: what it refuses, what its operators promise to torch.compile, and that nvcc builds it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from simt import backend, build

from trapo_kernels.rows import cuda as cuda_rows

ROOT = Path(__file__).parent.parent
on_fibers = pytest.mark.skipif(build.missing() is not None, reason=build.missing() or "")


@pytest.fixture
def operators():
    assert backend.available()
    return torch.ops.trapo_kernels_cuda


@on_fibers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_keep_their_promises_to_the_compiler(operators, dtype):
    logits, targets = torch.randn(3, 40).to(dtype), torch.tensor([0, 5, 39])
    expert, vector = torch.tensor([True, False, False]), torch.rand(3)
    checks = ["test_schema", "test_faketensor"]
    stats = (logits, targets, None, True)
    torch.library.opcheck(operators.row_stats.default, stats, test_utils=checks)
    grad = (logits, targets, -vector, vector, vector, vector, vector, None, 2.0)
    torch.library.opcheck(operators.row_grad_.default, grad, test_utils=checks)
    numbers = [1.0, 0.1, 0.1, 0.0, 9.0, 9.0, 0.0, 0.0, 0.0]
    fused = (logits, targets, expert, vector, None, None, None, 1, 1, numbers, 1.0, None)
    torch.library.opcheck(operators.row_fused_.default, fused, test_utils=checks)


@on_fibers
def test_wrong_arguments_are_refused(operators):
    logits, targets = torch.randn(3, 40), torch.tensor([0, 5, 39])
    with pytest.raises(RuntimeError, match=r"logits must be \[C, V\] with contiguous rows; got 1 dimensions"):
        operators.row_stats(logits[0], targets, None, True)
    with pytest.raises(RuntimeError, match=r"targets must be contiguous int64 .* with C=3"):
        operators.row_stats(logits, targets[:2], None, True)
    with pytest.raises(RuntimeError, match="logits must be float32, float64, float16 or bfloat16"):
        operators.row_stats(logits.int(), targets, None, True)
    v = torch.rand(3)
    with pytest.raises(RuntimeError, match=r"vectors must be contiguous .* with C=3"):
        operators.row_grad_(logits, targets, v, v, v.double(), None, v, None, None)
    with pytest.raises(RuntimeError, match="entropy must be given with g_entropy; got None"):
        operators.row_grad_(logits, targets, v, v, v, None, v, v, None)


@on_fibers
def test_a_target_outside_of_the_vocabulary_gives_nan_and_touches_nothing_else(operators):
    logits, targets = torch.randn(3, 40), torch.tensor([0, 40, -100])
    *_, target = operators.row_stats(logits, targets, None, True)
    assert target.isnan().tolist() == [False, True, True]


@on_fibers
def test_a_launch_that_fails_names_kernel_shape_and_plan():
    script = """
import torch
from simt import backend
assert backend.available()
torch.ops.trapo_kernels_cuda.row_stats(torch.zeros(2, 5).double(), torch.zeros(2).long(), None, True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "SIMT_SHARED_PER_SM": "1500"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.splitlines()[-1] == (
        "RuntimeError: trapo_kernels: launch of stats failed for logits [2, 5] float64 with 32 threads a block, "
        "1 blocks a row, 800 bytes of shared memory: invalid argument"
    )


def test_an_install_without_the_extension_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_rows, "__file__", str(tmp_path / "rows" / "cuda.py"))
    cuda_rows.missing.cache_clear()
    try:
        assert cuda_rows.missing() == f"torch {torch.__version__} is not built for CUDA"
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        cuda_rows.missing.cache_clear()
        assert cuda_rows.missing() == "torch finds no CUDA device"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
        cuda_rows.missing.cache_clear()
        assert cuda_rows.missing() == "the device is of compute capability 7.5; 8.0 is needed"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        cuda_rows.missing.cache_clear()
        assert "reinstall with nvcc, TRAPO_KERNELS_CUDA=1" in cuda_rows.missing()
    finally:
        cuda_rows.missing.cache_clear()


def setup_py(what: str, **environment: str) -> str:
    """Runs a line with setup.py's functions at hand."""
    script = f"import setuptools\nsetuptools.setup = lambda **_: None\nfrom setup import *\n{what}"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout + done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is one for CUDA")
def test_setup_skips_cuda_with_one_line():
    assert f"trapo_kernels: without the CUDA extension: torch {torch.__version__} is not built for CUDA" in setup_py("")
    assert "nvcc is neither in CUDA_HOME nor in PATH" in setup_py("", TRAPO_KERNELS_CUDA="1", CUDA_HOME="/nowhere")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_nvcc_builds_the_extension_and_it_registers_its_operators_under_this_torch(tmp_path):
    out = tmp_path / "_cuda.so"
    setup_py(f"subprocess.run(nvcc_command({str(out)!r}), check=True)", TRAPO_KERNELS_CUDA="1")
    script = f"""
import torch
torch.ops.load_library({str(out)!r})
print(torch._C._dispatch_has_kernel_for_dispatch_key("trapo_kernels_cuda::row_fused_", "CUDA"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
