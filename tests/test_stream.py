"""Work that is not done, counted in GEMMs; chunks that do not show; gradients handed over, and asked for twice."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from kernel_cases import (
    EVERYTHING,
    STREAMED,
    TOLERANCE,
    affordable,
    assert_close,
    assert_same_result,
    gemms,
    make_case,
    oracle,
    policy_loss,
    run,
    slow,
)

import trapo_kernels as tk
from trapo_kernels.chunks import budget
from trapo_kernels.chunks.budget import chunk_rows

backends = pytest.mark.parametrize("backend", STREAMED)

ENTROPY = tk.Objective.trapo(entropy_coef=0.01)  # every active token has a gradient


def plain_case(n=40, vocab=257, **options):
    """All tokens active, own, and with an advantage."""
    case = make_case(n, vocab, dtype=torch.float32, **options)
    case.inputs = {"advantages": torch.ones(n), "expert_mask": torch.zeros(n, dtype=torch.bool)}
    case.targets = case.targets.clamp(min=0)
    return case


def loss_gemms(case, objective, backend, **options):
    def step():
        loss = policy_loss(case, objective, backend, **options).loss
        if loss.requires_grad:
            loss.backward()

    return gemms(step, case)


# Work ----------------------------------------------------------------------------------------------------------


def test_the_counter_sees_the_three_gemms_of_plain_autograd():
    assert loss_gemms(plain_case(), ENTROPY, "reference") == 3


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_take_three_gemms(backend, dtype):
    case = plain_case(with_bias=True).to(dtype).requires_grad()
    assert loss_gemms(case, ENTROPY, backend) == 3


@backends
def test_frozen_parameters_and_no_grad_leave_gemms_out(backend):
    case = plain_case()
    case.weight.requires_grad_(False)
    assert loss_gemms(case, ENTROPY, backend) == 2
    case.hidden.requires_grad_(False)
    assert loss_gemms(case, ENTROPY, backend) == 1
    case.weight.requires_grad_(True)
    assert loss_gemms(case, ENTROPY, backend) == 2
    with torch.no_grad():
        assert loss_gemms(plain_case(), ENTROPY, backend) == 1


@backends
@pytest.mark.parametrize("by", ["mask", "ignore_index"])
def test_inactive_tokens_cost_nothing(backend, by):
    case = plain_case()
    if by == "mask":
        case.inputs["mask"] = torch.arange(40) % 4 == 0
    else:
        case.targets[torch.arange(40) % 4 != 0] = -100
    assert loss_gemms(case, ENTROPY, backend) == 3 / 4


@backends
def test_tokens_without_gradient_cost_the_forward_and_under_skip_inactive_nothing(backend):
    case = plain_case()
    case.inputs["advantages"][:30] = 0
    assert loss_gemms(case, tk.Objective.grpo(), backend) == (40 + 10 + 10) / 40
    assert loss_gemms(case, tk.Objective.grpo(), backend, skip_inactive=True) == 30 / 40
    # An entropy bonus or a KL term gives them a gradient.
    assert loss_gemms(case, tk.Objective.grpo(entropy_coef=0.1), backend, skip_inactive=True) == 3
    case.inputs["ref_logprobs"] = torch.full((40,), -5.0)
    assert loss_gemms(case, tk.Objective.grpo(kl_coef=0.1), backend) == 3


@backends
def test_which_expert_tokens_have_a_gradient_depends_on_their_term(backend):
    case = plain_case()
    case.inputs["advantages"].zero_()
    case.inputs["expert_mask"][:10] = True
    for objective, live in (
        (tk.Objective.trapo(), 10),
        (tk.Objective.luffy(), 0),
        (tk.Objective.trapo(expert_coef=0.0), 0),
        (tk.Objective.grpo(), 0),
    ):
        assert loss_gemms(case, objective, backend) == (40 + 2 * live) / 40, objective


@backends
def test_logprobs_take_one_gemm_forward_and_three_backward_for_rows_with_a_gradient(backend):
    case = plain_case()
    case.targets[:20] = -100

    def forward():
        return tk.linear_logprobs(case.hidden, case.weight, case.targets, entropy=True, backend=backend)

    assert gemms(forward, case) == 20 / 40
    weights = (torch.arange(40) >= 30).float()
    out = forward()
    assert gemms(lambda: (out.logprobs * weights).sum().backward(), case) == 3 * 10 / 40
    assert gemms(lambda: forward().entropy.sum().backward(), case) == 4 * 20 / 40


# Chunks --------------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("megabytes", [0.001, 4.2, 5, 64])
def test_the_budget_changes_the_chunks_and_not_the_result(backend, megabytes, dtype):
    case = make_case(affordable(backend, 200), 997, dtype=dtype, with_bias=True)
    with tk.budget_mb(megabytes):
        actual = run(case, EVERYTHING, backend)
    assert_same_result(actual, oracle(case, EVERYTHING), dtype)


@pytest.mark.parametrize(
    ("gigabytes", "megabytes"), [(16, 768), (24, 768), (40, 768), (80, 1600), (139.8, 2816), (288, 4096)]
)
def test_a_cards_budget_is_two_percent_of_its_memory(gigabytes, megabytes, monkeypatch):
    properties = SimpleNamespace(total_memory=int(gigabytes * 2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(budget, "_share_of_card", budget._share_of_card.__wrapped__)
    assert tk.get_budget_mb("cuda") == megabytes
    assert tk.get_budget_mb("cpu") == 144
    with tk.budget_mb(12):
        assert tk.get_budget_mb("cuda") == 12
    if megabytes == 2816:
        assert chunk_rows(8192, 2 * 152064, 0, "cuda") == 8192


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 5000, 100_000])
@pytest.mark.parametrize("megabytes", [1, 40, 1536])
def test_chunks_of_a_gpu_are_multiples_of_128_rows_where_so_many_fit(rows, megabytes):
    with tk.budget_mb(megabytes):
        step = chunk_rows(rows, 2 * 152064, 0, "cuda")
    assert step * 2 * 152064 <= megabytes * 2**20
    assert step % 128 == 0 or megabytes == 1
    assert step <= 8192


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 511, 512, 513, 5000])
@pytest.mark.parametrize("megabytes", [1, 10, 128])
def test_chunks_are_even_keep_to_the_budget_and_are_a_multiple_of_16(rows, megabytes):
    row_bytes, scratch = 4 * 49152, 2**20 // 2
    with tk.budget_mb(megabytes):
        step = chunk_rows(rows, row_bytes, scratch, "cpu")
    assert 1 <= step <= 512
    assert step == 1 or step * row_bytes + scratch <= megabytes * 2**20
    assert step % 16 == 0 or step < 16
    if rows:
        chunks = -(-rows // step)
        most = min((megabytes * 2**20 - scratch) // row_bytes, 512)
        assert chunks == -(-rows // max(most - most % 16 if most >= 16 else most, 1))
        assert chunks * step - rows < 16 * chunks


def test_the_budget_is_chosen_by_call_then_environment_then_default(monkeypatch):
    assert tk.get_budget_mb() == 144
    monkeypatch.setenv("TRAPO_KERNELS_BUDGET_MB", "64")
    assert tk.get_budget_mb() == 64
    with tk.budget_mb(32):
        assert tk.get_budget_mb() == 32
    assert tk.get_budget_mb() == 64
    for wrong in ("lots", "-1", "nan"):
        monkeypatch.setenv("TRAPO_KERNELS_BUDGET_MB", wrong)
        with pytest.raises(ValueError, match=r"^TRAPO_KERNELS_BUDGET_MB must be a finite number of MiB above 0; got '"):
            tk.get_budget_mb()
    with pytest.raises(ValueError, match=r"^set_budget_mb: megabytes must be"):
        tk.set_budget_mb(0)


# Autograd ------------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_backward_through_a_retained_graph_is_right_and_adds(backend, dtype):
    case = make_case(affordable(backend, 40), 257, dtype=dtype, with_bias=True)
    expected = oracle(case, EVERYTHING)
    loss = policy_loss(case, EVERYTHING, backend).loss
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in case.params()]
    (3 * loss).backward()
    for name, p, once, right in zip("hwb", case.params(), first, expected.grads, strict=True):
        assert_close(once, right, TOLERANCE[dtype], name)
        assert_close(p.grad, 4 * right, TOLERANCE[dtype], name)


@backends
def test_a_second_backward_without_retain_graph_or_after_a_step_is_an_error(backend):
    case = make_case(affordable(backend, 40), 257)
    loss = policy_loss(case, EVERYTHING, backend).loss
    loss.backward(retain_graph=True)
    with torch.no_grad():
        case.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = policy_loss(case, EVERYTHING, backend).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@backends
def test_gradients_become_grad_without_a_copy_and_the_graph_keeps_none(backend):
    case = make_case(affordable(backend, 40), 257, dtype=torch.float32)
    loss = policy_loss(case, EVERYTHING, backend).loss
    held = {t.data_ptr() for t in loss.grad_fn.grads if t is not None}
    loss.backward(retain_graph=True)
    assert {case.hidden.grad.data_ptr(), case.weight.grad.data_ptr()} == held
    assert loss.grad_fn.grads is None


@backends
def test_backward_scales_with_the_gradient_that_comes_in(backend):
    case = make_case(affordable(backend, 40), 257)
    once = run(case, EVERYTHING, backend)
    out = policy_loss(case, EVERYTHING, backend)
    for g, right in zip(torch.autograd.grad(-2.5 * out.loss, case.params()), once.grads, strict=True):
        assert_close(g, -2.5 * right, 1e-12, "gradient")
    assert not out.logprobs.requires_grad
    assert not out.entropy.requires_grad
    assert not any(value.requires_grad for value in out.metrics.values())


@backends
def test_a_second_derivative_is_refused(backend):
    case = make_case(affordable(backend, 10), 33)
    loss = policy_loss(case, EVERYTHING, backend).loss
    with pytest.raises(RuntimeError, match=r"^linear_policy_loss: create_graph must be False"):
        torch.autograd.grad(loss, case.hidden, create_graph=True)
    logprobs = tk.linear_logprobs(case.hidden, case.weight, case.targets, backend=backend).logprobs
    with pytest.raises(RuntimeError, match=r"^linear_logprobs: create_graph must be False"):
        torch.autograd.grad(logprobs.sum(), case.hidden, create_graph=True)


@backends
def test_no_gradient_flows_into_advantages_and_given_logprobs(backend):
    case = make_case(affordable(backend, 10), 33)
    for name in ("advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs"):
        case.inputs[name].requires_grad_()
    policy_loss(case, EVERYTHING, backend).loss.backward()
    assert all(t.grad is None for t in case.inputs.values())


@backends
def test_it_trains_a_head_inside_a_larger_graph(backend):
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 16)
    head = torch.nn.Linear(16, 33)
    n, steps, lr = (4, 60, 1.0) if slow(backend) else (20, 300, 0.2)
    x, targets = torch.randn(n, 8), torch.randint(0, 33, (n,))
    loss_of = tk.TrapoLoss(tk.Objective.sft(), backend=backend, temperature=0.7)
    optimizer = torch.optim.SGD([*layer.parameters(), *head.parameters()], lr=lr)
    losses = []
    for _ in range(steps):
        out = loss_of(torch.tanh(layer(x)), head.weight, targets, bias=head.bias)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert "temperature=0.7" in repr(loss_of)
