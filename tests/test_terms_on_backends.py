"""The newer terms on every backend, in every dtype and under every head, against the float64 oracle."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import (
    DTYPES,
    HEADS,
    assert_close,
    assert_same_result,
    oracle,
    run,
)
from test_terms import NEW, Objective, backends, sequence_case

import trapo_kernels as tk


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", NEW)
def test_new_terms_agree_with_the_oracle_in_every_dtype(name, dtype, backend):
    o = NEW[name]
    case = sequence_case(b=8, t=20, vocab=257, width=16, dtype=dtype, seed=1)
    if o.expert == "sed":
        o = Objective.sed(sed_k=5, sed_tau=10.0)  # a rounded mass may fall on the other side of τ
    if o.policy == "gspo":
        case.inputs["old_logprobs"] = None  # as may a sequence's ratio of its bounds
    assert_same_result(run(case, o, backend), oracle(case, o), dtype)


@backends
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["sed", "lco_logcosh", "eaft+gspo+all", "lco+cispo"])
def test_new_terms_under_every_head_and_a_small_budget(name, head, backend):
    case = sequence_case(b=6, t=9, vocab=61, seed=2, **HEADS[head])
    with tk.budget_mb(0.005):
        actual = run(case, NEW[name], backend)
    assert_same_result(actual, oracle(case, NEW[name]), torch.float64)


@backends
@pytest.mark.parametrize("name", ["lco_mse", "lco+cispo", "eaft"])
def test_new_terms_from_logits(name, backend):
    case = sequence_case(b=4, seed=4)
    z = (case.hidden @ case.weight.T).detach()

    def both(backend):
        logits = z.clone().requires_grad_()
        out = tk.policy_loss_from_logits(logits, case.targets, NEW[name], backend=backend, **case.inputs)
        return out.loss, *torch.autograd.grad(out.loss, logits)

    for a, b in zip(both(backend), both("reference"), strict=True):
        assert_close(a, b, 1e-11, name)


def lco_gradient(case, backend):
    logits = (case.hidden.detach() @ case.weight.detach().T).requires_grad_()
    o = Objective.lco("mse", lco_beta=2.0, reduction="sum")
    loss = tk.policy_loss_from_logits(
        logits, case.targets, o, advantages=case.inputs["advantages"], backend=backend
    ).loss
    return torch.autograd.grad(loss, logits)[0]


@backends
def test_lco_moves_the_logit_of_the_target_and_no_other(backend):
    case = sequence_case(seed=5)
    grad, a = lco_gradient(case, backend), case.inputs["advantages"]
    expected = torch.zeros_like(grad)
    expected.scatter_(-1, case.targets.clamp(min=0)[..., None], (-2 * a / 2.0)[..., None])
    expected[case.targets == -100] = 0
    assert_close(grad, expected, 1e-12, "d_logits")


@backends
@pytest.mark.parametrize("beta", [0.05, 1.0])
def test_lco_kld_has_the_gradient_of_a_divergence_from_the_moved_distribution(beta, backend):
    """Of the authors' form: F.kl_div to softmax(log π_old + A/β e_y), where the old policy is the policy."""
    logits = (2 * torch.randn(12, 33, dtype=torch.float64)).requires_grad_()
    targets, advantages = torch.randint(0, 33, (12,)), torch.randn(12, dtype=torch.float64)
    advantages[0] = 0
    o = Objective.lco("kld", lco_beta=beta, lco_neg=1.0, reduction="sum")
    loss = tk.policy_loss_from_logits(logits, targets, o, advantages=advantages, backend=backend).loss
    (found,) = torch.autograd.grad(loss, logits)
    moved = logits.detach().clone()
    moved[torch.arange(12), targets] += advantages / beta
    log_q = moved.log_softmax(-1)
    expected = torch.nn.functional.kl_div(logits.log_softmax(-1), log_q, reduction="sum", log_target=True)
    assert_close(found, torch.autograd.grad(expected, logits)[0], 1e-12, "d_logits")
    assert (found[0] == 0).all()


def test_lco_kld_moves_less_the_nearer_the_target_is():
    """Over several updates on one batch the old policy stays: at p = q nothing is left to learn."""
    o, old = Objective.lco("kld", lco_beta=1.0, lco_neg=1.0), torch.tensor(0.2, dtype=torch.float64)
    q = 0.2 * math.e / (0.8 + 0.2 * math.e)
    p = torch.tensor([0.2, 0.3, q], dtype=torch.float64)
    tokens = tk.Tokens(
        p.log(), p, torch.ones(3, dtype=torch.bool), advantages=torch.ones(3).double(), old_logprobs=old.log().expand(3)
    )
    slope = o.all_slopes(tokens).logprobs * (1 - p)
    assert slope[0] < slope[1] < 0
    assert abs(slope[2]) < 1e-12


def test_pears_blocks_end_at_tokens_and_at_whole_sequences():
    n, generator = 40, torch.Generator().manual_seed(0)
    logprobs, old = -torch.rand(2, n, generator=generator, dtype=torch.float64)
    expert = torch.rand(n, generator=generator) < 0.7
    rows = tk.Sequences(torch.arange(n) // 17, 3)
    tokens = tk.Tokens(logprobs, torch.zeros(n), expert, old_logprobs=old, sequences=rows)

    def weights(**fields):
        return -Objective.pear(pear_gamma=0.9, **fields).slopes(tokens)[0][expert]

    assert_close(weights(pear_level="block", pear_block=1), weights(), 1e-12, "blocks of one token")
    nothing_later = weights(pear_level="block", pear_block=n)
    assert_close(nothing_later, torch.ones_like(nothing_later), 1e-12, "one block")
    whole = weights(pear_level="sequence")
    for row in range(3):
        of_row = expert & (rows.row == row)
        expected = (logprobs - old).clamp(-0.08, 0.3)[of_row].sum().exp()
        assert_close(whole[rows.row[expert] == row], expected.expand(int(of_row.sum())), 1e-12, "sequence")


@pytest.mark.parametrize("level", ["token", "block", "sequence"])
@pytest.mark.parametrize("ratio", [-0.3, 0.3, 0.05])
def test_pear_is_finite_on_long_sequences(ratio, level):
    n = 8192
    logprobs = torch.full((n,), -1.0, requires_grad=True)
    tokens = tk.Tokens(
        logprobs, torch.zeros(n), torch.ones(n, dtype=torch.bool), old_logprobs=torch.full((n,), -1.0 - ratio),
        sequences=tk.Sequences.of_rows(1, n),
    )  # fmt: skip
    loss = Objective.pear(pear_level=level).losses(tokens)["expert"]
    loss.sum().backward()
    assert loss.isfinite().all()
    weight = -logprobs.grad
    assert weight.min() >= math.exp(-10) * (1 - 1e-6)
    assert weight.max() <= math.exp(5) * (1 + 1e-6)


@backends
def test_an_impossible_target_is_finite_or_honestly_infinite_under_the_new_terms(backend):
    case = sequence_case(b=3, t=4, vocab=33, dtype=torch.float32, with_bias=True)
    case.targets[:, :2] = 5
    with torch.no_grad():
        case.bias[5] = -torch.inf
    for name in ("chord", "cispo", "sapo", "lco_mse", "lco+cispo"):
        out = run(case, NEW[name], backend)
        assert torch.isfinite(out.loss), name
        assert all(torch.isfinite(g).all() for g in out.grads), name
    assert run(case, Objective.eaft(), backend, expert_mask=None).loss == torch.inf
