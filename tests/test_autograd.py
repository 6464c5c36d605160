"""What people put around a loss: GradScaler, activation checkpointing, retain_graph, torch.func, second derivatives."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    BACKENDS,
    DEVICE,
    EVERYTHING,
    STREAMED,
    TOLERANCE,
    affordable,
    assert_close,
    make_case,
    oracle,
    policy_loss,
)
from torch.utils.checkpoint import checkpoint

import trapo_kernels as tk

backends = pytest.mark.parametrize("backend", BACKENDS)


@backends
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_loss_inside_a_checkpoint_has_the_same_gradients(reentrant, backend):
    case = make_case(affordable(backend, 40), 33, with_bias=True)

    def loss(*params):
        return tk.linear_policy_loss(
            params[0], params[1], case.targets, EVERYTHING, bias=params[2], backend=backend, **case.inputs
        ).loss

    checkpoint(loss, *case.params(), use_reentrant=reentrant).backward()
    for p, right in zip(case.params(), oracle(case, EVERYTHING).grads, strict=True):
        assert_close(p.grad, right, 1e-11, "gradient")


HEADS = ("loss", "gspo", "asft", "logprobs", "support", "restricted", "forward_kl", "reverse_kl", "jsd")


def through(head, case, backend):
    """(a function of the parameters whose value is a scalar, through one of the package's doors)."""
    ref_hidden, ref_weight = case.hidden.detach().flip(1), case.weight.detach().flip(0)
    if head in ("loss", "gspo", "asft"):
        objective = EVERYTHING if head == "loss" else getattr(tk.Objective, head)()
        options = {"sequence_ids": torch.arange(case.targets.numel()) // 4, **case.inputs}
        return lambda h, w, b: tk.linear_policy_loss(
            h, w, case.targets, objective, bias=b, backend=backend, ref_hidden=ref_hidden, ref_weight=ref_weight,
            **options,
        ).loss  # fmt: skip
    if head == "logprobs":
        return lambda h, w, b: tk.linear_logprobs(h, w, case.targets, bias=b, backend=backend).logprobs.sum()
    if head in ("support", "restricted"):
        ids = torch.stack([case.targets.clamp(min=0), (case.targets + 1) % case.weight.shape[0]], 1)
        return lambda h, w, b: tk.linear_support_logprobs(
            h, w, ids, bias=b, backend=backend, restrict=head == "restricted"
        ).logprobs.sum()
    return lambda h, w, b: tk.linear_divergence(h, w, ref_hidden, ref_weight, bias=b, kind=head, backend=backend).loss


def heads_and_backends():
    """A divergence has two backends."""
    both = ("torch", "reference")
    return [
        (head, b) for head in HEADS for b in BACKENDS if b in both or head not in ("forward_kl", "reverse_kl", "jsd")
    ]


@pytest.mark.parametrize(("head", "backend"), heads_and_backends())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_checkpoints_and_hooks_on_saved_tensors_change_no_gradient(dtype, head, backend):
    case = make_case(affordable(backend, 12), 33, dtype=dtype, with_bias=True)
    loss = through(head, case, backend)
    expected = torch.autograd.grad(loss(*case.params()), case.params())

    def check(value):
        for a, b in zip(torch.autograd.grad(value, case.params()), expected, strict=True):
            assert torch.equal(a, b)

    # The factor makes the head's inputs tensors of the region, as a layer before it does.
    check(checkpoint(lambda *params: loss(*(p * 1 for p in params)), *case.params(), use_reentrant=False))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        check(loss(*case.params()))
    with torch.autograd.graph.save_on_cpu():
        check(loss(*case.params()))
    checkpoint(lambda *params: loss(*(p * 1 for p in params)), *case.params(), use_reentrant=True).backward()
    for p, b in zip(case.params(), expected, strict=True):
        assert torch.equal(p.grad, b)


@backends
def test_checkpointed_layers_before_the_loss_and_autocast_around_both_train(backend):
    torch.manual_seed(0)
    layer, head = torch.nn.Linear(8, 16), torch.nn.Linear(16, 33)
    n = affordable(backend, 20)
    x, targets = torch.randn(n, 8), torch.randint(0, 33, (n,))
    optimizer = torch.optim.SGD([*layer.parameters(), *head.parameters()], lr=0.3)
    losses = []
    for _ in range(30):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            hidden = checkpoint(lambda x: torch.tanh(layer(x)), x, use_reentrant=False)
            assert hidden.dtype == torch.bfloat16
            out = tk.linear_policy_loss(
                hidden, head.weight.to(hidden.dtype), targets, tk.Objective.sft(), backend=backend
            )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.7 * losses[0]


@backends
def test_grad_scaler_scales_skips_infinities_and_unscales(backend):
    case = make_case(30, 33, dtype=torch.float16)
    params = [torch.nn.Parameter(p.detach().float()) for p in case.params()]
    optimizer = torch.optim.SGD(params, lr=1.0)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)

    def backward(factor=1.0):
        hidden, weight = (p.half() for p in params)
        out = tk.linear_policy_loss(hidden * factor, weight, case.targets, EVERYTHING, backend=backend, **case.inputs)
        optimizer.zero_grad()
        scaler.scale(out.loss).backward()
        scaler.unscale_(optimizer)

    backward()
    for p, right in zip(params, oracle(case, EVERYTHING).grads, strict=True):
        assert_close(p.grad, right, TOLERANCE[torch.float16], "gradient")
    scaler.update()
    before = [p.detach().clone() for p in params]
    backward(factor=float("inf"))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@backends
def test_retain_graph_gives_every_backward_its_own_gradients(backend):
    case = make_case(affordable(backend, 40), 33)
    right = oracle(case, EVERYTHING).grads
    loss = policy_loss(case, EVERYTHING, backend).loss
    first = torch.autograd.grad(loss, case.params(), retain_graph=True)
    second = torch.autograd.grad(2 * loss, case.params(), retain_graph=True)
    third = torch.autograd.grad(loss, case.hidden)
    for a, b, expected in zip(first, second, right, strict=True):
        assert_close(a, expected, 1e-11, "first")
        assert_close(b, 2 * expected, 1e-11, "second")
    assert_close(third[0], right[0], 1e-11, "third")


def test_torch_func_differentiates_the_reference_backend():
    case = make_case(12, 19, width=4)

    def loss(hidden, weight):
        return tk.linear_policy_loss(hidden, weight, case.targets, EVERYTHING, backend="reference", **case.inputs).loss

    params = [p.detach() for p in case.params()]
    right = oracle(case, EVERYTHING).grads
    for a, b in zip(torch.func.grad(loss, argnums=(0, 1))(*params), right, strict=True):
        assert_close(a, b, 1e-11, "grad")
    jacobian = torch.func.jacrev(lambda h: tk.linear_logprobs(h, params[1], case.targets, backend="reference").logprobs)
    rows = jacobian(params[0])
    assert rows.shape == (12, 12, 4)
    others = rows[~torch.eye(12, dtype=torch.bool)]
    assert not others.any()


def test_the_reference_backend_has_second_derivatives():
    case = make_case(5, 7, width=3)

    def loss(hidden, weight):
        return tk.linear_policy_loss(
            hidden, weight, case.targets.clamp(min=0), tk.Objective.sft(entropy_coef=0.1), backend="reference"
        ).loss

    assert torch.autograd.gradgradcheck(loss, tuple(case.params()))


@pytest.mark.parametrize("backend", STREAMED)
def test_a_streamed_loss_refuses_what_it_cannot_do_in_one_line(backend):
    case = make_case(10, 33)
    loss = policy_loss(case, EVERYTHING, backend).loss
    with pytest.raises(
        RuntimeError, match=r"^linear_policy_loss: create_graph must be False, .* use backend='reference'$"
    ):
        torch.autograd.grad(loss, case.hidden, create_graph=True)

    def of(hidden):
        return tk.linear_policy_loss(
            hidden, case.weight.detach(), case.targets, EVERYTHING, backend=backend, **case.inputs
        ).loss

    with pytest.raises(RuntimeError, match=r"^linear_policy_loss: .* torch.func transforms; use backend='reference'$"):
        torch.func.grad(of)(case.hidden.detach())
