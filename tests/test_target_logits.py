"""The target's logit in fp32 beside logits of 16 bits: the product, what it costs, and the statistics that take it."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import STREAMED, make_case, memory, policy_loss

import trapo_kernels as tk
from trapo_kernels.backends.base import RowState
from trapo_kernels.chunks import products

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def verb_of(backend):
    assert tk.backends()[backend].available
    return tk.backends()[backend].kernel.target_logits


@HALF
@pytest.mark.parametrize("backend", STREAMED)
@pytest.mark.parametrize(("n", "vocab", "width"), [(1, 1, 1), (5, 7, 3), (6, 40, 1030), (4, 33, 2048)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_backend_gives_the_product_that_float64_gives(backend, dtype, n, vocab, width, with_bias):
    case = make_case(n, vocab, width, dtype=dtype, with_bias=with_bias)
    hidden, weight = case.hidden.detach(), case.weight.detach()
    targets = torch.arange(n) % vocab
    found = verb_of(backend)(hidden, weight, case.bias, targets, 1.5)
    terms = hidden.double() * weight.double()[targets]
    bias = 0 if case.bias is None else case.bias.detach().double()[targets]
    assert found.dtype == torch.float32
    assert ((found.double() - 1.5 * (terms.sum(1) + bias)).abs() <= 1e-6 * (1 + terms.abs().sum(1))).all()


@pytest.mark.parametrize("backend", STREAMED)
def test_rows_may_lie_in_any_way_and_targets_outside_of_the_vocabulary_read_nothing(backend):
    wide = torch.randn(2, 9, 70).bfloat16()
    verb = verb_of(backend)
    targets = torch.tensor([3, 9, -100, 0, 8])
    for hidden, weight in (
        (wide[0, :5, 1:66], wide[1, :, 3:68]),
        (wide[0, :5, :65], wide[1].t().contiguous().t()[:, :65]),
        (wide[0, ::2, :65], wide[1, :, :65]),
    ):
        found = verb(hidden, weight, None, targets, 1.0)
        known = torch.tensor([0, 3, 4])
        right = (hidden.double()[known] * weight.double()[targets[known]]).sum(1)
        assert (found[known].double() - right).abs().max() < 1e-4


@HALF
def test_it_takes_a_block_of_rows_at_a_time(dtype):
    n, vocab, width = 700, 50, 4096
    hidden, weight, targets = (
        torch.randn(n, width).to(dtype),
        torch.randn(vocab, width).to(dtype),
        torch.arange(n) % vocab,
    )
    used = memory(lambda: products.target_logits(hidden, weight, None, targets, 1.0))
    assert n * width * 6 > 8 * products.WIDE_BYTES
    assert used.peak <= products.WIDE_BYTES + 16 * n


@pytest.mark.parametrize("entropy", [False, True])
def test_a_state_takes_a_target_that_was_not_rounded(entropy):
    """Of logits as they are, from the state of the same logits with another number in the target's column."""
    g = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(4000, 6, generator=g, dtype=torch.float64)
    targets = torch.randint(0, 6, (4000,), generator=g)
    rows = torch.arange(4000)
    logits[rows[::3], targets[::3]] += 10 ** (2 * torch.rand(1334, generator=g, dtype=torch.float64))  # it leads
    logits[:40, 0] = logits[:40].amax(1)  # ties
    logits[40:60, 1] = -torch.inf
    logits[60:70].fill_(-torch.inf)
    logits[70:75, 2], logits[75:80, 3] = torch.nan, torch.inf
    read = logits.clone()
    read[rows, targets] += (torch.rand(4000, generator=g, dtype=torch.float64) - 0.5) * 0.2

    def state(z):
        top, column = z.max(1)
        below = z - top[:, None]
        e = below.exp().scatter(1, column[:, None], 0)
        dot = (e * below.clamp(min=-1e4)).sum(1)
        return RowState(top, e.sum(1), dot if entropy else None, z[rows, targets])

    found = state(read).with_target(logits[rows, targets]).finish()
    right = state(logits).finish()
    for name in ("logprobs", "target_logits", *(["entropy"] if entropy else [])):
        a, b = getattr(found, name), getattr(right, name)
        assert torch.equal(a.isnan(), b.isnan()), name
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12, equal_nan=True), name
    leads = (right.logprobs > -1e-6) & (right.logprobs < 0)
    assert leads.sum() > 300
    relative = (found.logprobs[leads] / right.logprobs[leads] - 1).abs()
    assert relative.max() < 1e-12


def test_a_logit_that_rounding_moved_further_than_an_exponential_reaches_stays_a_number():
    hidden = torch.tensor([[1.0, 1.0]]).bfloat16()
    weight = torch.tensor([[1e6, -1900.0], [9e5, 0.0]]).bfloat16()  # bf16 has steps of 4,096 there
    for backend in STREAMED:
        out = tk.linear_policy_loss(
            hidden, weight.clone().requires_grad_(), torch.tensor([0]), tk.Objective.sft(), backend=backend
        )
        assert out.logprobs.item() == 0, backend
        assert torch.autograd.grad(out.loss, out.loss.grad_fn.next_functions[1][0].variable)[0].isfinite().all()


@pytest.mark.parametrize("backend", STREAMED)
def test_a_ratio_to_log_probabilities_of_the_same_policy_is_one(backend):
    """fp16, since Triton's interpreter does not round bf16 to nearest. Of another class a sum may be rounded the other
    way still, where kernels add in different orders."""
    case = make_case(10, 400, 64, dtype=torch.float16)
    case.targets = case.targets.clamp(min=0)
    with torch.no_grad():
        old = tk.linear_logprobs(case.hidden * 8, case.weight, case.targets, backend=backend).logprobs
    case.hidden = (case.hidden.detach() * 8).requires_grad_()
    case.inputs = {"advantages": torch.ones(10), "old_logprobs": old}
    out = policy_loss(case, tk.Objective.grpo(), backend)
    assert (out.logprobs - old).abs().median() < 1e-5
