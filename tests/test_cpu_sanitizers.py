"""csrc/cpu under AddressSanitizer and UndefinedBehaviorSanitizer, on small shapes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX2", "-DCPU_CAPABILITY=AVX2"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-sanitize=vptr"]

_PROGRAM = """
import sys
import torch
from pathlib import Path
sys.path.insert(0, "tests")
from trapo_kernels.backends.cpu import rows as cpu
cpu.library = lambda: Path(sys.argv[1])
from kernel_cases import EVERYTHING, TOLERANCE, assert_same_result, make_case, oracle, run
import trapo_kernels as tk
assert cpu.missing() is None, cpu.missing()
if sys.argv[2:] == ["plant"]:
    # Statistics of one row for 64 of them: nothing but the sanitizer looks.
    logits, short = torch.randn(64, 5), torch.zeros(1)
    targets = torch.zeros(64, dtype=torch.int64)
    torch.ops.trapo_kernels_cpu.row_grad_(logits, targets, short, short, short, None, short, None, None)
for dtype in TOLERANCE:
    for head in ({}, {"softcap": 3.0, "with_bias": True}):
        for shape in ((0, 7, 3), (1, 1, 1), (5, 2, 4), (33, 1031, 12), (19, 2500, 33)):
            for budget in (0.05, 100):
                case = make_case(*shape, dtype=dtype, **head)
                with tk.budget_mb(budget):
                    assert_same_result(run(case, EVERYTHING, "cpu"), oracle(case, EVERYTHING), dtype)
                    run(case, EVERYTHING, "cpu", grad_tolerance=0.1)
                    with torch.no_grad():
                        tk.linear_logprobs(case.hidden, case.weight, case.targets, entropy=True, backend="cpu")
print("clean")
"""


@pytest.fixture(scope="module")
def library():
    """The AVX2 variant (which other machines have too), instrumented. Kept in build/ by its content: it takes 50 s,
    and two processes of pytest may want it."""
    if shutil.which("g++") is None or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("needs g++ and a machine with AVX2")
    content = hashlib.sha256(repr((compilation(), torch.__version__)).encode())
    for path in sorted([*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cpu/*")]):
        content.update(path.read_bytes())
    out = ROOT / "build" / "sanitized" / f"{content.hexdigest()[:16]}.so"
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            build(out)
    return out


def compilation() -> list[str]:
    home = Path(torch.__file__).parent
    built_for = "-DTRAPO_TORCH={}.{}".format(*torch.__version__.split("."))
    flags = ["-std=c++20", "-Og", "-g1", "-fPIC", "-fopenmp", "-fno-math-errno", "-ffp-contract=off", "-w", built_for]
    headers = [f"-isystem{home / 'include'}", f"-isystem{home / 'include/torch/csrc/api/include'}"]
    return ["g++", *flags, *AVX2, *SANITIZERS, *headers]


def build(out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in SOURCES]
        compiling = [
            subprocess.Popen([*compilation(), "-c", str(source), "-o", str(made)])
            for source, made in zip(SOURCES, objects, strict=True)
        ]
        assert [process.wait() for process in compiling] == [0] * len(SOURCES)
        libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
        link = ["-shared", "-fopenmp", *SANITIZERS, *map(str, objects), *libraries]
        subprocess.run(["g++", *link, "-o", str(Path(folder) / out.name)], check=True)
        (Path(folder) / out.name).rename(out)


def run(library, *arguments):
    # libstdc++ beside it: Python does not bring it, and ASan wants to find its __cxa_throw at the start.
    preload = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        # Python and torch keep memory to the end; what csrc/cpu reads and writes is the question.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, "-c", _PROGRAM, str(library), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)


def test_small_shapes_run_clean(library):
    done = run(library)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.split() == ["clean"]


def test_a_read_beyond_a_row_would_be_seen(library):
    done = run(library, "plant")
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
