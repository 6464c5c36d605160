"""Memory by the allocator's own count: temporaries inside operators included, the clock and the machine not."""

from __future__ import annotations

import functools
from itertools import product

import pytest
import torch
from kernel_cases import EVERYTHING, STREAMED, make_case, memory, policy_loss

import trapo_kernels as tk

# Chunks are the stream's; on fibers these sizes take minutes and the device's own memory would count.
backends = pytest.mark.parametrize("backend", [name for name in STREAMED if name != "cuda-on-cpu"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])

N, V, D = 400, 20011, 24
MB = 2**20


def loss_step(case, backend):
    def step():
        policy_loss(case, EVERYTHING, backend).loss.backward()

    return step


def logprobs_step(case, backend):
    def step():
        out = tk.linear_logprobs(
            case.hidden, case.weight, case.targets, bias=case.bias, entropy=True, backend=backend, **case.head
        )
        (out.logprobs.sum() + out.entropy.sum()).backward()

    return step


@functools.cache
def large_case(**head):
    """In float64, to be taken in other dtypes: drawing it takes longer than most of what is done with it."""
    return make_case(N, V, D, **head)


STEPS = {"loss": loss_step, "logprobs": logprobs_step}
OPTIONS = {"plain": {}, "softcap": {"softcap": 5.0, "with_bias": True}}


def steps_heads_and_budgets():
    """All; here those in which each meets each of the others, and the rest in the slow suite."""
    for (i, step), (j, head), (k, budget) in product(enumerate(STEPS), enumerate(OPTIONS), enumerate((7, 12))):
        marks = [pytest.mark.slow] if (i + j + k) % 2 else []
        yield pytest.param(step, OPTIONS[head], budget, marks=marks, id=f"{step}-{head}-{budget}")


def gradient_bytes(case):
    """Accumulated in fp32 (fp64), handed over in the parameters' dtype."""
    wide = 8 if case.hidden.dtype == torch.float64 else 4
    return sum(p.numel() * (p.element_size() + (wide if p.element_size() < wide else 0)) for p in case.params())


@pytest.mark.parametrize("step", STEPS)
def test_the_counter_catches_the_backend_that_materialises(step):
    case = make_case(N, V, D, dtype=torch.float32)
    # Three in four tokens are active.
    assert memory(STEPS[step](case, "reference")).largest >= N * V * 4 * 3 // 4


@backends
@dtypes
@pytest.mark.parametrize(("step", "head", "budget"), steps_heads_and_budgets())
def test_temporaries_keep_to_the_budget_and_are_never_tokens_by_vocabulary(backend, dtype, step, head, budget):
    case = large_case(**head).to(dtype).requires_grad()
    assert N * V * case.hidden.element_size() > 15 * MB
    with tk.budget_mb(budget):
        used = memory(STEPS[step](case, backend))
    assert used.largest < budget * MB
    vectors = 40 * N * 8 + N * D * 16
    assert used.peak <= budget * MB + gradient_bytes(case) + 12 * V + vectors
    # The bound would be idle if the stream used a fraction of the budget. What is computed again panel by panel keeps
    # nothing that could fill one.
    if (backend, step) != ("cpu", "logprobs") or dtype == torch.float64:
        assert used.peak > 0.5 * budget * MB


@backends
def test_forward_only_allocates_no_gradients(backend):
    case = make_case(N, V, D, dtype=torch.float32)
    with tk.budget_mb(7), torch.no_grad():
        for forward in (
            lambda: policy_loss(case, EVERYTHING, backend),
            lambda: tk.linear_logprobs(case.hidden, case.weight, case.targets, entropy=True, backend=backend),
        ):
            assert memory(forward).peak <= 7 * MB + 60 * N * 8


@backends
def test_memory_does_not_grow_with_the_number_of_tokens(backend):
    def extra(n):
        case = make_case(n, V, D, dtype=torch.float32)
        with tk.budget_mb(7):
            return memory(loss_step(case, backend)).peak - gradient_bytes(case)

    # Vectors, and copies of hidden states, of which one may be padded to 64 columns.
    assert extra(4 * N) - extra(N) < 3 * N * (400 + 64 * 4)


@backends
@dtypes
def test_losses_from_logits_make_nothing_of_their_size_but_their_gradient(backend, dtype):
    logits = torch.randn(N, V).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,))
    objective = tk.Objective.trapo(entropy_coef=0.01)
    size = logits.numel() * logits.element_size()

    def step():
        tk.policy_loss_from_logits(
            logits, targets, objective, advantages=torch.ones(N), backend=backend
        ).loss.backward()

    with tk.budget_mb(12):
        used = memory(step)
    assert used.peak <= size + 12 * MB + 60 * N * 8
