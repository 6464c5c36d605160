"""A temperature of each token: values, gradients and metrics of every function against whole logits, in float64."""

from __future__ import annotations

import re

import pytest
import torch
from kernel_cases import BACKENDS, EVERYTHING, TOLERANCE, affordable, assert_close, make_case

import trapo_kernels as tk
from trapo_kernels.foreseen import token_outputs

backends = pytest.mark.parametrize("backend", BACKENDS)


def case_of(backend, dtype=torch.float32, vocab=157):
    n = affordable(backend, 24)
    case = make_case(n, vocab, dtype=dtype, logit_scale=1.3)
    case.targets = case.targets.clamp(min=0)
    return case, torch.linspace(0.3, 2.0, n, dtype=torch.float64)


def exact_log_softmax(case, temperatures):
    """(parameters in float64 with gradients, log-probabilities of all classes [n, V])."""
    params = [case.hidden.detach().double().requires_grad_(), case.weight.detach().double().requires_grad_()]
    return params, (1.3 * params[0] @ params[1].T / temperatures[:, None]).log_softmax(1)


def compare(found, exact, params, exact_params, dtype):
    assert_close(found.detach(), exact.detach(), TOLERANCE[dtype], "value", floor=1.0)
    grads, right = torch.autograd.grad(found.sum(), params), torch.autograd.grad(exact.sum(), exact_params)
    for name, a, b in zip(("d_hidden", "d_weight"), grads, right, strict=True):
        assert a.dtype == dtype
        assert_close(a, b, TOLERANCE[dtype], name)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_those_of_logits_that_are_divided_token_by_token(backend, dtype):
    case, t = case_of(backend, dtype)
    exact_params, log_p = exact_log_softmax(case, t)
    rows, slopes = torch.arange(len(t)), torch.linspace(-1, 2, len(t), dtype=torch.float64)
    out = tk.linear_logprobs(
        case.hidden, case.weight, case.targets, temperature=t.float(), entropy=True, backend=backend, logit_scale=1.3
    )
    again = token_outputs(
        case.hidden, case.weight, case.targets, temperature=t.float(), backend=backend, logit_scale=1.3
    )
    assert_close(again.logprobs.detach(), out.logprobs.detach(), TOLERANCE[dtype], "token_outputs", floor=1.0)
    assert_close(out.entropy.detach(), -(log_p.exp() * log_p).sum(1).detach(), TOLERANCE[dtype], "entropy", floor=1.0)
    mixed = slopes * out.logprobs + out.entropy
    exact = slopes * log_p[rows, case.targets] - (log_p.exp() * log_p).sum(1)
    compare(mixed, exact, case.params(), exact_params, dtype)


@backends
@pytest.mark.parametrize("shape", ["per token", "per sequence", "per sequence with 1"])
def test_a_policy_loss_is_that_of_the_divided_logits_with_its_metrics(backend, shape):
    case, t = case_of(backend)
    n = len(t) - len(t) % 2
    t = t[:n] if shape == "per token" else t[: n : n // 2].repeat_interleave(n // 2)
    case.hidden, case.targets = case.hidden.detach()[:n].requires_grad_(), case.targets[:n]
    inputs = {name: None if v is None else v[:n] for name, v in case.inputs.items()}
    logits = 1.3 * case.hidden.detach().double() @ case.weight.detach().double().T / t[:, None]
    right = tk.policy_loss_from_logits(logits.requires_grad_(), case.targets, EVERYTHING, backend="reference", **inputs)
    given = {
        "per token": t.reshape(2, -1), "per sequence": t.reshape(2, -1)[:, 0],
        "per sequence with 1": t.reshape(2, -1)[:, :1],
    }[shape]  # fmt: skip
    found = tk.linear_policy_loss(
        case.hidden.reshape(2, n // 2, -1), case.weight, case.targets.reshape(2, -1), EVERYTHING, backend=backend,
        temperature=given.float(), logit_scale=1.3,
        **{name: None if v is None else v.reshape(2, -1) for name, v in inputs.items()},
    )  # fmt: skip
    (d_logits,) = torch.autograd.grad(right.loss, logits)
    d_logits = 1.3 * d_logits / t[:, None]
    grads = torch.autograd.grad(found.loss, case.params())
    exact = (d_logits @ case.weight.detach().double(), d_logits.T @ case.hidden.detach().double())
    for name, a, b in zip(("d_hidden", "d_weight"), grads, exact, strict=True):
        assert_close(a, b, TOLERANCE[torch.float32], name)
    assert found.metrics.keys() == right.metrics.keys()
    for name, value in found.metrics.items():
        assert_close(value.detach(), right.metrics[name].detach(), 1e-4, name, floor=1.0)


@backends
@pytest.mark.parametrize("restrict", [False, True])
def test_a_support_and_a_teachers_top_k_are_at_each_tokens_temperature(backend, restrict):
    case, t = case_of(backend)
    ids = (case.targets[:, None] + torch.arange(5) * 7) % 157
    exact_params, log_p = exact_log_softmax(case, t)
    inside = log_p.gather(1, ids)
    options = {"temperature": t.float(), "backend": backend, "logit_scale": 1.3}
    out = tk.linear_support_logprobs(case.hidden, case.weight, ids, restrict=restrict, **options)
    compare(out.logprobs, inside.log_softmax(1) if restrict else inside, case.params(), exact_params, torch.float32)
    if restrict:
        return
    teacher = torch.linspace(-4, -2, 5).expand(len(t), 5)
    exact_params, log_p = exact_log_softmax(case, t)
    q, p = log_p.exp().gather(1, ids), teacher.double().exp()
    q, p = (torch.cat([x, 1 - x.sum(1, keepdim=True)], 1) for x in (q, p))
    found = tk.linear_topk_divergence(case.hidden, case.weight, ids, teacher, **options)
    compare(found.loss, (p * (p / q).log()).sum(1).mean(), case.params(), exact_params, torch.float32)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("own", [False, True])
def test_a_divergence_is_at_each_tokens_temperature_on_both_sides(backend, own):
    case, t = case_of("torch")
    other = case.hidden.detach().flip(1)
    exact_params, log_q = exact_log_softmax(case, t)
    theirs = t.flip(0) if own else t
    log_p = (1.3 * other.double() @ case.weight.detach().double().T / theirs[:, None]).log_softmax(1)
    found = tk.linear_divergence(
        case.hidden, case.weight, other, case.weight.detach(), temperature=t.float(), backend=backend, logit_scale=1.3,
        ref_options={"temperature": theirs.float()} if own else None,
    )  # fmt: skip
    exact = (log_p.exp() * (log_p - log_q)).sum(1).mean()
    compare(found.loss, exact, case.params(), exact_params, torch.float32)


def wrong(temperature, **options):
    return lambda h, w, y: tk.linear_logprobs(h, w, y, temperature=temperature, **options)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (wrong(torch.ones(3)), "temperature must be a number, [2, 4] as tokens, or one per sequence; got a tensor of"),
        (wrong(torch.ones(2, 4).long()), "temperature must be floating on cpu, as hidden; got torch.int64 on cpu"),
        (wrong(torch.zeros(2, 4)), "temperature must be finite and above 0 at every token; got 0"),
        (wrong(torch.full((2,), torch.nan)), "temperature must be finite and above 0 at every token; got nan"),
        (wrong(torch.ones(2), softcap=3.0), "temperature must be a number where there is a softcap"),
        (wrong(torch.ones(2), bias=torch.zeros(9)), "temperature must be a number where there is a bias"),
        (
            lambda h, w, y: tk.linear_policy_loss(
                h, w, y, tk.Objective.asft(), ref_hidden=h, ref_weight=w, temperature=torch.ones(2)
            ),
            "temperature must be a number for expert='asft'; got one per token",
        ),
        (
            lambda h, w, y: tk.linear_divergence(h, w, ref_logits=h @ w.T, temperature=torch.ones(2)),
            "temperature must be a number for ref_logits",
        ),
        (
            lambda h, w, y: tk.logprobs_from_logits(h @ w.T, y, temperature=torch.ones(2, 4)),
            "temperature must be a finite number above 0; got a tensor of shape [2, 4]",
        ),
    ],
)
def test_what_no_path_can_do_is_refused_in_one_line(call, line):
    h, w, y = torch.randn(2, 4, 6), torch.randn(9, 6), torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises((TypeError, ValueError), match=re.escape(line)) as error:
        call(h, w, y)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_compiled_loss_takes_it():
    case, t = case_of("torch")

    def loss(hidden, weight, targets, temperature):
        return tk.linear_policy_loss(hidden, weight, targets, tk.Objective.sft(), temperature=temperature).loss

    args = (case.hidden, case.weight, case.targets, t.float())
    grads = [
        torch.autograd.grad(function(*args), case.params()) for function in (loss, torch.compile(loss, fullgraph=True))
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
