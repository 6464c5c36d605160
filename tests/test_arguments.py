"""What arguments may be: numbers of numpy and of tensors, masks of integers, normalizers; and torch.autocast around."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from kernel_cases import BACKENDS, EVERYTHING, assert_close, make_case, run

import trapo_kernels as tk


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


backends = pytest.mark.parametrize("backend", BACKENDS)
COMPILED = {"backend": "eager", "fullgraph": True}


def compiled_once_a_backend(names, others):
    """All of (backend, one of the others, whether compiled). A graph takes a second: each backend is compiled with one
    of the others here, and with the rest in the slow suite."""
    for (i, name), (j, (id_, other)), compiled in product(enumerate(names), enumerate(others.items()), (False, True)):
        marks = [pytest.mark.slow] if compiled and i % len(others) != j else []
        yield pytest.param(name, other, compiled, marks=marks, id=f"{name}-{id_}-{'compiled' if compiled else 'eager'}")


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor])
def test_numbers_of_numpy_and_of_tensors_are_numbers(kind):
    case, half = make_case(20, 33, softcap=2.0), kind(0.5)
    right = run(case, EVERYTHING, "torch", temperature=0.5, normalizer=0.5)
    case.head["softcap"] = kind(2.0)
    found = run(case, EVERYTHING, "torch", temperature=half, normalizer=half, ignore_index=np.int64(-100))
    assert found.loss == right.loss
    assert torch.equal(found.grads[0], right.grads[0])
    if kind is not torch.tensor:
        assert tk.Objective.grpo(clip_low=half) == tk.Objective.grpo(clip_low=0.5)
        assert repr(tk.Objective.chord(half).expert_coef) == "0.5"
        assert tk.Objective.sed(sed_k=np.int64(5)).statistics == ("top5_mass",)


def test_a_module_takes_them_too():
    assert tk.TrapoLoss(tk.Objective.grpo(), temperature=np.float32(0.5)).options["temperature"] == 0.5


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
@backends
def test_masks_may_be_0_and_1_of_any_integer_dtype(backend, dtype):
    case = make_case(20, 33)
    right = run(case, EVERYTHING, backend)
    for name in ("mask", "expert_mask"):
        case.inputs[name] = case.inputs[name].to(dtype)
    found = run(case, EVERYTHING, backend)
    assert found.loss == right.loss
    assert torch.equal(found.grads[0], right.grads[0])


# Normalizers -----------------------------------------------------------------------------------------------------


def none_counts(backend, normalizer, objective=EVERYTHING, compiled=False):
    """(loss, gradient) of a batch without a label."""
    case = make_case(20, 33)
    case.targets.fill_(-100)

    def loss(hidden, normalizer):
        return tk.linear_policy_loss(
            hidden, case.weight, case.targets, objective, backend=backend, normalizer=normalizer, **case.inputs
        ).loss

    value = (torch.compile(loss, **COMPILED) if compiled else loss)(case.hidden, normalizer)
    return value, *torch.autograd.grad(value, case.hidden)


ZEROS = {"0": torch.tensor(0), "0.0": torch.tensor(0.0)}


@pytest.mark.parametrize(("backend", "normalizer", "compiled"), compiled_once_a_backend(BACKENDS, ZEROS))
def test_a_count_of_0_counts_as_1(backend, normalizer, compiled):
    loss, grad = none_counts(backend, normalizer, compiled=compiled)
    assert loss == 0
    assert not grad.any()


def test_a_count_of_0_counts_as_1_for_a_divergence():
    hidden = torch.ones(2, 3, requires_grad=True)
    out = tk.linear_divergence(
        hidden,
        torch.eye(4, 3),
        torch.zeros(2, 3),
        torch.eye(4, 3),
        mask=torch.zeros(2).bool(),
        normalizer=torch.tensor(0),
    )
    assert out.loss == 0
    assert not torch.autograd.grad(out.loss, hidden)[0].any()


@pytest.mark.parametrize("wrong", [-1.0, torch.inf, torch.nan])
def test_a_normalizer_out_of_range_is_refused_inside_a_compiled_function_too(wrong):
    with pytest.raises(RuntimeError, match="normalizer must be a number above 0 or a 0-dim tensor, finite and not"):
        none_counts("torch", torch.tensor(wrong), compiled=True)


@pytest.mark.parametrize("objective", [EVERYTHING, tk.Objective.gspo()], ids=["one pass", "two passes"])
@backends
def test_a_normalizer_is_a_constant(backend, objective):
    case = make_case(20, 33)
    normalizer = torch.tensor(7.0, requires_grad=True)
    out = tk.linear_policy_loss(
        case.hidden.view(4, 5, -1), case.weight, case.targets.view(4, 5), objective, backend=backend,
        normalizer=normalizer, **{name: t.view(4, 5) for name, t in case.inputs.items()},
    )  # fmt: skip
    out.loss.backward()
    assert normalizer.grad is None
    assert case.hidden.grad.any()


# A loss without a part -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [tk.Objective.grpo(policy_coef=0.0), tk.Objective.sft(expert_coef=0.0)])
@backends
def test_a_loss_whose_only_term_has_no_weight_has_a_gradient_of_zeros(backend, objective):
    case = make_case(12, 33)
    case.inputs["expert_mask"] = None
    assert not any(grad.any() for grad in run(case, objective, backend).grads)
    logits = torch.randn(12, 33, requires_grad=True)
    out = tk.policy_loss_from_logits(logits, case.targets, objective, backend=backend, **case.inputs)
    assert not torch.autograd.grad(out.loss, logits)[0].any()


# Autocast --------------------------------------------------------------------------------------------------------


def losses(hidden, weight, bias, targets, backend, **inputs):
    """What every public function gives, as one number."""
    ref = hidden.detach().flip(0), weight.detach().flip(0)
    policy = tk.linear_policy_loss(hidden, weight, targets, EVERYTHING, bias=bias, backend=backend, **inputs)
    logprobs = tk.linear_logprobs(hidden, weight, targets, bias=bias, entropy=True, backend=backend)
    kind = backend if backend == "reference" else "torch"
    divergence = tk.linear_divergence(hidden, weight, *ref, bias=bias, backend=kind)
    names = tk.linear_statistics(hidden, weight, targets, ["sum_sq"], bias=bias, backend=backend)
    return policy.loss + (logprobs.logprobs + logprobs.entropy).mean() + divergence.loss + names["sum_sq"].mean()


MIXED = {name: name for name in ("bf16 hidden, fp32 head", "fp32 hidden, bf16 head")}


@pytest.mark.parametrize(
    ("backend", "dtypes", "compiled"), compiled_once_a_backend(("torch", "reference", "cpu"), MIXED)
)
def test_autocast_casts_what_differs_as_it_casts_f_linear(backend, dtypes, compiled):
    case = make_case(20, 33, dtype=torch.float32, with_bias=True)
    params = [p.detach().clone() for p in case.params()]
    if dtypes.startswith("bf16"):
        params[0] = params[0].bfloat16()
    if dtypes.endswith("bf16 head"):
        params[1:] = [p.bfloat16() for p in params[1:]]
    narrow = [p.bfloat16().requires_grad_() for p in params]
    expected = losses(*narrow, case.targets, backend, **case.inputs)
    right = torch.autograd.grad(expected, narrow)
    params = [p.requires_grad_() for p in params]
    function = torch.compile(losses, **COMPILED) if compiled else losses
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = function(*params, case.targets, backend, **case.inputs)
        grads = torch.autograd.grad(value, params)  # inside of it
    assert value.dtype == torch.float32
    assert_close(value, expected, 1e-6, "value")
    for p, grad, exact in zip(params, grads, right, strict=True):
        assert grad.dtype == p.dtype
        assert_close(grad, exact, 1e-2, "gradient")  # sums of three, of which one or the other is rounded


def test_autocast_leaves_float64_alone_and_what_it_does_not_cast_must_match():
    case = make_case(20, 33, with_bias=True)
    expected = losses(*case.params(), case.targets, "torch", **case.inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert losses(*case.params(), case.targets, "torch", **case.inputs) == expected
        with pytest.raises(TypeError, match="linear_logprobs: weight must have the dtype of hidden; got bfloat16"):
            tk.linear_logprobs(case.hidden, case.weight.float(), case.targets)


def test_the_backward_of_the_reference_inside_autocast_is_that_outside():
    case = make_case(20, 33, dtype=torch.float32, with_bias=True)

    def loss():
        inputs = {"bias": case.bias, "backend": "reference", **case.inputs}
        return tk.linear_policy_loss(case.hidden, case.weight, case.targets, EVERYTHING, **inputs).loss

    out = loss(), loss()
    right = torch.autograd.grad(out[0], case.params())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b in zip(torch.autograd.grad(out[1], case.params()), right, strict=True):
            assert_close(a, b, 1e-6, "gradient")
