"""torch.compile: one graph around the losses, right under dynamic shapes; each operator passes opcheck.

The graphs run on the aot_eager backend, which traces, decomposes and partitions as inductor does and generates no code;
inductor itself is slow to compile and has one slow test.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    BACKENDS,
    EVERYTHING,
    STREAMED,
    TOLERANCE,
    assert_close,
    compiled_gemms,
    idle_kernels,
    make_case,
    memory,
)
from test_terms import NEW, sequence_case
from torch import nn

import trapo_kernels as tk
from trapo_kernels import ops
from trapo_kernels.divergence.heads import KINDS

streamed = pytest.mark.parametrize("backend", STREAMED)
# The graph is the same whatever the row kernel: one backend by default, all of them in the slow suite.
LAST = STREAMED[-1]


def others_slow(names):
    return [name if name == LAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def focal(logprobs, entropy, advantages):
    return -advantages * ((1 - logprobs.exp()) ** 2) * logprobs + 0.1 * entropy.square()


OBJECTIVES = {
    "everything": EVERYTHING,
    "sequence mean, statistics": tk.Objective(expert="eaft", policy="cispo", reduction="sequence_mean"),
    "logit": NEW["lco+cispo"],
    "coupled": NEW["eaft+gspo+all"],
    "own": tk.Objective(expert=focal, policy=focal, entropy_coef=0.01),
}


class Model(nn.Module):
    """A small language model with the loss inside."""

    def __init__(self, objective, backend, vocab=67, width=16):
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(vocab, width), nn.Linear(width, width), nn.Linear(width, vocab)
        self.options = {"objective": objective, "backend": backend, "temperature": 0.8, "softcap": 9.0}

    def forward(self, ids, targets, inputs):
        hidden = torch.tanh(self.layer(self.embed(ids)))
        return tk.linear_policy_loss(hidden, self.head.weight, targets, bias=self.head.bias, **inputs, **self.options)


def batch(b=8, t=6, vocab=67, seed=0):
    case = sequence_case(b, t, vocab, seed=seed)
    ids = torch.randint(0, vocab, (b, t), generator=torch.Generator().manual_seed(seed))
    return ids, case.targets, case.inputs


def step(model, arguments):
    model.zero_grad()
    out = model(*arguments)
    (3 * out.loss).backward()
    named = ((name.removeprefix("_orig_mod."), p.grad) for name, p in model.named_parameters())
    return out, {name: grad.clone() for name, grad in named if grad is not None}


def same(actual, expected, dtype=torch.float64):
    (out, grads), (right, right_grads) = actual, expected
    for name in ("loss", "logprobs", "entropy"):
        assert_close(getattr(out, name), getattr(right, name), TOLERANCE[dtype], name, floor=1.0)
    assert out.metrics.keys() == right.metrics.keys()
    for name, value in right.metrics.items():
        assert_close(out.metrics[name], value, TOLERANCE[dtype], name, floor=1.0)
    assert grads.keys() == right_grads.keys()
    assert any(g.any() for g in grads.values())
    for name, grad in right_grads.items():
        assert grads[name].dtype == grad.dtype
        assert_close(grads[name], grad, TOLERANCE[dtype], name)


# Graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", others_slow(BACKENDS))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_model_with_its_loss_is_one_graph_with_the_eager_results(name, backend):
    torch.manual_seed(0)
    model = Model(OBJECTIVES[name], backend).double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    same(step(compiled, batch()), step(model, batch()))


@pytest.mark.parametrize("backend", others_slow(STREAMED))
def test_shapes_may_change_without_a_second_graph(backend):
    model = Model(EVERYTHING, backend).double()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for b, t in ((8, 6), (5, 9), (11, 3), (3, 20)):
            arguments = batch(b, t, seed=b)
            same(step(compiled, arguments), step(model, arguments))


def test_another_objective_is_another_graph_and_not_the_last_ones_loss():
    def loss(hidden, weight, targets, objective):
        return tk.linear_policy_loss(hidden, weight, targets, objective, backend="torch").loss

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    case = make_case(20, 33)
    arguments = (case.hidden, case.weight, case.targets)

    def scaled(factor):
        def term(logprobs):
            return -factor * logprobs

        return tk.Objective(expert=term, policy=None)

    objectives = [tk.Objective(policy=None, alpha=alpha) for alpha in (0.1, 0.3, 0.7)]
    objectives += [tk.Objective.sft(), tk.Objective.sft(entropy_coef=0.1), scaled(1.0), scaled(2.0)]
    # With the third number the compiler would make a symbol of it.
    for objective in [*objectives, *objectives]:
        torch.testing.assert_close(compiled(*arguments, objective), loss(*arguments, objective))


@streamed
@pytest.mark.parametrize("which", ["linear", "logits"])
def test_logprobs_and_entropies_are_one_graph(which, backend):
    case = sequence_case(with_bias=True)
    g = torch.Generator().manual_seed(0)
    u, v = (torch.randn(case.targets.shape, generator=g, dtype=torch.float64) for _ in range(2))

    def value(hidden, weight, bias, targets):
        if which == "linear":
            out = tk.linear_logprobs(hidden, weight, targets, bias=bias, entropy=True, backend=backend, softcap=3.0)
        else:
            out = tk.logprobs_from_logits(hidden @ weight.T + bias, targets, entropy=True, backend=backend, softcap=3.0)
        return (u * out.logprobs).sum() + (v * out.entropy).sum()

    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    expected, actual = value(*case.params(), case.targets), compiled(*case.params(), case.targets)
    assert_close(actual, expected, 1e-12, "value")
    pairs = zip(torch.autograd.grad(actual, case.params()), torch.autograd.grad(expected, case.params()), strict=True)
    for a, b in pairs:
        assert_close(a, b, 1e-11, "gradient")


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_is_one_graph(kind, backend):
    case = sequence_case(with_bias=True)
    g = torch.Generator().manual_seed(0)
    ref = [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((*case.targets.shape, 3), (33, 3))]
    mask = torch.rand(case.targets.shape, generator=g) < 0.7
    hidden = case.hidden.detach().clone()
    hidden[~mask] = torch.nan
    params = (hidden.requires_grad_(), *case.params()[1:])

    def value(hidden, weight, bias):
        return tk.linear_divergence(
            hidden, weight, *ref, bias=bias, kind=kind, beta=0.3, mask=mask, temperature=0.8, backend=backend,
            ref_options={"softcap": 2.0},
        )  # fmt: skip

    expected, actual = value(*params), torch.compile(value, fullgraph=True, backend="aot_eager")(*params)
    assert_close(actual.loss, expected.loss, 1e-12, "loss")
    assert_close(actual.tokens, expected.tokens, 1e-12, "tokens")
    pairs = zip(*(torch.autograd.grad(3 * out.loss, params) for out in (actual, expected)), strict=True)
    for a, b in pairs:
        assert b.any()
        assert_close(a, b, 1e-11, "gradient")


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_asft_is_one_graph(backend):
    case = sequence_case()
    g = torch.Generator().manual_seed(0)
    ref = [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((*case.targets.shape, 3), (33, 3))]
    o = tk.Objective.asft(asft_kl=0.3)

    def value(hidden, weight):
        return tk.linear_policy_loss(
            hidden, weight, case.targets, o, mask=case.inputs["mask"], ref_hidden=ref[0], ref_weight=ref[1],
            backend=backend,
        ).loss  # fmt: skip

    params = (case.hidden, case.weight)
    expected, actual = value(*params), torch.compile(value, fullgraph=True, backend="aot_eager")(*params)
    assert_close(actual, expected, 1e-12, "loss")
    for a, b in zip(torch.autograd.grad(actual, params), torch.autograd.grad(expected, params), strict=True):
        assert_close(a, b, 1e-11, "gradient")


# On fibers these sizes take a quarter of a minute.
@pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=[pytest.mark.slow] * (b == "cuda-on-cpu")) for b in STREAMED]
)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_a_compiled_step_keeps_to_three_gemms_and_to_the_budget(dtype, backend):
    case = make_case(400, 20011, 24, dtype=dtype)
    case.targets.clamp_(min=0)
    inputs = {"advantages": torch.ones(400)}

    def loss(hidden, weight, targets, inputs):
        return tk.linear_policy_loss(
            hidden, weight, targets, tk.Objective.trapo(entropy_coef=0.01), backend=backend, **inputs
        ).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")

    def run():
        compiled(case.hidden, case.weight, case.targets, inputs).backward()

    with tk.budget_mb(7), idle_kernels():
        run()
        if backend != "cpu":  # whose own GEMMs the profiler does not see
            assert compiled_gemms(run, case) == 3
        # The gradient of the weight: accumulated, scaled, in the parameter's dtype.
        gradients = sum(p.numel() for p in case.params()) * 14
        assert memory(run).peak <= 7 * 2**20 + gradients + 400 * 8 * 100


@pytest.mark.parametrize("backend", others_slow(BACKENDS))
def test_what_padding_holds_does_not_reach_a_compiled_loss(backend):
    case = make_case(40, 33)
    inactive = ~case.inputs["mask"] | (case.targets == -100)

    def loss(hidden, weight, targets, inputs):
        return tk.linear_policy_loss(hidden, weight, targets, EVERYTHING, backend=backend, **inputs)

    expected = loss(case.hidden, case.weight, case.targets, case.inputs)
    grads = torch.autograd.grad(expected.loss, case.params())
    with torch.no_grad():
        case.hidden[inactive] = torch.nan
    case.targets = case.targets.masked_fill(~case.inputs["mask"], 10**6)
    inputs = {n: t if t.dtype == torch.bool else t.masked_fill(inactive, torch.nan) for n, t in case.inputs.items()}
    out = torch.compile(loss, fullgraph=True, backend="aot_eager")(case.hidden, case.weight, case.targets, inputs)
    assert_close(out.loss, expected.loss, 1e-12, "loss")
    found = torch.autograd.grad(out.loss, case.params())
    assert not found[0][inactive].any()
    for a, b in zip(found, grads, strict=True):
        assert_close(a, b, 1e-11, "gradient")
    for name, value in expected.metrics.items():
        assert_close(out.metrics[name], value, 1e-11, name)


@pytest.mark.parametrize("skip", [False, True])
def test_tokens_without_gradient_and_frozen_parameters_cost_what_they_cost_without_a_compiler(skip):
    case = make_case(40, 257, dtype=torch.float32)
    case.targets.clamp_(min=0)
    case.weight.requires_grad_(False)
    inputs = {"advantages": (torch.arange(40) < 10).float()}

    def loss(hidden, weight, targets, inputs):
        return tk.linear_policy_loss(
            hidden, weight, targets, tk.Objective.grpo(), backend="torch", skip_inactive=skip, **inputs
        ).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    arguments = (case.hidden, case.weight, case.targets, inputs)
    assert compiled_gemms(lambda: compiled(*arguments).backward(), case) == (10 if skip else 40) / 40 + 10 / 40


def test_a_second_backward_through_a_retained_graph_adds_and_a_second_derivative_is_refused():
    case = make_case(40, 33)

    def loss(hidden, weight):
        return tk.linear_policy_loss(hidden, weight, case.targets, EVERYTHING, backend="torch", **case.inputs).loss

    expected = torch.autograd.grad(loss(*case.params()), case.params())
    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(*case.params())
    value.backward(retain_graph=True)
    value.backward(retain_graph=True)
    for p, right in zip(case.params(), expected, strict=True):
        assert_close(p.grad, 2 * right, 1e-11, "gradient")
    (grad,) = torch.autograd.grad(value, case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not .*support double backward"):
        grad.sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_inductor_gives_the_eager_results(name):
    torch.manual_seed(0)
    model = Model(OBJECTIVES[name], "torch").double()
    compiled = torch.compile(model, fullgraph=True)
    same(step(compiled, batch()), step(model, batch()))


# Operators -------------------------------------------------------------------------------------------------------


def value_arguments(case, backend, statistics=("top5_mass", "sum_sq")):
    active = case.inputs["mask"] & (case.targets != -100)
    head = (0.7, 3.0, 1.5, backend)
    wants = (True, case.weight.requires_grad, case.bias is not None)
    return case.hidden, case.weight, case.bias, case.targets, active, True, list(statistics), *head, *wants


@streamed
@pytest.mark.parametrize("variant", ["plain", "bias", "frozen weight", "logits"])
def test_opcheck_of_token_values(variant, backend):
    case = make_case(12, 19, width=5, dtype=torch.float32, with_bias=variant == "bias")
    case.weight.requires_grad_(variant != "frozen weight")
    arguments = list(value_arguments(case, backend))
    if variant == "logits":
        arguments[0] = torch.randn(12, 19, requires_grad=True)
        arguments[1:3], arguments[-3:] = [None, None], [True, False, False]
    torch.library.opcheck(torch.ops.trapo_kernels.token_values.default, tuple(arguments))


@streamed
def test_opcheck_of_token_values_backward(backend):
    case = make_case(12, 19, width=5, dtype=torch.float32, with_bias=True)
    arguments = [t.detach() if isinstance(t, torch.Tensor) else t for t in value_arguments(case, backend)]
    logprobs, entropy, _, top, log_sum, _ = torch.ops.trapo_kernels.token_values(*arguments)
    g = torch.randn_like(logprobs)
    full = (*arguments[:5], logprobs, entropy, top, log_sum, g, None, 2 * g, *arguments[7:])
    torch.library.opcheck(torch.ops.trapo_kernels.token_values_backward.default, full)


@streamed
@pytest.mark.parametrize("name", ["everything", "sequence mean, statistics", "logit", "own"])
def test_opcheck_of_policy_loss(name, backend):
    o, case = OBJECTIVES[name], make_case(12, 19, width=5, dtype=torch.float32, with_bias=True)
    given = case.inputs
    active = given["mask"] & (case.targets != -100)
    live = o.has_gradient(given["expert_mask"], given["advantages"])
    floats = [given[n].float() for n in ("advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs")]
    weights = None if name == "everything" else torch.rand(12)
    policy_weights = torch.rand(12) if name in ("everything", "own") else None
    arguments = (
        *case.params(), case.targets, active, live, given["expert_mask"], *floats, policy_weights, weights,
        ops.objective_key(o), list(o.statistics), 0.7, 3.0, 1.5, backend, True, True, True,
    )  # fmt: skip
    # The schema check reads the storage of every tensor, and inside torch.func, which finds the slopes of a function of
    # the user's, tensors have none.
    which = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    which = which[1:] if name == "own" else which
    torch.library.opcheck(torch.ops.trapo_kernels.policy_loss.default, arguments, test_utils=which)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_of_divergence(kind):
    case = make_case(12, 19, width=5, dtype=torch.float32, with_bias=True)
    ref = [torch.randn(12, 4)], [torch.randn(19, 4)], [torch.empty(0)]
    active, weights = torch.arange(12) % 4 != 1, torch.rand(12).masked_fill(torch.arange(12) == 3, 0)
    heads = (0.7, 3.0, 1.5, 1.1, None, 0.9)
    arguments = (*case.params(), *ref, active, weights, kind, 0.3, [1.0], *heads, True, True, True)
    torch.library.opcheck(torch.ops.trapo_kernels.divergence.default, arguments)


def test_opcheck_of_sums_of_later():
    row = torch.tensor([2, 0, 2, 2, 1, 0])
    torch.library.opcheck(torch.ops.trapo_kernels.sums_of_later.default, (torch.randn(6), row))


def test_every_operator_of_the_library_is_checked_here():
    checked = {"token_values", "token_values_backward", "policy_loss", "divergence", "sums_of_later"}
    names = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "trapo_kernels::" in name
    }
    python = {name for name in names if name in vars(ops)}
    assert python == checked
