"""What is claimed of GPU kernels without a GPU: the committed evidence, and that it can be made again."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu_evidence
from bench.evidence import roofline
from trapo_kernels.backends.triton import rows
from trapo_kernels.chunks.budget import _DEFAULT_MB, _FULL_SPEED_ROWS

ROOT = Path(__file__).parent.parent
KERNELS = {"row_stats", "row_grad", "row_fused", "target_logits", "linear_stats", "merge_stats"}
interpreted = pytest.mark.skipif(
    rows.missing() is not None or not rows.interpreted(), reason="bytes are counted in Triton's interpreter"
)


@pytest.fixture(scope="module")
def evidence():
    return json.loads(gpu_evidence.RESULTS.read_text())


def test_the_committed_evidence_keeps_every_invariant_on_every_architecture(evidence):
    assert gpu_evidence.broken(evidence) == []
    ours = [row for row in evidence["kernels"] if row["provider"] == "trapo_kernels"]
    assert {(r["kernel"], r["arch"]) for r in ours} == {(k, f"sm_{a}") for k in KERNELS for a in (80, 90, 100, 120)}
    tensor_core = {
        r["arch"]: r["tensor_core"] for r in ours if "bfloat16" in r["config"] and r["kernel"] == "linear_stats"
    }
    assert tensor_core == {
        "sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "sm_120": "mma.sync"
    }  # fmt: skip


def test_the_committed_table_is_that_of_the_committed_numbers(evidence):
    from bench.evidence.tables import markdown

    assert gpu_evidence.RESULTS.with_suffix(".md").read_text() == markdown(evidence)


def test_a_broken_invariant_is_found(evidence):
    def faults(**change):
        kernel = next(r for r in evidence["kernels"] if r["kernel"] == "row_fused" and r["provider"] == "trapo_kernels")
        return gpu_evidence.broken({"kernels": [{**kernel, **change}], "traffic": []})

    assert faults() == []
    assert "3 spills" in faults(spills=3)[0]
    assert "no 128-bit load" in faults(load_bits={"32": 4})[0]
    assert "atomics" in faults(atomics=1)[0]
    fused = next(r for r in evidence["traffic"] if r["kernel"] == "row_fused")
    tile = next(r for r in evidence["traffic"] if r["kernel"] == "linear_stats")
    assert gpu_evidence.broken({"kernels": [], "traffic": [{**fused, "read": 3.0}]})
    assert gpu_evidence.broken({"kernels": [], "traffic": [{**tile, "written": 1.0}]})


@interpreted
def test_counted_now_our_kernels_read_a_logit_twice_write_it_once_and_the_tile_kernel_writes_none():
    from bench.evidence import counts

    shape = (4, 64, 3_000)
    found = [row for path, step in counts.OURS.items() for row in counts._rows("trapo_kernels", path, step, shape)]
    assert gpu_evidence.broken({"kernels": [], "traffic": found}) == []
    reads = {row["kernel"]: row["read"] for row in found}
    assert reads["row_fused"] == pytest.approx(2, abs=0.02)
    assert {row["kernel"] for row in found if row["path"] == "logprobs, forward only"} == {
        "linear_stats",
        "merge_stats",
    }


def compiled_by(program):
    """What a program prints as JSON in a process without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, env=environment,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(rows.missing() is not None, reason=f"triton: {rows.missing()}")
def test_compiled_now_the_kernels_have_no_spills():
    program = (
        "import json; from bench.evidence import ours; from bench.evidence.compiled import compile_for\n"
        "found = [compile_for(l, 90, 'trapo_kernels', c) for c, l in list(ours.row_launches())[:4]]\n"
        "print(json.dumps({'kernels': found, 'traffic': []}))"
    )
    found = compiled_by(program)
    assert [row["kernel"] for row in found["kernels"]] == ["row_stats", "row_grad", "row_grad", "row_fused"]
    assert gpu_evidence.broken(found) == []


def test_our_chunks_are_those_of_the_cards_own_budget():
    budgets = {card.name: card.budget_mb for card in roofline.CARDS}
    assert budgets["H200 SXM"] > budgets["H100 SXM"]
    for card in roofline.CARDS:
        n, d, v = shape = (32_768, 2_048, 151_936)
        logits = [p for p in roofline.phases_on("trapo_kernels", shape, card) if p.name == "logits"]
        rows = max(p.flops for p in logits) / (2 * d * v)
        assert rows * 2 * v <= card.budget_mb * 2**20
        assert sum(p.flops for p in logits) == 2 * n * d * v


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_triton_kernel_compiles_for_hopper_and_blackwell_with_the_triton_that_is_here():
    program = (
        "import json; from bench.evidence import ours; from bench.evidence.compiled import compile_for\n"
        "found = [compile_for(l, arch, 'trapo_kernels', c) for arch in (90, 100)\n"
        "         for c, l in [*ours.row_launches(), *ours.target_launches(), *ours.tile_launches(arch)]]\n"
        "print(json.dumps(found))"
    )
    found = compiled_by(program)
    assert [row["error"] for row in found if "error" in row] == []
    assert {(row["kernel"], row["arch"]) for row in found} == {(k, a) for k in KERNELS for a in ("sm_90", "sm_100")}


@pytest.mark.parametrize("card", roofline.CARDS, ids=lambda card: card.name)
def test_the_chunks_of_cuda_keep_d_weights_traffic_under_15_percent(card):
    for vocab in (128_256, 152_064, 262_144):
        chunk = min(_FULL_SPEED_ROWS["cuda"], int(_DEFAULT_MB["cuda"] * 2**20 / (2 * vocab)))
        traffic, gemms = 8 / card.bandwidth, 6 * chunk / card.flops
        assert traffic <= 0.15 * gemms, f"{card.name}: {traffic / gemms:.0%} at V={vocab}"
    assert roofline.rows_for_share(card) <= chunk


@pytest.mark.parametrize("card", roofline.CARDS, ids=lambda card: card.name)
@pytest.mark.parametrize("shape", roofline.SHAPES)
def test_no_exact_approach_has_a_lower_bound_than_ours_by_more_than_two_percent(card, shape):
    bounds = {name: roofline.bound(name, shape, card)["seconds"] for name in roofline.APPROACHES}
    del bounds["cut_cross_entropy, all filtered"]  # not exact
    plain = {name: bounds.pop(name) for name in list(bounds) if name.endswith("no entropy")}
    assert bounds["trapo_kernels"] <= 1.02 * min(bounds.values()), bounds
    # Hopper pipelines for plain cross-entropy: no finishing pass over d_weight, and one of them none over the logits.
    assert 0.9 * bounds["trapo_kernels"] < min(plain.values()) < bounds["trapo_kernels"], plain


def test_the_estimates_are_slower_than_the_bounds_and_near_what_others_measured():
    from bench.evidence import estimate

    h200 = next(card for card in roofline.CARDS if card.name.startswith("H200"))
    for shape in roofline.SHAPES:
        for name in estimate.SHOWN:
            assert estimate.milliseconds(name, shape) > 1e3 * roofline.bound(name, shape, h200)["seconds"]
    for row in estimate.checked():
        assert row["estimated_ms"] == pytest.approx(row["measured_ms"], rel=0.05)
