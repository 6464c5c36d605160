"""csrc/cuda on fibers: no sanitizer has anything to say, planted bugs are caught, and memory is touched once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from simt import build

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=build.missing() or "")

# Real ones, and some with so little shared memory that short rows take the way of long ones.
DEVICES = {
    "H100": (90, 228 * 1024),
    "A100": (80, 164 * 1024),
    "clusters": (90, 8000),
    "large clusters": (90, 3500),
    "read twice": (80, 3000),
}
ORDERS = ["asc", "desc", "1", "2"]


def run(program: Path, device="H100", order="asc", quick=False) -> subprocess.CompletedProcess[str]:
    arch, shared = DEVICES[device]
    environment = {
        **os.environ,
        "SIMT_ARCH": str(arch),
        "SIMT_SHARED_PER_SM": str(shared),
        "SIMT_ORDER": order,
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1 exitcode=66",
    }
    arguments = [str(program), *(["quick"] if quick else [])]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False, timeout=600)


def passes(program: Path, device: str, order: str, quick: bool) -> None:
    done = run(program, device, order, quick)
    assert (done.returncode, done.stdout) == (0, "0 failures\n"), done.stdout + done.stderr[-4000:]


# Compilations, two at a time, before the first test waits for one.
@pytest.fixture(scope="module")
def compiled():
    with ThreadPoolExecutor(2) as pool:
        programs: dict[str, Future[Path]] = {c: pool.submit(build.check, c) for c in build.CHECKERS}
        programs["traffic"] = pool.submit(build.traffic)
        programs.update({m.name: pool.submit(m.program) for m in MUTANTS})
        yield lambda name: programs[name].result()


def test_two_threads_may_build_the_same_part(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "BUILD", tmp_path)
    slow_compiler = ["sh", "-c", 'echo part > "$0" && sleep 0.3']
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: build._run(slow_compiler, tmp_path / "part.o"), range(2)))
    left = [(p.name, p.read_text()) for p in tmp_path.iterdir() if p.suffix != ".lock"]
    assert left == [("part.o", "part\n")]


# Nothing to find ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("device", DEVICES)
def test_every_verb_is_right_in_every_order_of_threads(compiled, device, order):
    passes(compiled("plain"), device, order, quick=False)


@pytest.mark.parametrize("largest", ["1", "4"])
def test_a_device_without_a_place_for_a_plans_clusters_reads_the_row_twice(compiled, monkeypatch, largest):
    monkeypatch.setenv("SIMT_LARGEST_CLUSTER", largest)
    passes(compiled("plain"), "large clusters", "asc", quick=False)


@pytest.mark.parametrize("order", ["asc", "desc", "1"])
@pytest.mark.parametrize("device", DEVICES)
def test_address_and_undefined_behaviour_sanitizers_find_nothing(compiled, device, order):
    passes(compiled("asan"), device, order, quick=False)


@pytest.mark.parametrize("device", ["H100", "clusters", "read twice"])
def test_thread_sanitizer_finds_no_missing_barrier(compiled, device):
    passes(compiled("tsan"), device, "1", quick=True)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["asc", "desc", "2"])
@pytest.mark.parametrize("device", DEVICES)
def test_thread_sanitizer_finds_nothing_in_any_shape(compiled, device, order):
    passes(compiled("tsan"), device, order, quick=False)


# Planted bugs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    """A change of one place of csrc/cuda, and how it must come to light."""

    name: str
    file: str
    old: str
    new: str
    checker: str
    report: str  # a part of it
    device: str = "H100"
    order: str = "asc"
    quick: bool = True

    def program(self) -> Path:
        folder = build.BUILD / "mutants" / self._key()
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=build.BUILD) as unfinished:
                source = Path(unfinished) / "mutant"
                self._write(source / "cuda")
                with contextlib.suppress(OSError):  # another process was first
                    folder.parent.mkdir(exist_ok=True)
                    source.rename(folder)
        # Without optimization they compile in half the time, and show as much.
        return build.check(self.checker, folder / "cuda", ["-O0", "-DSIMT_FEW_DTYPES"])

    def _key(self) -> str:
        """Of what it is made of, so that it is made once."""
        content = hashlib.sha256(repr((self.file, self.old, self.new)).encode())
        for path in [*sorted(build.CUDA.iterdir()), build.CUDA.parent / "row_math.h"]:
            content.update(path.read_bytes())
        return f"{self.name.replace(' ', '-')}-{content.hexdigest()[:16]}"

    def _write(self, folder: Path) -> None:
        shutil.copytree(build.CUDA, folder)
        shutil.copy(build.CUDA.parent / "row_math.h", folder.parent)
        _replace(folder / self.file, self.old, self.new)
        # Two dtypes are enough here and compile in half the time.
        _replace(folder / "row_kernels.cu", "if (dtype == Dtype::kFloat64) return run(double{});", "")
        _replace(folder / "row_kernels.cu", "if (dtype == Dtype::kFloat16) return run(__half{});", "")


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{path.name} must have once: {old}"
    path.write_text(text.replace(old, new))


KERNELS, DEVICE = "row_kernels.cu", "device.h"
WRONG = "instead of"  # check.cpp's words for a wrong number
BARRIER = "  __syncthreads();\n"
CLUSTER_BARRIER = "    cluster_arrive();\n    cluster_wait();\n"
SUM = "  state = shifted(state, max);\n#pragma unroll\n  for (int by = kWarp / "
TARGET_LATE = """[&] {
    const auto state = block_state(read_state(row, cap), scratch);
    return tokens.finished(state, read_target(row, target, cap) + 0 * z_target, exact);
  }()"""
MUTANTS = [
    Mutant(
        "read past the end of a row",
        *(DEVICE, "hi = end / kCount;", "hi = (end + kCount - 1) / kCount;"),
        *("asan", "heap-buffer-overflow"),
    ),
    Mutant(
        "write past the end of a row",
        *(KERNELS, "row.base[edge] = narrowed", "row.base[edge + 1] = narrowed"),
        *("asan", "heap-buffer-overflow"),
    ),
    Mutant(
        "write past the end of shared memory",
        *(KERNELS, "const int end = min(hi, (stage", "const int end = min(hi + 1, (stage"),
        *("asan", "heap-buffer-overflow", "clusters"),
    ),
    Mutant(
        "too little shared memory",
        *(DEVICE, "round_up(sizeof(Scratch<A>), kPiece)", "round_up(sizeof(Scratch<A>) / 2, kPiece)"),
        *("asan", "heap-buffer-overflow"),
    ),
    Mutant(
        "misaligned pieces",
        *(DEVICE, "% kLine / sizeof(T));", "% kLine / sizeof(T)) * 0;"),
        *("asan", "misaligned address"),
    ),
    Mutant("missing barrier", DEVICE, BARRIER, "", "tsan", "data race"),
    Mutant("missing barrier, by order alone", DEVICE, BARRIER, "", "plain", WRONG, order="desc"),
    Mutant(
        "diverged barrier",
        *(DEVICE, BARRIER, "  if (warp == 0) __syncthreads();\n"),
        *("plain", "a barrier that not every thread reaches"),
    ),
    Mutant(
        "barriers at two lines",
        *(DEVICE, BARRIER, "  if (warp == 0) __syncthreads();\n  else\n  __syncthreads();\n"),
        *("plain", "diverged barrier"),
    ),
    Mutant("missing cluster barrier", KERNELS, CLUSTER_BARRIER, "", "plain", WRONG, "clusters"),
    Mutant(
        "cluster barrier without waiting",
        *(KERNELS, CLUSTER_BARRIER, "    cluster_arrive();\n"),
        *("plain", "arrives twice", "clusters"),
    ),
    Mutant(
        "block leaves while it is read",
        *(KERNELS, "  if (plan.cluster > 1) cluster_wait();", ""),
        *("asan", "use-after-poison", "clusters"),
    ),
    Mutant(
        "wrong mask",
        *(DEVICE, "kAllLanes = 0xffffffffu", "kAllLanes = 0x7fffffffu"),
        *("plain", "reads a lane that is not in the mask"),
    ),
    Mutant(
        "lanes left out of a sum",
        *(DEVICE, SUM + "2;", SUM + "4;"),
        *("plain", WRONG),
    ),
    Mutant(
        "copies not waited for",
        *(KERNELS, "__pipeline_wait_prior(kMaxStages - 1 - stage)", "__pipeline_wait_prior(kMaxStages - stage)"),
        *("plain", WRONG),
    ),
    Mutant(
        "a piece that another thread copied",
        *(KERNELS, "slot % blockDim.x == threadIdx.x", "slot % blockDim.x == 0u * threadIdx.x"),
        *("tsan", "data race"),
    ),
    Mutant(
        "target read after the barrier",
        *(KERNELS, "tokens.finished(block_state(read_state(row, cap), scratch), z_target, exact)", TARGET_LATE),
        *("tsan", "data race", "read twice"),
    ),
    Mutant(
        "edges counted by every block",
        *(KERNELS, "rank == 0 ? row.edge(threadIdx.x) : -1", "row.edge(threadIdx.x)"),
        *("plain", WRONG, "clusters"),
    ),
    Mutant(
        "target takes the others' formula",
        *(KERNELS, "k == target ? of(", "k == target + 99 ? of("),
        *("plain", WRONG),
    ),
    Mutant(
        "no zero for a row without gradient",
        *(KERNELS, "if (zero) return filled<T>(0);", "if (zero) return piece;"),
        *("plain", WRONG),
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_planted_bug_is_caught(compiled, mutant):
    done = run(compiled(mutant.name), mutant.device, mutant.order, mutant.quick)
    assert done.returncode != 0, "the bug went unseen"
    assert mutant.report in done.stdout + done.stderr, done.stdout + done.stderr[-3000:]


def test_a_deadlock_report_names_block_threads_and_line(compiled):
    report = run(compiled("diverged barrier"), quick=True).stderr
    first, waiting, gone = report.splitlines()
    assert first == "simt: deadlock: a barrier that not every thread reaches."
    line = (build.CUDA / DEVICE).read_text().splitlines().index(BARRIER.rstrip()) + 1
    assert waiting == f"  block 0, threads 0 to 31: at __syncthreads (line {line})"
    assert gone == "  block 0, threads 32 to 63: returned"


# Traffic -----------------------------------------------------------------------------------------------------------


@cache
def measured(program: Path) -> list[dict]:
    done = subprocess.run([str(program)], capture_output=True, text=True, check=True, timeout=600)
    return json.loads(done.stdout)


def test_fused_on_chip_reads_and_writes_each_logit_once(compiled):
    launches = [m for m in measured(compiled("traffic")) if m["verb"] == "fused_" and m["on_chip"]]
    assert {m["cluster"] for m in launches} >= {1, 2, 4, 8}
    for m in launches:
        logits = m["rows"] * m["vocab"] * m["itemsize"]
        assert m["reads"]["bytes"] == m["writes"]["bytes"] == logits, m


def test_rows_of_262144_logits_in_bf16_stay_on_chip(compiled):
    assert any(m["on_chip"] and m["vocab"] == 262144 and m["itemsize"] == 2 for m in measured(compiled("traffic")))


def test_warps_use_at_least_95_percent_of_the_sectors_they_touch(compiled):
    for m in measured(compiled("traffic")):
        for way in ("reads", "writes"):
            if m[way]["sectors"]:
                assert m[way]["bytes"] / (32 * m[way]["sectors"]) >= 0.95, m


def test_all_but_the_edges_of_a_row_move_in_accesses_of_16_bytes(compiled):
    for m in measured(compiled("traffic")):
        for way in ("reads", "writes"):
            narrow = m[way]["accesses"] - m[way]["wide"]
            # Up to 14 columns at the edges, and where the row is read again the target by every thread.
            assert narrow <= m["rows"] * (14 + (0 if m["on_chip"] else 1024)), m


def test_a_row_without_gradient_is_not_read_by_grad(compiled):
    for m in measured(compiled("traffic")):
        if m["verb"] == "grad_":
            # One of the two rows has none: it is written all the same.
            assert m["reads"]["bytes"] <= m["rows"] * m["vocab"] * m["itemsize"] // 2 + 64, m
            assert m["writes"]["bytes"] == m["rows"] * m["vocab"] * m["itemsize"]
