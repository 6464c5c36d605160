"""Memory that nobody wrote: what fresh buffers are full of, and what lies beside a row of logits, changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hostile_memory import fresh_memory_is_nan, hostile_memory
from kernel_cases import (
    DTYPES,
    EVERYTHING,
    HEADS,
    STREAMED,
    TOLERANCE,
    affordable,
    assert_close,
    assert_same_result,
    make_case,
    oracle,
    run,
)
from test_divergence import KINDS, Pair, same

import trapo_kernels as tk
from trapo_kernels.chunks.buffers import logits_buffer, row_bytes

backends = pytest.mark.parametrize("backend", STREAMED)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
kinds = pytest.mark.parametrize("kind", KINDS)

LCO = tk.Objective(expert="lco_mse", policy="clip", entropy_coef=0.02)


def logprobs(case, backend, entropy=True):
    case = case.to(case.hidden.dtype).requires_grad()
    out = tk.linear_logprobs(
        case.hidden, case.weight, case.targets, bias=case.bias, entropy=entropy, backend=backend, **case.head
    )
    value = (out.logprobs + out.entropy).sum()
    return [out.logprobs, out.entropy, *torch.autograd.grad(value, case.params())]


def test_the_guard_sees_what_is_not_zero_beside_a_row():
    with hostile_memory() as watched:
        assert torch.empty(3).isnan().all()
        buffer = logits_buffer(5, 997, torch.bfloat16, torch.device("cpu"))
        buffer.fill_(1)
        torch.mm(buffer[:3], torch.ones(997, 2, dtype=torch.bfloat16))
        torch.mm(buffer.t(), torch.ones(5, 2, dtype=torch.bfloat16))
        assert watched.padded == 2
        with pytest.raises(AssertionError, match="are followed by"):
            torch.mm(torch.empty(5, 1024, dtype=torch.bfloat16)[:, :997], torch.ones(997, 2, dtype=torch.bfloat16))


@dtypes
@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 50257])
def test_rows_start_at_multiples_of_128_bytes_and_their_padding_is_zero(vocab, dtype):
    with fresh_memory_is_nan():
        buffer = logits_buffer(3, vocab, dtype, torch.device("cpu"))
    assert buffer.shape == (3, vocab)
    assert buffer.stride(0) * dtype.itemsize == row_bytes(vocab, dtype)
    assert row_bytes(vocab, dtype) % 128 == 0
    assert 0 <= row_bytes(vocab, dtype) - vocab * dtype.itemsize < 128
    beside = buffer.as_strided((3, buffer.stride(0) - vocab), (buffer.stride(0), 1), vocab)
    assert not beside.any()


@backends
@dtypes
@pytest.mark.parametrize("megabytes", [0.02, 64])
def test_losses_and_logprobs_are_right(backend, dtype, megabytes):
    case = make_case(affordable(backend, 100), 997, dtype=dtype, with_bias=True)
    expected = oracle(case, EVERYTHING)
    values = logprobs(case.to(torch.float64), "reference")
    with tk.budget_mb(megabytes), hostile_memory() as watched:
        actual, found = run(case, EVERYTHING, backend), logprobs(case, backend)
    assert_same_result(actual, expected, dtype)
    for a, b in zip(found, values, strict=True):
        assert_close(a, b, TOLERANCE[dtype], "logprobs", floor=1.0)
    # Chunks of bf16 logits go through products as they are, but those of the CPU's panels, which are nobody else's.
    assert watched.padded or dtype != torch.bfloat16 or megabytes != 64 or backend == "cpu"


@backends
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("objective", [EVERYTHING, LCO, tk.Objective.sft(reduction="sequence_mean")], ids=str)
def test_every_head_and_every_way_through_the_stream_is_right(backend, head, objective):
    case = make_case(affordable(backend, 40), 257, dtype=torch.bfloat16, **HEADS[head])
    options = {"sequence_ids": torch.arange(case.targets.numel()) // 4}
    expected = oracle(case, objective, **options)
    with hostile_memory():
        actual = run(case, objective, backend, **options)
    assert_same_result(actual, expected, torch.bfloat16)


@backends
def test_logits_far_below_zero_are_right(backend):
    case = make_case(affordable(backend, 40), 257, dtype=torch.float32, with_bias=True)
    with torch.no_grad():
        case.bias -= 2000.0  # e^2000, in columns that nobody reads, would be infinite
    expected = logprobs(case.to(torch.float64), "reference")
    with hostile_memory():
        found = logprobs(case, backend)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 1e-3, "logprobs", floor=1.0)


@kinds
@dtypes
@pytest.mark.parametrize("megabytes", [0.05, 64])
def test_divergences_are_right(kind, dtype, megabytes):
    pair = Pair(60, 257, dtype)
    expected = pair.double().run("reference", kind)
    with tk.budget_mb(megabytes), hostile_memory() as watched:
        actual = pair.run("torch", kind)
    same(actual, expected, dtype)
    assert watched.padded


def test_sparse_gradients_are_right():
    case = make_case(100, 997, dtype=torch.float32, with_bias=True)
    plain = run(case, EVERYTHING, "cpu", grad_tolerance=0.01)
    with hostile_memory():
        actual = run(case, EVERYTHING, "cpu", grad_tolerance=0.01)
    assert all(torch.equal(a, b) for a, b in zip(actual.grads, plain.grads, strict=True))


@backends
@dtypes
def test_losses_from_logits_are_right(backend, dtype):
    torch.manual_seed(0)
    logits, targets = torch.randn(20, 997).to(dtype), torch.randint(0, 997, (20,))

    def step(logits, backend):
        logits = logits.clone().requires_grad_()
        loss = tk.policy_loss_from_logits(logits, targets, tk.Objective.sft(), backend=backend).loss
        return [loss, *torch.autograd.grad(loss, logits)]

    expected = step(logits.double(), "reference")
    with tk.budget_mb(0.02), hostile_memory():
        actual = step(logits, backend)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, TOLERANCE[dtype], "loss")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("subject", ["conformance", "columns", "divergence", "terms", "autograd", "sparse"])
def test_whole_suites_pass_on_hostile_memory(subject):
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "hostile_memory", str(here / f"test_{subject}.py")]
    command += ["-k", "not one_graph"]  # torch.compile refuses the dispatch mode that fills memory
    paths = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
