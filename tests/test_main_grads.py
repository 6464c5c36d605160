"""Gradients of the head that are added to a tensor of the caller's, as weight.grad, instead of handed over."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import BACKENDS, EVERYTHING, STREAMED, TOLERANCE, affordable, assert_close, make_case, memory

import trapo_kernels as tk

OBJECTIVES = {
    "one pass": EVERYTHING,
    "weights of sequences": tk.Objective.trapo(reduction="sequence_mean", entropy_coef=0.01),
    "the target's logit": tk.Objective(expert="lco_mse", policy="clip", entropy_coef=0.02),
    "two passes": tk.Objective.gspo(clip_low=0.1, clip_high=0.2),
}


def loss(case, objective, backend, weight_grad=None, **options):
    ids = torch.arange(len(case.targets)) // 4
    return tk.linear_policy_loss(
        case.hidden, case.weight, case.targets, objective, bias=case.bias, backend=backend, sequence_ids=ids,
        weight_grad=weight_grad, **{**case.inputs, **case.head, **options},
    )  # fmt: skip


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_added_is_the_gradient_and_nothing_else_changes(name, dtype, backend):
    case = make_case(affordable(backend, 20), 120, dtype=dtype, with_bias=True, temperature=0.8)
    before = torch.randn(120, 16, generator=torch.Generator().manual_seed(2)).to(wide(dtype))
    with tk.budget_mb(0.02):  # several chunks
        for hand in ("handed over", "added"):
            into = before.clone() if hand == "added" else None
            out = loss(case, OBJECTIVES[name], backend, into)
            grads = torch.autograd.grad(out.loss, case.params(), allow_unused=into is not None)
            if into is None:
                expected, values = grads, out
    assert grads[1] is None
    tolerance = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    assert_close(out.loss, values.loss, 0, "loss")
    assert_close(grads[0], expected[0], tolerance, "d_hidden")
    assert_close(
        into - before, expected[1].to(into.dtype), tolerance, "d_weight", floor=4.0 if dtype.itemsize > 2 else 1e-3
    )
    assert_close(grads[2], expected[2], tolerance, "d_bias")


@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_add_up_to_the_batch_in_weight_grad(backend):
    case = make_case(affordable(backend, 24), 90, dtype=torch.float32)
    n = len(case.targets)
    options = {"normalizer": torch.tensor(7.0)}
    whole = torch.autograd.grad(loss(case, EVERYTHING, backend, **options).loss, case.params())
    case.weight.grad = torch.zeros_like(case.weight)
    kept = case.weight.grad
    for rows in (slice(0, n // 2), slice(n // 2, n)):
        part = make_case(1, 90, dtype=torch.float32)
        part.hidden, part.weight, part.targets = case.hidden[rows], case.weight, case.targets[rows]
        part.inputs = {k: v[rows] for k, v in case.inputs.items()}
        loss(part, EVERYTHING, backend, case.weight.grad, **options).loss.backward()
    assert case.weight.grad is kept
    assert_close(kept, whole[1], 1e-5, "d_weight")
    assert_close(case.hidden.grad, whole[0], 1e-5, "d_hidden")


@pytest.mark.parametrize("backend", [name for name in STREAMED if name != "cuda-on-cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_tensor_of_its_size_is_made(backend, dtype):
    n, vocab, width, budget = 64, 20011, 64, 2
    hidden = torch.randn(n, width).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width).requires_grad_()  # fp32, whatever it is multiplied in
    targets, into = torch.randint(0, vocab, (n,)), torch.zeros(vocab, width)
    objective = tk.Objective.trapo(entropy_coef=0.01)

    def step(weight_grad):
        tk.linear_policy_loss(
            hidden, weight, targets, objective, advantages=torch.ones(n), backend=backend, weight_grad=weight_grad
        ).loss.backward()

    with tk.budget_mb(budget):
        added, handed = memory(lambda: step(into)).peak, memory(lambda: step(None)).peak
    cast = 0 if dtype == torch.float32 else 2 * vocab * width  # the weight in the dtype of the products
    slack = budget * 2**20 + 40 * n * 8 + n * width * 16 + 2**18
    assert added <= cast + slack < 4 * vocab * width + cast
    assert handed >= 4 * vocab * width


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_that_is_not_trained_adds_nothing(backend):
    case = make_case(6, 40, dtype=torch.float32)
    into = torch.zeros(40, 16)
    case.weight.requires_grad_(False)
    torch.autograd.grad(loss(case, EVERYTHING, backend, into).loss, case.hidden)
    case.weight.requires_grad_(True)
    with torch.no_grad():
        loss(case, EVERYTHING, backend, into)
    assert not into.any()


def test_the_anchor_of_a_reference_is_added_too():
    case = make_case(20, 60, dtype=torch.float32)
    for backend in ("torch", "reference"):
        into = torch.zeros(60, 16)
        ref = {"ref_hidden": case.hidden.detach() * 0.5, "ref_weight": case.weight.detach()}
        right = torch.autograd.grad(loss(case, tk.Objective.asft(), backend, **ref).loss, case.weight)[0]
        loss(case, tk.Objective.asft(), backend, into, **ref).loss.backward()
        assert case.weight.grad is None
        assert_close(into, right, 1e-5, "d_weight")


def test_another_factor_than_one_is_refused():
    case = make_case(6, 40, dtype=torch.float32)
    into = torch.zeros(40, 16)
    out = loss(case, EVERYTHING, "torch", into)
    with pytest.raises(RuntimeError, match=r"with weight_grad the gradient of the loss must be 1; got 0\.5"):
        (out.loss * 0.5).backward()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(40, 15), r"weight_grad must be float32 \[40, 16\] as weight; got float32 \[40, 15\]"),
        (torch.zeros(40, 16).double(), r"must be float32 \[40, 16\] as weight; got float64 \[40, 16\]"),
        (torch.zeros(16, 40).t(), r"must be contiguous and require no grad; got strides \[1, 40\]"),
        (torch.zeros(40, 16, requires_grad=True), "got one that requires grad"),
    ],
)
def test_what_cannot_hold_the_gradient_is_refused(wrong, message):
    case = make_case(6, 40, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        loss(case, EVERYTHING, "torch", wrong)
