"""The row kernels alone, with pytest-benchmark: `make bench-rows`."""

from __future__ import annotations

import pytest
import torch

from trapo_kernels.backends.base import RowInputs
from trapo_kernels.backends.dispatch import backends
from trapo_kernels.objective import Objective

ROWS, VOCAB = 64, 49152
BACKENDS = [name for name in ("cpu", "torch") if backends()[name].available]

pytestmark = [
    pytest.mark.parametrize("backend", BACKENDS),
    pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"]),
]


def rows(dtype):
    g = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, VOCAB, generator=g).to(dtype), torch.randint(0, VOCAB, (ROWS,), generator=g)


@pytest.mark.parametrize("entropy", [False, True], ids=["logprob", "logprob+entropy"])
def test_stats(benchmark, backend, dtype, entropy):
    kernel = backends()[backend].kernel
    logits, targets = rows(dtype)
    benchmark(kernel.stats, logits, targets, None, entropy)


@pytest.mark.parametrize("entropy", [False, True], ids=["logprob", "logprob+entropy"])
def test_grad(benchmark, backend, dtype, entropy):
    kernel = backends()[backend].kernel
    logits, targets = rows(dtype)
    stats = kernel.stats(logits, targets, None, True).finish()
    slope = torch.full((ROWS,), -1.0)
    # In place on its own result from the second time on: the work does not depend on the values.
    benchmark(kernel.grad_, logits, targets, stats, slope, slope if entropy else None, None)


def test_fused(benchmark, backend, dtype):
    kernel = backends()[backend].kernel
    if kernel.fused_ is None:
        pytest.skip(f"{backend} has no fused_")
    logits, targets = rows(dtype)
    inputs = RowInputs(torch.arange(ROWS) % 3 == 0, torch.ones(ROWS), None, None, None)
    terms = Objective.trapo(entropy_coef=0.001).fused()
    benchmark(kernel.fused_, logits, targets, inputs, terms, 1.0, None)
