"""Losses under sampling masks: every token's distribution is that over the ids that its engine left."""

from __future__ import annotations

import re

import pytest
import torch
from kernel_cases import BACKENDS, TOLERANCE, affordable, assert_close, make_case, memory, slow

import trapo_kernels as tk

backends = pytest.mark.parametrize("backend", BACKENDS)
OBJECTIVE = tk.Objective(
    clip_low=0.2, clip_high=0.28, dual_clip=3.0, entropy_coef=0.05, kl_coef=0.1, tis_cap=2.0, expert="sft"
)


def case_of(backend, k, dtype=torch.float32, vocab=157, **head):
    """(case, ids [n, k]: the target at a random place, of some tokens fewer ids, of expert tokens none)."""
    case = make_case(affordable(backend, 24), vocab, dtype=dtype, **head)
    g = torch.Generator().manual_seed(4)
    n = len(case.targets)
    ids = torch.stack([torch.randperm(vocab, generator=g)[:k] for _ in range(n)])
    at = torch.randint(0, k, (n,), generator=g)
    ids = ids.masked_fill(ids == case.targets[:, None], 0)
    ids.masked_fill_((torch.rand(n, k, generator=g) < 0.3) & (torch.arange(k) != at[:, None]), -1)
    ids[torch.arange(n), at] = case.targets.clamp(min=0)
    return case, ids.masked_fill(case.inputs["expert_mask"][:, None], -1)


def masked_logits(case, ids):
    """Logits [n, V] in float64 of parameters with gradients, −inf outside of each token's ids."""
    exact = case.to(torch.float64).requires_grad()
    z = (exact.hidden @ exact.weight.T + (0 if exact.bias is None else exact.bias)) * case.head.get("logit_scale", 1.0)
    if cap := case.head.get("softcap"):
        z = cap * torch.tanh(z / cap)
    z = z / case.head.get("temperature", 1.0)
    allowed = torch.zeros_like(z, dtype=torch.bool)
    for row, chosen in enumerate(ids.tolist()):
        there = [i for i in chosen if i >= 0]
        allowed[row, there or slice(None)] = True
    return exact.params(), z.masked_fill(~allowed, -torch.inf)


HEADS = {"plain": {}, "all": {"with_bias": True, "temperature": 1.7, "logit_scale": 1.5, "softcap": 3.0}}


@backends
@pytest.mark.parametrize("k", [1, 6, 40])
@pytest.mark.parametrize("head", HEADS)
def test_a_loss_and_its_gradients_are_those_of_masked_logits(backend, k, head):
    case, ids = case_of(backend, k, **HEADS[head])
    params, z = masked_logits(case, ids)
    log_p = z.log_softmax(1)
    rows, active = torch.arange(len(z)), (case.targets >= 0) & case.inputs["mask"]
    exact_logprobs = torch.where(active, log_p[rows, case.targets.clamp(min=0)], 0)
    entropy = -(log_p.exp() * log_p.masked_fill(z == -torch.inf, 0)).sum(1)
    right = tk.policy_loss_from_logprobs(
        exact_logprobs, OBJECTIVE, entropy=entropy,
        **{**case.inputs, "mask": active},
    )  # fmt: skip
    found = tk.linear_policy_loss(
        case.hidden, case.weight, case.targets, OBJECTIVE, support=ids, bias=case.bias, backend=backend, **case.inputs,
        **case.head,
    )  # fmt: skip
    grads, exact = torch.autograd.grad(found.loss, case.params()), torch.autograd.grad(right.loss, params)
    for a, b in zip(grads, exact, strict=True):
        assert_close(a, b, TOLERANCE[torch.float32], "gradient")
    assert_close(found.logprobs.detach(), exact_logprobs.detach(), TOLERANCE[torch.float32], "logprobs", floor=1.0)
    for name, value in right.metrics.items():
        assert_close(found.metrics[name].detach(), value.detach(), 1e-4, name, floor=1.0)


@backends
def test_log_probabilities_in_a_support_are_what_the_loss_takes_its_ratio_from(backend):
    case, ids = case_of(backend, 6)
    _, z = masked_logits(case, ids)
    at = case.targets.clamp(min=0)
    out = tk.linear_logprobs(case.hidden, case.weight, case.targets, support=ids, entropy=True, backend=backend)
    exact = torch.where(case.targets >= 0, z.log_softmax(1)[torch.arange(len(z)), at], 0)
    assert_close(out.logprobs.detach(), exact.detach(), TOLERANCE[torch.float32], "logprobs", floor=1.0)
    again = tk.linear_policy_loss(
        case.hidden, case.weight, case.targets, tk.Objective.grpo(), support=ids, backend=backend,
        advantages=case.inputs["advantages"], old_logprobs=out.logprobs.detach(),
    )  # fmt: skip
    assert_close(again.metrics["ratio_max"], torch.tensor(1.0), 1e-6, "ratio")
    no_ids = tk.linear_logprobs(
        case.hidden, case.weight, case.targets, support=torch.full_like(ids, -1), entropy=True, backend=backend
    )
    whole = tk.linear_logprobs(case.hidden, case.weight, case.targets, entropy=True, backend=backend)
    for a, b in zip(no_ids, whole, strict=True):
        torch.testing.assert_close(a, b)


def called(**options):
    return lambda h, w, y: tk.linear_policy_loss(
        h, w, y, options.pop("objective", tk.Objective.sft()), **{"support": y[..., None], **options}
    )


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (
            called(support=torch.full((2, 4, 3), 7)),
            "targets must be among the ids of their support; got 8 that are not",
        ),
        (called(support=torch.zeros(2, 4, 3)), "support: ids must be int64; got"),
        (called(support=torch.zeros(2, 3, 3).long()), "support: ids must be [2, 4, K] for the tokens of hidden"),
        (called(support=torch.full((2, 4, 1), 9)), "support: ids must be int64 in [0, V) or -1 for none; got max 9"),
        (called(weight_grad=torch.zeros(9, 6)), "support must be None where weight_grad is given; got both"),
        (called(statistics=["argmax_match"]), "support must be None where statistics is given; got both"),
        (called(grad_tolerance=0.1), "support must be None where grad_tolerance is given; got both"),
        (called(objective=tk.Objective.sed()), "objective must"),
    ],
)
def test_what_does_not_go_with_a_support_is_one_line(call, line):
    h, w, y = torch.randn(2, 4, 6), torch.randn(9, 6), torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises((TypeError, ValueError), match=re.escape(line)) as error:
        call(h, w, y)
    assert "\n" not in str(error.value)


def ragged(ids):
    """(ids [M], offsets [N + 1]) of padded ids [N, K]."""
    there = ids >= 0
    return ids[there], torch.nn.functional.pad(there.sum(1).cumsum(0), (1, 0))


@backends
@pytest.mark.parametrize("head", HEADS)
def test_supports_that_are_not_padded_give_what_padded_ones_do(backend, head):
    case, ids = case_of(backend, 100, **HEADS[head])
    keep = (torch.arange(len(ids)) * 7) % 100 + 1  # sizes of all kinds
    ids = ids.masked_fill((torch.arange(100) >= keep[:, None]) & (ids != case.targets[:, None]), -1)
    sizes = (ids >= 0).sum(1)
    assert slow(backend) or (sizes.min() == 0 and (sizes > 64).any() and ((sizes > 0) & (sizes < 17)).any())
    results = []
    for support in (ids, ragged(ids)):
        params = [t.detach().requires_grad_() for t in case.params()]
        out = tk.linear_policy_loss(
            params[0], params[1], case.targets, OBJECTIVE, bias=params[2] if len(params) > 2 else None, support=support,
            backend=backend, **case.inputs, **case.head,
        )  # fmt: skip
        results.append([out.logprobs, out.entropy, out.loss, *torch.autograd.grad(out.loss, params)])
    for padded, found in zip(*results, strict=True):
        assert_close(found, padded, 1e-5, "ragged")


def test_padding_does_not_grow_with_the_widest_support():
    n, vocab = 256, 8192
    hidden, weight = torch.randn(n, 4), torch.randn(vocab, 4)
    sizes = torch.where(torch.arange(n) == 3, vocab // 2, 2)
    offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    ids = torch.cat([torch.arange(int(size)) for size in sizes])
    used = memory(lambda: tk.linear_logprobs(hidden, weight, torch.zeros(n, dtype=torch.int64), support=(ids, offsets)))
    assert used.largest < n * vocab // 2 * 4  # of one padded to the widest, in 32 bits


@pytest.mark.parametrize(
    ("support", "message"),
    [
        (
            (torch.zeros(3, dtype=torch.int64),),
            r"support must be ids \[..., K\] or \(ids \[M\], offsets \[N \+ 1\]\), int64",
        ),
        ((torch.zeros(3), torch.tensor([0, 1, 3])), "support must be ids"),
        (
            (torch.zeros(3, dtype=torch.int64), torch.tensor([0, 3])),
            r"support must have ids \[M\] and offsets \[3\] for 2",
        ),
        (
            (torch.zeros(3, dtype=torch.int64), torch.tensor([0, 4, 3])),
            "support must have offsets that rise from 0 to M=3",
        ),
        (
            (torch.zeros(3, dtype=torch.int64), torch.tensor([0, 1, 2])),
            "support must have offsets that rise from 0 to M=3",
        ),
        ((torch.full((2,), 9), torch.tensor([0, 1, 2])), "support: ids must be int64 in"),
        (
            (torch.ones(2, dtype=torch.int64), torch.tensor([0, 1, 2])),
            "targets must be among the ids of their support; got",
        ),
    ],
)
def test_what_is_no_support_of_the_tokens_is_named(support, message):
    with pytest.raises((TypeError, ValueError), match="linear_logprobs: " + message):
        tk.linear_logprobs(torch.zeros(2, 4), torch.zeros(9, 4), torch.zeros(2, dtype=torch.int64), support=support)


def test_no_token_at_all_has_a_support_too():
    none = torch.zeros(0, dtype=torch.int64)
    hidden = torch.zeros(0, 4, requires_grad=True)
    found = tk.linear_logprobs(
        hidden, torch.zeros(9, 4), none, entropy=True, support=(none, torch.zeros(1, dtype=torch.int64))
    )
    assert found.logprobs.shape == found.entropy.shape == (0,)
    found.logprobs.sum().backward()
