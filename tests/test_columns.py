"""The recomputing backward over blocks of the vocabulary, for every row kernel that is here."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import BACKENDS, DEVICE, HEADS, TOLERANCE, affordable, assert_close, make_case

import trapo_kernels as tk
from trapo_kernels.chunks import columns
from trapo_kernels.head import Head

KERNELS = [name for name in BACKENDS if name != "reference"]


def gradients(case, backend, dtype):
    """Both ways, with random slopes on both outputs: (blocks of columns, the oracle in float64)."""
    generator = torch.Generator().manual_seed(3)
    n = case.targets.shape[0]
    slopes = [torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(2)]
    exact = case.to(torch.float64).requires_grad()
    out = tk.linear_logprobs(
        exact.hidden, exact.weight, exact.targets, bias=exact.bias, entropy=True, backend="reference", **exact.head
    )
    expected = torch.autograd.grad((slopes[0] * out.logprobs + slopes[1] * out.entropy).sum(), exact.params())
    head = Head(**case.head)
    with torch.no_grad():
        kernel = tk.backends()[backend].kernel
        logits = head.scale * (case.hidden @ case.weight.T + (0 if case.bias is None else case.bias))
        stats = kernel.stats(logits, case.targets, head.cap, True).finish()
        wide = stats.logprobs.dtype
        recompute = columns.Recompute(
            kernel, head, case.hidden, case.weight, case.bias, case.targets, stats,
            slopes[0].to(wide), slopes[1].to(wide),
        )  # fmt: skip
        actual = recompute.gradients((True, True, case.bias is not None))
    return [g for g in actual if g is not None], expected


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_oracle_in_blocks_of_any_width(backend, head, dtype):
    if not tk.backends()[backend].available:
        pytest.skip(tk.backends()[backend].missing)
    n = affordable(backend, 20)
    case = make_case(n, 300, dtype=dtype, **HEADS[head])
    case.targets = case.targets.clamp(min=0)
    budget = ((2**21 if DEVICE == "cpu" else 0) + n * dtype.itemsize * 192) / 2**20  # blocks of 128 columns
    with tk.budget_mb(budget):
        assert columns.block_columns(n, 300, dtype.itemsize, DEVICE) == 128
        actual, expected = gradients(case, backend, dtype)
    for name, a, b in zip(("d_hidden", "d_weight", "d_bias"), actual, expected, strict=False):
        assert_close(a, b, TOLERANCE[dtype], name)
        # On a CPU a 16-bit d_hidden is rounded once it is scaled.
        assert a.dtype == dtype or name == "d_bias" or (name == "d_hidden" and DEVICE == "cpu")


@pytest.mark.parametrize("rows", [1, 40, 5_000])
@pytest.mark.parametrize("vocab", [1, 64, 1_000, 151_936])
@pytest.mark.parametrize("megabytes", [4, 64])
def test_blocks_keep_to_the_budget_and_are_even(rows, vocab, megabytes):
    with tk.budget_mb(megabytes):
        step = columns.block_columns(rows, vocab, 2, "cuda")
        assert step % 64 == 0
        assert (step + 64) * rows * 2 <= megabytes * 2**20 or not columns.pays(rows, vocab, 2, "cuda") or step == 64
        blocks = -(-vocab // step)
        assert blocks * step - vocab < 64 * blocks


def test_columns_are_chosen_where_they_move_fewer_bytes():
    assert columns.pays(8_192, 152_064, 2, "cuda")
    assert not columns.pays(200_000, 152_064, 2, "cuda")
    assert not columns.pays(0, 152_064, 2, "cuda")
    with tk.budget_mb(1):
        assert not columns.pays(8_192, 152_064, 2, "cuda")
