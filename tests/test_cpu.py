"""The C++ backend for CPUs: what the conformance suite does not ask of every backend."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hostile_memory import hostile_memory
from kernel_cases import EVERYTHING, OBJECTIVES, assert_same_result, make_case, oracle, run
from torch.library import opcheck

import trapo_kernels as tk
from trapo_kernels.backends.cpu import operands, rows
from trapo_kernels.chunks.sources import LinearSource

pytestmark = pytest.mark.skipif(not tk.backends()["cpu"].available, reason=str(tk.backends()["cpu"]))

ops = torch.ops.trapo_kernels_cpu
AVAILABLE = tk.backends()["cpu"].available
# On AMX, which bf16 panels wait for somebody to try (operands.py).
UNTRIED = AVAILABLE and ops.best_products() == operands.TILES and not operands.trusts_tiles()
# Of bf16 operands: widened, by AVX512-BF16, by tiles (which oneDNN runs without AMX too).
PRODUCTS = [
    which for which in range(3) if AVAILABLE and ops.has_products(which) and not (UNTRIED and which == operands.TILES)
]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything_of(result):
    return [result.loss, result.logprobs, result.entropy, *result.grads]


# More tokens than the width, so that there are chunks in the buffer beside the one in d_weight; more than one group of
# panels; a vocabulary and a width that are multiples of nothing.
SHAPES = [(70, 5003, 300), (300, 5003, 33), (40, 257, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_results_are_the_same_to_the_bit_from_run_to_run_and_for_any_number_of_threads(threads, shape, dtype):
    case = make_case(*shape, dtype=dtype, with_bias=True)
    results = []
    with tk.budget_mb(4):
        for count in (1, 2, 3, 8, 1):
            threads(count)
            results.append(everything_of(run(case, EVERYTHING, "cpu")))
    # torch.mm of bf16 may cut its sums by the number of threads.
    for other in results[-1:] if UNTRIED and dtype == torch.bfloat16 else results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


_THREADS = """
import sys; sys.path.insert(0, "tests")
import torch
from kernel_cases import EVERYTHING, make_case, run
def results(threads):
    torch.set_num_threads(threads)
    found = run(case, EVERYTHING, "cpu")
    return [found.logprobs, found.entropy, *found.grads]
for shape in ((40, 3001, 64), (300, 5003, 33), (70, 2100, 600)):
    case = make_case(*shape, dtype=torch.float32)
    first = results(1)
    for threads in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(first, results(threads), strict=True)), (shape, threads)
print("equal")
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_they_are_where_mkl_believes_to_be_on_a_cpu_of_intel(tmp_path):
    # There it picks its kernel by the number of threads. What it asks can be answered for it, on any x86 CPU.
    source, library = tmp_path / "intel.cpp", tmp_path / "intel.so"
    source.write_text(
        'extern "C" int mkl_serv_intel_cpu() { return 1; }\nextern "C" int mkl_serv_intel_cpu_true() { return 1; }\n'
    )
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    assert python(_THREADS, LD_PRELOAD=str(library)) == ["equal"]


@pytest.mark.parametrize("head", [{}, {"softcap": 3.0, "with_bias": True, "temperature": 0.8}], ids=["plain", "all"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_way_through_the_chunks_agrees_with_the_oracle(shape, head):
    case = make_case(*shape, dtype=torch.float32, **head)
    expected = oracle(case, EVERYTHING)
    for megabytes in (0.2, 4, 100):
        with tk.budget_mb(megabytes):
            found = run(case, EVERYTHING, "cpu")
        for a, b in zip(everything_of(found), everything_of(expected), strict=True):
            assert (a.double() - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1e-3)


def test_errors_are_no_larger_than_those_of_eager_fp32():
    case = make_case(600, 20011, 64, dtype=torch.float32)
    expected = oracle(case, OBJECTIVES["trapo+entropy"])
    ours, eager = (run(case, OBJECTIVES["trapo+entropy"], backend) for backend in ("cpu", "reference"))

    def errors(result):
        pairs = zip(everything_of(result)[1:], everything_of(expected)[1:], strict=True)
        return [float((a.double() - b).norm() / b.norm()) for a, b in pairs]

    for name, mine, theirs in zip(
        ("logprobs", "entropy", "d_hidden", "d_weight"), errors(ours), errors(eager), strict=True
    ):
        assert mine <= 1.05 * theirs, f"{name}: {mine:.2e} against {theirs:.2e}"


def eager_bf16(case, objective):
    """The loss as bf16 training has it: bf16 logits, and a softmax of them in fp32."""
    case = case.to(torch.bfloat16).requires_grad()
    logits = torch.nn.functional.linear(case.hidden, case.weight)
    out = tk.policy_loss_from_logits(logits, case.targets, objective, backend="reference", **case.inputs)
    return [out.logprobs, out.entropy, *torch.autograd.grad(out.loss, case.params())]


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("shape", [(300, 8009, 64), (130, 3001, 258)])
def test_bf16_logits_are_not_rounded_and_gradients_are_no_worse_than_those_of_eager_bf16(shape, products, monkeypatch):
    monkeypatch.setattr(operands, "_best_products", lambda: products)
    case = make_case(*shape, dtype=torch.bfloat16)
    objective = OBJECTIVES["trapo+entropy"]
    expected = everything_of(oracle(case, objective))[1:]
    ours, eager = everything_of(run(case, objective, "cpu"))[1:], eager_bf16(case, objective)

    def error(a, b):
        return float((a.double() - b).norm() / b.norm())

    assert (ours[0].double() - expected[0]).abs().max() <= 2e-6
    for name, mine, theirs, right in zip(("logprobs", "entropy", "dh", "dW"), ours, eager, expected, strict=True):
        assert error(mine, right) <= 1.05 * error(theirs, right), name


@pytest.mark.skipif(UNTRIED, reason="bf16 panels wait for somebody to try them on AMX")
def test_the_gradient_of_a_bf16_weight_is_made_in_bf16_and_scaled_exactly_by_powers_of_two(monkeypatch):
    made, round_once = [], LinearSource.round_once
    monkeypatch.setattr(LinearSource, "round_once", lambda self, f: made.append(f) or round_once(self, f))
    case = make_case(100, 3001, 130, dtype=torch.bfloat16).requires_grad()
    objective = OBJECTIVES["trapo+entropy"]
    loss = tk.linear_policy_loss(
        case.hidden, case.weight, case.targets, objective, backend="cpu", normalizer=37.0, **case.inputs
    ).loss

    def gradients(factor):
        return torch.autograd.grad(loss * factor, case.params(), retain_graph=True)

    once, expected = gradients(1.0), oracle(case, objective, normalizer=37.0).grads
    assert made == [1 / 37]
    for a, b in zip(once, expected, strict=True):
        assert (a.double() - b).norm() <= 2**-8 * b.norm()
    assert all(torch.equal(a, b) for a, b in zip(gradients(1.0), once, strict=True))  # of a graph that was kept
    assert all(torch.equal(a, 0.25 * b) for a, b in zip(gradients(0.25), once, strict=True))
    for a, b in zip(gradients(3.0), expected, strict=True):
        assert (a.double() - 3 * b).norm() <= 2**-8 * (3 * b).norm()


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("head", [{}, {"softcap": 3.0, "with_bias": True, "temperature": 0.8}], ids=["plain", "all"])
@pytest.mark.parametrize("shape", [(70, 5003, 300), (300, 2561, 33), (40, 257, 16), (1, 1, 1)])
def test_every_product_of_bf16_operands_goes_through_the_same_loop(shape, head, products, monkeypatch):
    monkeypatch.setattr(operands, "_best_products", lambda: products)
    case = make_case(*shape, dtype=torch.bfloat16, **head)
    expected = oracle(case, EVERYTHING)
    for megabytes in (0.2, 4):  # logits in d_weight and computed again; in a buffer too
        with hostile_memory(), tk.budget_mb(megabytes):
            found = run(case, EVERYTHING, "cpu")
        assert_same_result(found, expected, torch.bfloat16)


def test_a_bf16_gradient_of_an_fp32_weight_is_not_rounded():
    case = make_case(80, 2001, 40, dtype=torch.float32)
    expected = run(case.to(torch.bfloat16), EVERYTHING, "reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(case, EVERYTHING, "cpu")
    d_weight = found.grads[1]
    assert d_weight.dtype == torch.float32
    assert (d_weight != d_weight.bfloat16().float()).any()
    assert (d_weight - expected.grads[1].float()).abs().max() <= 2e-2 * d_weight.abs().max()


def test_out_of_range_targets_reach_no_memory():
    logits = torch.zeros(2, 5)
    for wrong in (5, -1):
        targets = torch.tensor([0, wrong])
        with pytest.raises(RuntimeError, match=rf"targets must be in \[0, V\); got {wrong} with V=5"):
            ops.row_stats(logits, targets, None, True)
        with pytest.raises(RuntimeError, match=rf"targets must be in \[0, V\); got {wrong} with V=5"):
            ops.panel_stats(torch.zeros(2, 3), torch.zeros(5, 3), None, targets, 1.0, None, True, 0, 64, None, None)


# Instruction sets ------------------------------------------------------------------------------------------------

_PROGRAM = """
import sys; sys.path.insert(0, "tests")
import torch
from kernel_cases import EVERYTHING, TOLERANCE, assert_same_result, make_case, oracle, run
from trapo_kernels.backends.cpu import rows as cpu
print(torch.backends.cpu.get_cpu_capability(), cpu.library().name)
for dtype in TOLERANCE:
    for head in ({}, {"softcap": 3.0, "with_bias": True}):
        for shape in ((0, 7, 3), (5, 1, 4), (33, 1031, 12)):
            case = make_case(*shape, dtype=dtype, **head)
            assert_same_result(run(case, EVERYTHING, "cpu"), oracle(case, EVERYTHING), dtype)
print("agrees")
"""


def python(program, **environment):
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_a_machine_with_less_than_avx512_runs_the_same_source(capability):
    if not (Path(rows.__file__).parents[2] / f"_cpu_{capability}.so").exists():
        pytest.skip(f"not compiled for {capability} on this machine")
    assert python(_PROGRAM, ATEN_CPU_CAPABILITY=capability) == [capability.upper(), f"_cpu_{capability}.so", "agrees"]


# Operators -------------------------------------------------------------------------------------------------------


def _vectors(n):
    return [torch.randn(n) for _ in range(4)]


def test_opcheck_of_every_operator():
    n, vocab, width = 4, 7, 3
    logits, targets = torch.randn(n, vocab), torch.randint(0, vocab, (n,))
    hidden, weight, bias = torch.randn(n, width), torch.randn(vocab, width), torch.randn(vocab)
    logprobs, top, log_sum, entropy = _vectors(n)
    g_lp, g_entropy, *_ = _vectors(n)
    expert = torch.tensor([True, False, True, False])
    keep, references = torch.randn(1, 1, 256, 64), torch.zeros(1, 1, 64)
    stats = (logprobs, top, log_sum, entropy)
    opcheck(ops.row_stats, (logits, targets, None, True))
    opcheck(ops.row_grad_, (logits, targets, *stats, g_lp, g_entropy, 2.0))
    numbers = [1.0, 0.1, 0.1, 0.0, float("inf"), float("inf"), 0.01, 0.0, 0.0]
    opcheck(ops.row_fused_, (logits, targets, expert, g_lp, None, None, None, g_lp, g_lp, 2, 1, numbers, 1.0, None))
    opcheck(ops.panel_stats, (hidden, weight, bias, targets, 1.0, 3.0, True, 0, 64, None, keep))
    head = (hidden, weight, bias, targets, 1.0, None)
    opcheck(ops.panel_mass, (*head, *stats, g_lp, g_entropy, 0, keep, references))
    gradients = (torch.zeros(n, width), torch.zeros(vocab, width), torch.zeros(vocab))
    opcheck(
        ops.panel_grad_,
        (*head, *stats, g_lp, g_entropy, 0, 64, 4, False, keep, references, *gradients, True, True),
    )
