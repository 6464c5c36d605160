"""A backend is two verbs and one line of a table: one is written here, and does what the others do."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from kernel_cases import EVERYTHING, HEADS, assert_close, assert_same_result, make_case, oracle, run

import trapo_kernels as tk
from trapo_kernels.backends import dispatch
from trapo_kernels.backends.base import RowKernel, RowState, stats_dtype


def _z(logits, cap):
    z = logits.to(stats_dtype(logits.dtype))
    return z if cap is None else cap * torch.tanh(z / cap)


def stats(logits, targets, cap, entropy):
    z = _z(logits, cap)
    top, column = z.max(1)
    below = z - top[:, None]
    rest = below.exp().scatter(1, column[:, None], 0).sum(1)
    return RowState(top, rest, (below.exp() * below).sum(1), z.gather(1, targets[:, None]).squeeze(1))


def grad_(logits, targets, stats, g_lp, g_entropy, cap):
    z = _z(logits, cap)
    log_pi = z - stats.max[:, None] - stats.log_sum[:, None]
    dz = -log_pi.exp() * g_lp[:, None]
    dz[torch.arange(len(targets)), targets] += g_lp
    if g_entropy is not None:
        dz -= g_entropy[:, None] * log_pi.exp() * (log_pi + stats.entropy[:, None])
    logits.copy_(dz if cap is None else dz * (1 - (z / cap).square()))


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    line = dispatch.Backend("toy", RowKernel(stats, grad_), "two verbs in plain torch", automatic=False)
    monkeypatch.setattr(dispatch, "_BACKENDS", [*dispatch._BACKENDS, line])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_two_verbs_give_every_loss_and_gradient(dtype, head):
    case = make_case(40, 257, dtype=dtype, **HEADS[head])
    assert_same_result(run(case, EVERYTHING, "toy"), oracle(case, EVERYTHING), dtype)


@pytest.mark.parametrize("preset", ["trapo", "sft", "luffy", "sed", "lco", "cispo"])
def test_a_term_runs_on_it_without_a_line_of_its_own(preset):
    objective = getattr(tk.Objective, preset)(entropy_coef=0.01)
    case = make_case(40, 257, dtype=torch.float64)
    with tk.budget_mb(0.02):  # several chunks
        actual = run(case, objective, "toy")
    assert_same_result(actual, oracle(case, objective), torch.float64)


def test_logprobs_entropies_and_statistics_run_on_it():
    case = make_case(40, 257, dtype=torch.float64)
    arguments = case.hidden, case.weight, case.targets
    names = ["top20_mass", "sum_sq", "argmax_match"]
    found = {}
    for backend in ("toy", "reference"):
        out = tk.linear_logprobs(*arguments, entropy=True, backend=backend)
        grads = torch.autograd.grad((out.logprobs + out.entropy.square()).sum(), case.params())
        found[backend] = [*out, *grads, *tk.linear_statistics(*arguments, names, backend=backend).values()]
    for a, b in zip(found["toy"], found["reference"], strict=True):
        assert_close(a, b, 1e-11, "value")


def test_a_compiled_function_finds_it_too():
    case = make_case(12, 31, dtype=torch.float64)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(hidden, weight):
        return tk.linear_policy_loss(
            hidden, weight, case.targets, EVERYTHING, backend="toy", **case.inputs, **case.head
        ).loss

    found = loss(case.hidden, case.weight)
    assert_close(found, oracle(case, EVERYTHING).loss, 1e-11, "loss", floor=1.0)


def test_it_is_named_among_the_backends_and_in_messages():
    assert str(tk.backends()["toy"]) == "toy: two verbs in plain torch"
    with pytest.raises(ValueError, match=r"must be one of .*'toy' or None; got 'toi'"):
        tk.linear_logprobs(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.int64), backend="toi")


def test_an_ability_that_is_misspelt_is_refused():
    with pytest.raises(TypeError, match="fused"):
        RowKernel(stats, grad_, fused=grad_)


def test_no_ability_is_looked_for_by_its_name():
    """What the package reads off a kernel is a field of RowKernel, and is read as one."""
    declared, seen = {field.name for field in fields(RowKernel)}, set()
    for path in Path(tk.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
                assert "kernel" not in ast.unparse(node.args[0]), f"{path.name}: {ast.unparse(node)}"
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("kernel", "job.kernel", "self.kernel"):
                seen.add(node.attr)
    assert seen - {"name"} == declared  # `name`: of what stands for a kernel inside a compiled graph
