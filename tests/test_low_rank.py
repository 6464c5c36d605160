"""Heads with a low-rank adapter have the values and gradients of W + scale · B A, from two GEMMs of the head's size."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from kernel_cases import (
    BACKENDS,
    DTYPES,
    EVERYTHING,
    HEADS,
    STREAMED,
    TOLERANCE,
    affordable,
    assert_close,
    gemms,
    make_case,
    memory,
    slow,
)

import trapo_kernels as tk

SCALE, RANK = 0.5, 3
backends = pytest.mark.parametrize("backend", BACKENDS)


def case_of(backend, n=32, vocab=157, dtype=torch.float64, **head):
    """(case, A, B), whose sum W + scale · B A is the head that the case's log-probabilities are of."""
    case = make_case(affordable(backend, n), vocab, **head)
    g = torch.Generator().manual_seed(7)
    a = torch.randn(RANK, case.hidden.shape[1], generator=g, dtype=torch.float64) / 4
    b = torch.randn(vocab, RANK, generator=g, dtype=torch.float64) / 2
    case = replace(case, weight=case.weight.detach() - SCALE * b @ a).to(dtype)
    return case, a.to(dtype), b.to(dtype)


def merged(case, a, b):
    """(parameters in float64 with gradients; the weight that they make)."""
    exact = [t.detach().double().requires_grad_() for t in (case.hidden, a, b)]
    return exact, case.weight.detach().double() + SCALE * exact[2] @ exact[1]


def loss_of(case, hidden, weight, objective, backend, bias=None, **options):
    arguments = {**case.inputs, **case.head, **options}
    return tk.linear_policy_loss(hidden, weight, case.targets, objective, bias=bias, backend=backend, **arguments)


def heads_and_backends():
    """All; where a row takes 10 ms, the head with options is in the slow suite, as test_conformance.py has it."""
    for head, backend in product(("plain", "all"), BACKENDS):
        marks = [pytest.mark.slow] if slow(backend) and head == "all" else []
        yield pytest.param(head, backend, marks=marks, id=f"{head}-{backend}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head", "backend"), heads_and_backends())
def test_a_loss_and_its_gradients_are_those_of_the_merged_head(backend, dtype, head):
    case, a, b = case_of(backend, dtype=dtype, **HEADS[head])
    params = [t.detach().requires_grad_() for t in (case.hidden, a, b)]
    bias = None if case.bias is None else case.bias.detach()
    out = loss_of(case, params[0], case.weight.detach(), EVERYTHING, backend, bias, lora=(*params[1:], SCALE))
    out.loss.backward()
    exact, weight = merged(case, a, b)
    right = loss_of(case, exact[0], weight, EVERYTHING, "reference", None if bias is None else bias.double())
    right.loss.backward()
    for name in ("loss", "logprobs", "entropy"):
        assert_close(getattr(out, name), getattr(right, name), TOLERANCE[dtype], name, floor=1.0)
    for name, found, want in zip(("hidden", "A", "B"), params, exact, strict=True):
        assert found.grad.dtype == dtype
        assert_close(found.grad, want.grad, TOLERANCE[dtype], name)


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adapters_of_float32_beside_16_bits_get_gradients_that_are_not_rounded(backend, dtype):
    case, a, b = case_of(backend, dtype=dtype)
    params = [case.hidden.detach().requires_grad_(), a.float().requires_grad_(), b.float().requires_grad_()]
    loss_of(
        case, params[0], case.weight.detach(), tk.Objective.sft(), backend, lora=(*params[1:], SCALE)
    ).loss.backward()
    exact, weight = merged(case, a, b)
    loss_of(case, exact[0], weight, tk.Objective.sft(), "reference").loss.backward()
    for name, found, want in zip(("hidden", "A", "B"), params, exact, strict=True):
        assert found.grad.dtype == found.dtype
        assert_close(found.grad, want.grad, TOLERANCE[dtype], name)
    if backend in STREAMED:
        assert not torch.equal(params[2].grad, params[2].grad.to(dtype).float())


@backends
@pytest.mark.parametrize("options", ["plain", "per token", "support"])
def test_logprobs_and_entropies_have_the_gradients_of_the_merged_head(backend, options):
    case, a, b = case_of(backend)
    params = [t.detach().requires_grad_() for t in (case.hidden, a, b)]
    more = {}
    if options == "per token":
        more["temperature"] = torch.linspace(0.5, 2, len(case.targets), dtype=torch.float64)
    if options == "support":
        more["support"] = torch.stack([case.targets.clamp(min=0), torch.full_like(case.targets, 5)], -1)
    weights = torch.linspace(-1, 1, len(case.targets), dtype=torch.float64)

    def total(hidden, weight, backend, **lora):
        found = tk.linear_logprobs(hidden, weight, case.targets, entropy=True, backend=backend, **more, **lora)
        return (weights * (found.logprobs + 0.3 * found.entropy)).sum()

    value = total(params[0], case.weight.detach(), backend, lora=(*params[1:], SCALE))
    exact, weight = merged(case, a, b)
    right = total(exact[0], weight, "reference")
    assert_close(value, right, 1e-11, "value", floor=1.0)
    value.backward()
    right.backward()
    for found, want in zip(params, exact, strict=True):
        assert_close(found.grad, want.grad, 1e-11, "gradient")


@pytest.mark.parametrize("name", ["gspo", "asft", "sed"])
@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_objectives_of_two_passes_and_of_a_reference_head_take_an_adapter(backend, name):
    if backend not in BACKENDS:
        pytest.skip(f"no backend {backend} here")
    case, a, b = case_of(backend)
    params = [t.detach().requires_grad_() for t in (case.hidden, a, b)]
    objective = getattr(tk.Objective, name)()
    more = {"sequence_ids": torch.arange(len(case.targets)) // 8}
    if name == "asft":
        more |= {"ref_hidden": case.hidden.detach() * 0.5, "ref_weight": case.weight.detach()}
    out = loss_of(case, params[0], case.weight.detach(), objective, backend, lora=(*params[1:], SCALE), **more)
    out.loss.backward()
    exact, weight = merged(case, a, b)
    right = loss_of(case, exact[0], weight, objective, "reference", **more)
    right.loss.backward()
    assert_close(out.loss, right.loss, 1e-11, "loss")
    for found, want in zip(params, exact, strict=True):
        assert_close(found.grad, want.grad, 1e-10, "gradient")


@backends
def test_a_weight_that_is_not_frozen_has_its_gradient_too(backend):
    case, a, b = case_of(backend)
    params = [t.detach().requires_grad_() for t in (case.hidden, case.weight, a, b)]
    loss_of(case, *params[:2], tk.Objective.sft(), backend, lora=(*params[2:], SCALE)).loss.backward()
    exact = [t.detach().double().requires_grad_() for t in params]
    loss_of(case, exact[0], exact[1] + SCALE * exact[3] @ exact[2], tk.Objective.sft(), "reference").loss.backward()
    for found, want in zip(params, exact, strict=True):
        assert_close(found.grad, want.grad, 1e-11, "gradient")


@pytest.mark.parametrize("backend", STREAMED)
def test_rows_that_do_not_count_may_hold_anything(backend):
    case, a, b = case_of(backend)
    hidden = case.hidden.detach().clone()
    hidden[(case.targets < 0) | ~case.inputs["mask"]] = torch.nan
    params = [hidden.requires_grad_(), a.requires_grad_(), b.requires_grad_()]
    loss_of(case, hidden, case.weight.detach(), EVERYTHING, backend, lora=(*params[1:], SCALE)).loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in params)


@pytest.mark.parametrize("backend", STREAMED)
def test_a_frozen_head_costs_two_gemms_and_no_copy_of_its_size(backend):
    case = make_case(64, 4096, width=64, dtype=torch.float32)
    a, b = torch.zeros(2, 64).requires_grad_(), torch.randn(4096, 2).requires_grad_()
    hidden, weight = case.hidden.detach().requires_grad_(), case.weight.detach()

    def step():
        out = tk.linear_policy_loss(hidden, weight, case.targets, tk.Objective.sft(), lora=(a, b, 1.0), backend=backend)
        out.loss.backward()

    active = int((case.targets >= 0).sum())
    assert 2 * active / 64 <= gemms(step, case) <= 2.2  # three of width 2 beside two of width 64
    with tk.budget_mb(1):
        assert memory(step).largest < weight.numel() * 4


def test_a_compiled_loss_takes_an_adapter():
    case, a, b = case_of("torch", dtype=torch.float32)
    params = [t.detach().requires_grad_() for t in (case.hidden, a, b)]

    def loss(hidden, a, b):
        return tk.linear_policy_loss(
            hidden, case.weight.detach(), case.targets, tk.Objective.sft(), lora=(a, b, SCALE), backend="torch"
        ).loss

    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*params), params)
    for each, want in zip(found, torch.autograd.grad(loss(*params), params), strict=True):
        assert_close(each, want, 1e-5, "gradient")


A, B, H, W = torch.zeros(2, 4), torch.zeros(6, 2), torch.zeros(3, 4), torch.zeros(6, 4)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ((A, B), r"lora must be \(A \[r, D\], B \[V, r\], scale\); got"),
        (A, r"lora must be \(A \[r, D\], B \[V, r\], scale\); got a tensor of shape \[2, 4\]"),
        ((A, B, "1"), "lora's scale must be a finite number; got '1'"),
        ((A, B, float("nan")), "lora's scale must be a finite number; got nan"),
        ((A.T, B, 1.0), r"lora must have A \[r, 4\] and B \[6, r\] with r >= 1; got \[4, 2\] and \[6, 2\]"),
        ((A[:0], B[:, :0], 1.0), r"lora must have A \[r, 4\] and B \[6, r\] with r >= 1; got \[0, 4\] and \[6, 0\]"),
        ((A.half(), B, 1.0), "lora's A must have the dtype of hidden, or 32 bits beside 16; got torch.float16 with"),
    ],
)
def test_what_is_no_adapter_of_the_head_is_named(lora, message):
    with pytest.raises((TypeError, ValueError), match="linear_logprobs: " + message):
        tk.linear_logprobs(H, W, torch.zeros(3, dtype=torch.int64), lora=lora)


def test_an_adapter_does_not_go_with_a_gradient_that_is_added_to_the_weights():
    with pytest.raises(ValueError, match="linear_policy_loss: lora must be None where weight_grad is given; got both"):
        tk.linear_policy_loss(
            H, W, torch.zeros(3, dtype=torch.int64), tk.Objective.sft(), lora=(A, B, 1.0), weight_grad=torch.zeros(6, 4)
        )
