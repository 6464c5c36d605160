"""Functions of a user's as terms: the documentation's examples, derivatives, and what is refused."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from kernel_cases import (
    BACKENDS,
    DTYPES,
    STREAMED,
    affordable,
    assert_same_result,
    gemms,
    make_case,
    memory,
    oracle,
    policy_loss,
    run,
)
from test_terms import sequence_case

import trapo_kernels as tk

PAGE = Path(__file__).parents[1] / "docs" / "own_terms.md"
backends = pytest.mark.parametrize("backend", BACKENDS)


def focal(logprobs):
    return -((1 - logprobs.exp()) ** 2) * logprobs


def everything(logprobs, entropy, target_logits, advantages, top5_mass, ref_logprobs=None, old_logprobs=None):
    gate = torch.sigmoid(logprobs - old_logprobs) if old_logprobs is not None else 1.0
    return (
        -advantages * gate * logprobs
        + 0.1 * (target_logits - 1).square()
        + top5_mass * entropy.square()
        + 0.3 * logprobs.detach().exp() * logprobs
        + (0 if ref_logprobs is None else 0.2 * (logprobs - ref_logprobs).square())
    )


def my_trsft(logprobs):
    inside = logprobs >= torch.log(torch.tensor(0.1, dtype=logprobs.dtype))
    return torch.where(inside, -logprobs, 1 + 2.302585092994046 - logprobs.exp() / 0.1)


def my_clip(logprobs, advantages, old_logprobs):
    ratio = (logprobs - old_logprobs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)


OWN = {
    "focal": tk.Objective(expert=focal, policy=None),
    "everything": tk.Objective(expert=None, policy=everything, tis_cap=2.0, entropy_coef=0.05, kl_coef=0.1),
    "both": tk.Objective(expert=everything, policy=my_clip, policy_coef=0.5, reduction="sequence_mean"),
    "with a coupled term": tk.Objective(expert=everything, policy="gspo"),
}


def test_the_example_that_stays_near_the_reference_is_sft_there_and_ends_at_its_bound():
    code = next(b for b in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "near_reference" in b)
    names = {}
    exec(compile(code.partition("\n\n\n")[0], str(PAGE), "exec"), names)
    objective = tk.Objective(expert=names["near_reference"], policy=None)
    ref = torch.tensor([-3.0, -3.0, -3.0], dtype=torch.float64)
    logprobs = (ref + torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)).requires_grad_()  # of λ = 0.5: 1/λ = 2
    tokens = tk.Tokens(logprobs, torch.zeros(3).double(), torch.ones(3, dtype=torch.bool), ref_logprobs=ref)
    (by_autograd,) = torch.autograd.grad(objective.losses(tokens)["expert"].sum(), logprobs)
    assert by_autograd.tolist() == [-1.0, -0.5, 0.0]
    assert objective.slopes(tokens)[0].tolist() == by_autograd.tolist()


@backends
def test_the_examples_of_the_documentation_run(backend, capsys):
    case = sequence_case(b=affordable(backend, 8), dtype=torch.float32)
    names = {"hidden": case.hidden, "weight": case.weight, "targets": case.targets, **case.inputs}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 8
    tk.set_backend(backend)
    try:
        objectives = []
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
            objectives.append(names.get("objective"))
    finally:
        tk.set_backend(None)
    printed = capsys.readouterr().out
    assert "misspelt: parameters must be among logprobs, " in printed
    assert "a function of yours by autograd" in printed
    case = sequence_case(b=affordable(backend, 8))
    for objective in {id(o): o for o in objectives}.values():
        assert_same_result(run(case, objective, backend), oracle(case, objective), torch.float64)


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", OWN)
def test_loss_and_gradients_agree_with_plain_autograd(name, dtype, backend):
    case = sequence_case(b=affordable(backend, 6), t=8, vocab=129, width=16, dtype=dtype, seed=2)
    with tk.budget_mb(0.01):
        actual = run(case, OWN[name], backend)
    assert_same_result(actual, oracle(case, OWN[name]), dtype)


@backends
def test_a_function_that_is_a_builtin_term_has_its_loss_and_gradients(backend):
    case = make_case(affordable(backend, 60), 33)
    mine = run(case, tk.Objective(expert=my_trsft, policy=my_clip), backend)
    assert_same_result(mine, oracle(case, tk.Objective(clip_low=0.2, clip_high=0.28)), torch.float64)


@backends
def test_gradcheck(backend):
    def smooth(logprobs, entropy, target_logits, advantages):
        return advantages * (0.5 * logprobs).exp() + entropy * target_logits.sin()

    case = make_case(6, 5, width=3, softcap=2.0, temperature=0.7)
    o = tk.Objective(expert=smooth, policy=smooth)

    def loss(hidden, weight):
        return tk.linear_policy_loss(hidden, weight, case.targets, o, backend=backend, **case.inputs, **case.head).loss

    assert torch.autograd.gradcheck(loss, (case.hidden, case.weight))


@backends
def test_padding_and_poles_of_other_tokens_do_not_reach_the_gradient(backend):
    def pole(logprobs):  # not a number at p = 1, which is what padding looks like
        return torch.log(-torch.expm1(logprobs))

    case = make_case(40, 33)
    out = run(case, tk.Objective(expert=pole, policy="clip"), backend)
    assert torch.isfinite(out.loss)
    assert all(torch.isfinite(g).all() for g in out.grads)


@pytest.mark.parametrize("backend", STREAMED)
def test_it_costs_three_gemms_and_the_memory_of_any_other_term(backend):
    case = make_case(400, 20011, 24, dtype=torch.float32)
    case.targets.clamp_(min=0)
    case.inputs = {}
    own, builtin = tk.Objective(expert=focal, policy=None), tk.Objective.sft()

    def step(objective):
        policy_loss(case, objective, backend).loss.backward()

    assert gemms(lambda: step(own), case) == 3
    with tk.budget_mb(7):
        assert memory(lambda: step(own)).peak <= memory(lambda: step(builtin)).peak + 400 * 8 * 10


@backends
def test_defaults_stand_for_inputs_that_were_not_given_and_others_are_demanded(backend):
    case = sequence_case()
    case.inputs["old_logprobs"] = case.inputs["ref_logprobs"] = None
    assert_same_result(run(case, OWN["both"], backend, old_logprobs=case.targets.double()), run(
        case, OWN["both"], "reference", old_logprobs=case.targets.double()), torch.float64)  # fmt: skip
    with pytest.raises(ValueError, match=r"^linear_policy_loss: old_logprobs must be a tensor, which policy=my_clip"):
        policy_loss(case, OWN["both"], backend)


@backends
def test_a_wrong_shape_is_refused_in_one_line(backend):
    def mean(logprobs):
        return -logprobs.mean()

    case = make_case(8, 33)
    with pytest.raises(ValueError, match=r"^mean: must return a loss per token, \[\d+\]; got \[\]$"):
        policy_loss(case, tk.Objective(expert=mean, policy=None), backend)


def test_unknown_parameters_are_refused_when_the_objective_is_made():
    def wrong(logprobs, temperature):
        return logprobs

    def many(*logprobs):
        return logprobs

    for fn in (wrong, many):
        with pytest.raises(TypeError, match=rf"^{fn.__name__}: parameters must be among logprobs, entropy, .*; got "):
            tk.Objective(expert=fn)


def test_objectives_with_functions_are_equal_hashable_and_explained():
    assert tk.Objective(expert=focal) == tk.Objective(expert=focal) != tk.Objective(expert=my_trsft)
    assert hash(tk.Objective(expert=focal)) == hash(tk.Objective(expert=focal))
    assert "expert focal" in tk.Objective(expert=focal).explain()
    assert OWN["everything"].needs.keys() == {"advantages", "ref_logprobs", "rollout_logprobs"}
    assert OWN["everything"].statistics == ("top5_mass",)


def test_constants_are_bound_by_partial_and_keep_their_defaults():
    def power(logprobs, gamma=2.0):
        return -((1 - logprobs.exp()) ** gamma) * logprobs

    case = make_case(40, 33)
    for fn, same in (
        (power, True),
        (functools.partial(power, gamma=2), True),
        (functools.partial(power, gamma=3), False),
    ):
        o = tk.Objective(expert=fn, policy=None)
        assert "expert power" in o.explain()
        assert torch.allclose(run(case, o, "torch").loss, oracle(case, OWN["focal"]).loss) == same
