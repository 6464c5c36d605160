"""Objectives and modules made inside of what torch.compile compiles: the loss and the gradients are those of eager."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from kernel_cases import assert_close

import trapo_kernels as tk
from trapo_kernels import stream

B, T, D, V = 2, 3, 8, 37
PRESETS = [name for name, value in vars(tk.Objective).items() if isinstance(value, classmethod)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def own(logprobs, advantages):
    return -advantages * logprobs.sin()


class Scaled:
    """Two of them show the same text."""

    def __init__(self, by):
        self.by = by

    def __call__(self, logprobs):
        return -self.by * logprobs

    def __repr__(self):
        return "Scaled()"


def of_a_function_made_inside():
    def half(logprobs):
        return -0.5 * logprobs

    return tk.Objective(expert=half, policy=None)


BASE = tk.Objective.grpo()
MADE = {name: getattr(tk.Objective, name) for name in PRESETS} | {
    "fields": lambda: tk.Objective(expert="sft", policy=None, reduction="sum"),
    "override": lambda: tk.Objective.grpo(clip_low=0.05, entropy_coef=0.5),
    "schedule": lambda: tk.Objective.chord(0.3),
    "replaced inside": lambda: replace(tk.Objective.grpo(), entropy_coef=0.3),
    "replaced from outside": lambda: replace(BASE, entropy_coef=0.3, kl_coef=0.1),
    "own": lambda: tk.Objective(expert=own, policy=own, entropy_coef=0.1),
    "own, made inside": of_a_function_made_inside,
}


def arguments(seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((B, T, D), (V, D)))
    targets = torch.randint(0, V, (B, T), generator=g)
    old = tk.linear_logprobs(hidden, weight, targets).logprobs + torch.randn(B, T, generator=g)
    inputs = {
        "advantages": torch.randn(B, T, generator=g),
        "old_logprobs": old,
        "ref_logprobs": old + 0.1,
        "rollout_logprobs": old - 0.1,
        "expert_mask": torch.tensor([[1, 0, 0], [1, 1, 0]]).bool(),
        "ref_hidden": hidden + 0.1,
        "ref_weight": 0.9 * weight,
    }
    return hidden.requires_grad_(), weight.requires_grad_(), targets, inputs


def results(fn, hidden, weight, *others):
    loss, reported = fn(hidden, weight, *others)
    return loss, reported, *torch.autograd.grad(loss, (hidden, weight))


def assert_equal(actual, expected):
    for name, a, e in zip(("loss", "metric", "d_hidden", "d_weight"), actual, expected, strict=True):
        assert_close(a, e, 1e-11, name)


@pytest.mark.parametrize("backend", [None, *(pytest.param(b, marks=pytest.mark.slow) for b in ("torch", "reference"))])
@pytest.mark.parametrize("name", MADE)
def test_an_objective_made_inside_is_the_one_that_is_trained(name, backend):
    hidden, weight, targets, inputs = arguments()

    def loss(hidden, weight):
        out = tk.linear_policy_loss(hidden, weight, targets, MADE[name](), backend=backend, **inputs)
        return out.loss, out.metrics["loss"]

    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    assert_equal(results(compiled, hidden, weight), results(loss, hidden, weight))


def test_a_module_made_inside_has_its_objective_and_options():
    hidden, weight, targets, inputs = arguments()

    def loss(hidden, weight):
        made = tk.TrapoLoss(tk.Objective.dapo(entropy_coef=0.2), temperature=0.7)
        out = made(hidden, weight, targets, **inputs)
        return out.loss, out.metrics["loss"]

    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    assert_equal(results(compiled, hidden, weight), results(loss, hidden, weight))


def test_a_number_that_changes_from_call_to_call_is_the_one_of_the_call():
    """The compiler makes a symbol of such a number, which no objective may hold."""
    hidden, weight, targets, inputs = arguments()

    def loss(hidden, weight, mu, bonus):
        out = tk.linear_policy_loss(
            hidden, weight, targets, tk.Objective.chord(mu, entropy_coef=bonus, clip_low=mu), **inputs
        )
        return out.loss, out.metrics["loss"]

    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    for mu in (0.1, 0.2, 0.3, 0.2):
        assert_equal(results(compiled, hidden, weight, mu, mu / 2), results(loss, hidden, weight, mu, mu / 2))


@pytest.mark.parametrize("dynamic", [None, True])
def test_an_equal_objective_made_anew_is_the_same_graph(dynamic):
    hidden, weight, targets, inputs = arguments()

    def loss(hidden, weight, objective):
        out = tk.linear_policy_loss(hidden, weight, targets, objective, **inputs)
        return out.loss, out.metrics["loss"]

    compiled = torch.compile(loss, backend="eager", fullgraph=True, dynamic=dynamic)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            compiled(hidden, weight, tk.Objective.grpo(clip_low=0.1, entropy_coef=0.1))
    for bonus in (0.1, 0.2):
        o = tk.Objective.grpo(entropy_coef=bonus)
        assert_equal(results(compiled, hidden, weight, o), results(loss, hidden, weight, o))


def test_two_functions_that_show_the_same_text_are_two_terms():
    hidden, weight, targets, _ = arguments()

    def loss(hidden, weight, objective):
        out = tk.linear_policy_loss(hidden, weight, targets, objective)
        return out.loss, out.metrics["loss"]

    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    for by in (1.0, 2.0):
        o = tk.Objective(expert=Scaled(by), policy=None)
        assert_equal(results(compiled, hidden, weight, o), results(loss, hidden, weight, o))


def test_a_field_out_of_its_range_is_named_from_inside_too():
    hidden, weight, targets, _ = arguments()

    def loss(hidden, weight):
        return tk.linear_policy_loss(hidden, weight, targets, tk.Objective(alpha=2.0)).loss

    with pytest.raises(Exception, match=r"Objective: alpha must be a number in \(0, 1\]; got 2\.0"):
        torch.compile(loss, backend="eager")(hidden, weight)


def test_a_backend_chosen_after_compiling_is_used():
    hidden, weight, targets, inputs = arguments()
    compiled = torch.compile(
        lambda: tk.linear_policy_loss(hidden, weight, targets, BASE, **inputs).loss, backend="eager", fullgraph=True
    )
    try:
        for name in ("torch", "reference"):
            tk.set_backend(name)
            with mock.patch.object(stream, "forward", wraps=stream.forward) as streamed:
                compiled()
            assert streamed.called == (name == "torch")
    finally:
        tk.set_backend(None)
