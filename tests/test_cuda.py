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

from trapo_kernels.backends import cuda as cuda_rows
from trapo_kernels.backends import native

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
    fused = (logits, targets, expert, vector, None, None, None, vector, -vector, 1, 1, numbers, 1.0, None)
    torch.library.opcheck(operators.row_fused_.default, fused, test_utils=checks)
    hidden, weight = torch.randn(3, 8).bfloat16(), torch.randn(40, 8).bfloat16()
    torch.library.opcheck(operators.target_logits.default, (hidden, weight, None, targets, 2.0), test_utils=checks)


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
    with pytest.raises(RuntimeError, match=r"hidden and weight must be \[C, D\] and \[V, D\] of one 16-bit dtype"):
        operators.target_logits(torch.randn(3, 8), torch.randn(40, 8), None, targets, 1.0)


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
    monkeypatch.setattr(cuda_rows, "__file__", str(tmp_path / "backends" / "cuda.py"))
    monkeypatch.setattr(torch.version, "cuda", None)
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


def setup_py(what: str, python: Path | str = sys.executable, **environment: str) -> str:
    """Runs a line with setup.py's functions at hand."""
    script = f"import setuptools\nsetuptools.setup = lambda **_: None\nfrom setup import *\n{what}"
    done = subprocess.run(
        [python, "-c", script],
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


# The library and torch ----------------------------------------------------------------------------------------------

CUDA_TORCH = ROOT / ".venv-cuda" / "bin" / "python"  # `make setup-cuda-torch`
ASK_LIBRARY = """
import ctypes, sys, torch
torch.ops.load_library(sys.argv[1])
address = torch.ops.trapo_kernels_cuda.stream_symbol()
print(torch._C._dispatch_has_kernel_for_dispatch_key("trapo_kernels_cuda::row_fused_", "CUDA"), address != 0)
if address and not torch.cuda.is_available():
    stream = ctypes.c_void_p()
    of = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))(address)
    print("refused" if of(0, ctypes.byref(stream)) else "a stream without a device")
"""


def ask(python, library) -> list[str]:
    done = subprocess.run([python, "-c", ASK_LIBRARY, library], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return done.stdout.splitlines()


def built(python, out) -> Path:
    """The extension for one architecture, against the torch of a Python."""
    leave_out = [
        code for code in setup_py("print(*CUDA_CODE)").split() if code.startswith("-gencode") and "90a" not in code
    ]
    setup_py(
        f"subprocess.run([c for c in nvcc_command({str(out)!r}) if c not in {leave_out!r}], check=True)",
        python=python, TRAPO_KERNELS_CUDA="1",
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def of_cuda_torch(tmp_path_factory) -> tuple[Path, Path]:
    """(a Python whose torch is one for CUDA, the extension built there)."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    if torch.version.cuda is None and not CUDA_TORCH.exists():
        pytest.skip(f"torch {torch.__version__} is not built for CUDA, and `make setup-cuda-torch` was not run")
    python = Path(sys.executable) if torch.version.cuda is not None else CUDA_TORCH
    return python, built(python, tmp_path_factory.mktemp("cuda") / "_cuda.so")


def test_under_a_torch_for_cuda_the_extension_finds_the_stream(of_cuda_torch):
    found, *called = ask(*of_cuda_torch)
    assert found == "True True"
    # Without a device torch's function says so: it is a function, and it is called as torch declares it.
    assert called == ([] if torch.cuda.is_available() else ["refused"])


def test_the_extension_leaves_no_symbol_of_torch_to_chance(of_cuda_torch):
    command = ["nm", "-D", "--undefined-only", of_cuda_torch[1]]
    symbols = [line.split() for line in subprocess.check_output(command, text=True).splitlines()]
    weak = {name for kind, name in symbols if kind in "wv"}
    assert not [name for name in weak if "torch" in name or "c10" in name or "cuda" in name.lower()]
    assert len(symbols) > len(weak) > 0


def test_one_build_serves_a_torch_for_cpus_too_and_says_what_it_lacks(of_cuda_torch):
    if torch.version.cuda is not None:
        pytest.skip("this torch is one for CUDA")
    assert ask(sys.executable, of_cuda_torch[1]) == ["True False"]


@on_fibers
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is one for CUDA")
def test_a_torch_without_the_symbol_is_a_reason_in_one_line(operators):
    assert cuda_rows.unresolved() == (
        f"torch {torch.__version__} shows no CUDA streams to extensions (aoti_torch_get_current_cuda_stream)"
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_nvcc_builds_the_extension_and_it_registers_its_operators_under_this_torch(tmp_path):
    out = tmp_path / "_cuda.so"
    setup_py(f"subprocess.run(nvcc_command({str(out)!r}), check=True)", TRAPO_KERNELS_CUDA="1")
    assert ask(sys.executable, out)[0] == f"True {torch.version.cuda is not None}"
    assert native.built_for(out) == (2, 10)
