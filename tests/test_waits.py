"""A loss on a GPU waits for the device once, for the number of rows. Counted here, on CPU tensors, by the operators and
methods that would wait there."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import EVERYTHING, make_case
from test_learner import rollouts
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import AutoModelForCausalLM

import trapo_kernels as tk
from trapo.config import merge_config
from trapo.trainer import make_learner
from trapo_kernels.arguments import validate
from trapo_kernels.chunks.selection import Selection

# What reads a value on the host, or has a shape that depends on values.
OPERATORS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique", "_unique2", "unique_dim", "equal"}
OPERATORS |= {"unique_consecutive", "unique_dim_consecutive", "is_nonzero", "argwhere", "bincount", "histc"}
# Of CPU tensors these are no operators.
METHODS = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.__array__}


class Waits(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in OPERATORS:
            self.found.append(name)
        if name in ("index", "index_put_", "_index_put_impl_"):  # a mask as an index is a nonzero
            self.found += ["mask"] * sum(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        if name == "repeat_interleave" and not (kwargs or {}).get("output_size"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    aside = False  # while what is made is on the host still

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in METHODS and not Methods.aside:
            self.waits.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


def waits(fn):
    with Waits() as counted, Methods(counted):
        fn()
    return counted.found


def on_the_host(function):
    """The function, which works on what has not gone to the device yet: nothing that it reads waits."""

    def call(*arguments):
        Methods.aside = True
        try:
            with _disable_current_modes():
                return function(*arguments)
        finally:
            Methods.aside = False

    return call


@pytest.fixture(autouse=True)
def _as_on_an_accelerator(monkeypatch):
    """Values are checked on the CPU alone (arguments/validate.py)."""
    monkeypatch.setattr(validate, "can_look", lambda *_: False)


def test_the_counter_sees_what_would_wait():
    x = torch.arange(4.0)
    assert waits(lambda: x.sum().item()) == ["_local_scalar_dense"]
    assert waits(lambda: x.tolist()) == ["tolist"]
    assert waits(lambda: bool(x.sum() > 3)) in (["_local_scalar_dense"], ["is_nonzero"])
    assert waits(lambda: int(x.sum())) == ["_local_scalar_dense"]
    assert waits(lambda: x[x > 1]) == ["mask"]
    assert waits(lambda: x.nonzero()) == ["nonzero"]
    assert waits(lambda: (x * 2).relu().argsort()) == []


OBJECTIVES = {
    "everything": EVERYTHING,
    **{name: getattr(tk.Objective, name)() for name in ("trapo", "grpo", "dr_grpo", "dapo", "sft", "dft", "luffy")},
    **{name: getattr(tk.Objective, name)() for name in ("chord", "sed", "eaft", "lco", "cispo", "sapo")},
    "sequence_mean": tk.Objective.grpo(reduction="sequence_mean"),
}


@pytest.mark.parametrize(
    "options", [{}, {"skip_inactive": True}, {"normalizer": 7.0}, {"statistics": ["sum_sq"]}], ids=str
)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_loss_waits_once_and_its_backward_never(backend, objective, options):
    case = make_case(24, 70, dtype=torch.bfloat16, with_bias=True)
    shaped = {name: t.view(4, 6) for name, t in case.inputs.items()}
    out = []

    def forward():
        out.append(
            tk.linear_policy_loss(
                case.hidden.view(4, 6, -1), case.weight, case.targets.view(4, 6), OBJECTIVES[objective],
                bias=case.bias, backend=backend, **{**shaped, **options},
            )
        )  # fmt: skip

    # The CPU's kernels divide by numbers, which they read from the host's memory.
    read = {"_local_scalar_dense"} if backend == "cpu" else set()
    assert len([wait for wait in waits(forward) if wait not in read]) == 1
    assert set(waits(lambda: out[0].loss.backward())) <= read


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("options", [{}, {"normalizer": 7.0}], ids=str)
def test_a_divergence_waits_once(kind, options):
    case = make_case(24, 70, dtype=torch.float32)
    out = []

    def forward():
        other = case.hidden.detach().flip(1), case.weight.detach().flip(0)
        mask, weights = case.inputs["mask"], case.inputs["advantages"].abs()
        out.append(
            tk.linear_divergence(case.hidden, case.weight, *other, kind=kind, mask=mask, weights=weights, **options)
        )

    assert len(waits(forward)) == 1
    assert waits(lambda: out[0].loss.backward()) == []


def test_logprobs_wait_once_and_once_more_for_the_rows_that_have_a_gradient():
    case = make_case(24, 70, dtype=torch.float32)
    out = []

    def forward():
        out.append(tk.linear_logprobs(case.hidden, case.weight, case.targets, entropy=True))

    assert len(waits(forward)) == 1
    assert len(waits(lambda: out[0].logprobs.sum().backward())) == 1


@pytest.mark.parametrize("skip_inactive", [False, True])
def test_a_loss_with_a_reference_head_waits_once(skip_inactive):
    case = make_case(24, 70, dtype=torch.float32)
    other = {"ref_hidden": case.hidden.detach().flip(1), "ref_weight": case.weight.detach().flip(0)}
    objective, out = tk.Objective.asft(policy="clip"), []

    def forward():
        options = {"skip_inactive": skip_inactive, **case.inputs, **other}
        out.append(tk.linear_policy_loss(case.hidden, case.weight, case.targets, objective, **options))

    assert len(waits(forward)) == 1
    assert waits(lambda: out[0].loss.backward()) == []


def test_losses_of_sequences_and_from_logits_wait_once_each_way():
    case = make_case(24, 70, dtype=torch.float32)
    out = []

    def forward():
        hidden, targets = case.hidden.view(4, 6, -1), case.targets.view(4, 6)
        inputs = {name: t.view(4, 6) for name, t in case.inputs.items()}
        out.append(tk.linear_policy_loss(hidden, case.weight, targets, tk.Objective.gspo(), **inputs))

    assert len(waits(forward)) == 1
    assert len(waits(lambda: out[0].loss.backward())) == 1
    logits = (case.hidden @ case.weight.T).detach().requires_grad_()
    assert len(waits(lambda: tk.policy_loss_from_logits(logits, case.targets, EVERYTHING, **case.inputs))) == 1


@pytest.mark.parametrize(("budget", "updates"), [(4096, 1), (20, 1), (20, 2)])
def test_an_update_waits_once_a_loss_once_an_optimizer_step_and_once_for_its_logs(
    budget, updates, tiny_model_path, monkeypatch
):
    words = [f"train.micro_batch_tokens={budget}", f"train.updates_per_step={updates}"]
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    learner = make_learner(merge_config({}, words), model, pad_id=2)
    batches, sample, done = [], rollouts(), []
    make = on_the_host(learner._batch)
    monkeypatch.setattr(learner, "_batch", lambda group: batches.append(make(group)) or batches[-1])
    found = waits(lambda: done.append(learner.update(sample, tk.Objective.trapo(entropy_coef=0.01), seed=0)))
    assert done[0].optimizer_steps == updates
    assert (len(batches) > updates) == (budget < 100)
    # Of rows that share nothing transformers makes the mask, and looks at their positions.
    unshared = sum(batch.sight is None for batch in batches)
    assert len(found) == len(batches) + unshared + updates + 1


def test_rows_keep_their_order_within_those_with_a_gradient_and_those_without():
    active = torch.tensor([1, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
    live = torch.tensor([0, 1, 1, 0, 0, 1, 1], dtype=torch.bool)
    rows = Selection.choose(active, live)
    assert rows.order.tolist() == [2, 5, 6, 0, 3]
    assert (rows.total, rows.size, rows.with_gradient) == (7, 5, 3)
    leading = torch.tensor([1, 1, 0, 1, 1, 1, 0], dtype=torch.bool)
    rows = Selection.choose(active, live, leading=leading)
    assert rows.order.tolist() == [5, 2, 6, 0, 3]
    assert (rows.size, rows.with_gradient, rows.leading) == (5, 3, 1)
    assert rows.front().order.tolist() == [5]
    rows = Selection.choose(active, live, drop_others=True, leading=leading)
    assert rows.order.tolist() == [5, 2, 6]
    every = torch.ones(7, dtype=torch.bool)
    assert Selection.choose(every, every, leading=every).order is None
    assert Selection.choose(every, every, leading=leading).order.tolist() == [0, 1, 3, 4, 5, 2, 6]
