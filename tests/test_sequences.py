"""Which sequence a token belongs to: sums by row or by packed ids, without a host sync or a graph break."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import assert_close
from test_terms import NEW, sequence_case
from test_waits import waits

import trapo_kernels as tk

READING = {
    "sequence_mean": tk.Objective.sft(reduction="sequence_mean"),
    "grpo, sequence_mean": tk.Objective.grpo(reduction="sequence_mean", entropy_coef=0.01),
    "gspo": tk.Objective.gspo(clip_low=0.1, clip_high=0.2),
    "pear": tk.Objective.pear(),
    "all": NEW["eaft+gspo+all"],
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("ids", [[], [5], [7, 7, -2, 7, 3, -2, 7], [1] * 40, list(range(9)), [0, 1] * 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_those_of_a_loop(ids, dtype):
    sequences, n = tk.Sequences.of(torch.tensor(ids, dtype=torch.int64)), len(ids)
    values = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=dtype)
    total = [sum(v for v, other in zip(values.tolist(), ids, strict=True) if other == i) for i in ids]
    later = [sum(v for v, other in zip(values.tolist()[at + 1 :], ids[at + 1 :], strict=True) if other == i)
             for at, i in enumerate(ids)]  # fmt: skip
    torch.testing.assert_close(sequences.total(values), torch.tensor(total, dtype=dtype))
    torch.testing.assert_close(sequences.later(values), torch.tensor(later, dtype=dtype))
    chosen = values > 0
    assert sequences.with_any(chosen) == len({i for i, c in zip(ids, chosen.tolist(), strict=True) if c})


def test_rows_are_sequences_and_an_infinite_value_stays_in_its_own():
    values = torch.tensor([1.0, torch.inf, 2, 3, torch.nan, 5])
    sequences = tk.Sequences.of_rows(3, 2)
    torch.testing.assert_close(
        sequences.total(values), torch.tensor([torch.inf, torch.inf, 5, 5, torch.nan, torch.nan]), equal_nan=True
    )
    torch.testing.assert_close(sequences.later(values), torch.tensor([torch.inf, 0, 3, 0, 5, 0]))


def packed(b=4, t=6, seed=0):
    case = sequence_case(b, t, 67, seed=seed)
    flat = {name: None if x is None else x.reshape(-1) for name, x in case.inputs.items()}
    ids = torch.arange(b * t) // t
    return case.hidden.detach().reshape(b * t, -1).requires_grad_(), case.weight, case.targets.reshape(-1), ids, flat


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", READING)
def test_packed_ids_are_one_graph_with_the_eager_results(name, deterministic):
    def loss(hidden, weight, targets, ids, inputs):
        return tk.linear_policy_loss(hidden, weight, targets, READING[name], sequence_ids=ids, **inputs).loss

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="eager")
    torch.use_deterministic_algorithms(deterministic)
    try:
        for b, t in ((4, 6), (3, 11)) if deterministic else ((4, 6), (3, 11), (5, 8)):
            arguments = packed(b, t)
            expected, actual = loss(*arguments), compiled(*arguments)
            assert_close(actual, expected, 1e-11, "loss")
            right, found = (torch.autograd.grad(value, arguments[:2]) for value in (expected, actual))
            assert right[0].any()
            for a, e in zip(found, right, strict=True):
                assert_close(a, e, 1e-11, "gradient")
    finally:
        torch.use_deterministic_algorithms(False)


def test_lengths_may_change_without_a_second_graph():
    def loss(hidden, weight, targets, ids, inputs):
        return tk.linear_policy_loss(hidden, weight, targets, READING["pear"], sequence_ids=ids, **inputs).loss

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for b, t in ((4, 6), (3, 11), (7, 9)):
            compiled(*packed(b, t))


@pytest.mark.parametrize("name", READING)
def test_packed_ids_in_any_order_are_the_rows_they_name(name):
    hidden, weight, targets, ids, inputs = packed()
    o = replace(READING[name])
    rows = tk.linear_policy_loss(hidden, weight, targets, o, sequence_ids=ids, **inputs).loss
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))
    order = order[(ids[order] * 1000 + order).argsort()]  # tokens of a sequence keep their order
    order = torch.cat([order[i::6] for i in range(6)])  # and those of several are mixed
    moved = {name: None if x is None else x[order] for name, x in inputs.items()}
    mixed = tk.linear_policy_loss(hidden[order], weight, targets[order], o, sequence_ids=-3 * ids[order], **moved).loss
    assert_close(mixed, rows, 1e-12, "loss")


def test_finding_sequences_waits_for_nothing():
    ids, values = torch.arange(20) // 6, torch.randn(20)

    def read():
        sequences = tk.Sequences.of(ids)
        return sequences.total(values), sequences.later(values), sequences.with_any(values > 0)

    assert waits(read) == []
