"""Inside a CUDA graph capture the same kernels run as in the warm-up before it: a kernel that is first launched in a
capture would have to be compiled and loaded there, where that is forbidden."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from kernel_cases import (
    BACKENDS,
    DEVICE,
    EVERYTHING,
    TOLERANCE,
    assert_close,
    assert_same_result,
    make_case,
    oracle,
    run,
)
from torch.utils._python_dispatch import TorchDispatchMode

import trapo_kernels as tk
from bench.gpu.graphs import captured
from trapo_kernels.backends.cpu import operands
from trapo_kernels.backends.triton.rows import interpreted
from trapo_kernels.chunks import selection

ROWS = 16  # a number for which Triton compiles another kernel, if it may
IDS = torch.arange(ROWS) // 4
CASES: dict[str, tuple[tk.Objective, dict[str, Any]]] = {
    "everything": (EVERYTHING, {}),
    "skip_inactive": (tk.Objective.trapo(), {"skip_inactive": True}),
    "sequence mean": (tk.Objective.grpo(reduction="sequence_mean", entropy_coef=0.1), {"sequence_ids": IDS}),
    "not fused": (tk.Objective(policy="cispo", expert=None), {}),
    "coupled": (tk.Objective.gspo(), {"sequence_ids": IDS}),
}
KERNELS = [name for name in BACKENDS if name in ("triton", "cuda", "cuda-on-cpu", "cpu")]
FUSED = {"triton": "row_fused", "cuda": "row_fused_", "cuda-on-cpu": "row_fused_", "cpu": "row_fused_"}


class Operators(TorchDispatchMode):
    """Which operators of ours are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("trapo_kernels_"):
            self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _kind(value: Any) -> Any:
    """What Triton compiles another kernel for, of an argument."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if type(value) is int:
        return value == 1, value % 16 == 0
    return "a number" if type(value) is float else value


@contextmanager
def launched(backend: str):
    """The kernels that are launched: names, and for Triton everything that makes another compilation of one."""
    if backend != "triton":
        with Operators() as operators:
            yield operators.seen
        return
    from triton.runtime.interpreter import InterpretedFunction

    seen, real = set(), InterpretedFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        options = {name: _kind(value) for name, value in kwargs.items() if name not in ("grid", "warmup")}
        free = getattr(self, "kwargs", {}).get("do_not_specialize") or ()
        given = [None if name in free else _kind(value) for name, value in zip(self.arg_names, args, strict=False)]
        seen.add((self.fn.__name__, tuple(given), tuple(sorted(options.items(), key=repr))))
        return real(self, *args, **kwargs)

    with mock.patch.object(InterpretedFunction, "run", run):
        yield seen


def case_of(dtype=torch.float32, **options):
    """Rows that count and rows that do not, which hold what a caller may have left there."""
    case = make_case(ROWS, 70, dtype=dtype, with_bias=True, **options)
    case.inputs["mask"][0], case.targets[0], case.targets[1] = False, 3, -100
    inactive = ~case.inputs["mask"] | (case.targets == -100)
    with torch.no_grad():
        case.hidden[inactive] = torch.nan
    for name in ("advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs"):
        case.inputs[name] = case.inputs[name].masked_fill(inactive, torch.nan)
    return case


def steps(case, objective, backend, **options):
    """What a user's graph holds: a loss with its gradients, and log-probabilities."""
    found = run(case, objective, backend, **options)
    with torch.no_grad():
        tk.linear_logprobs(case.hidden.nan_to_num(), case.weight, case.targets, bias=case.bias, backend=backend)
    return found


@pytest.mark.skipif(not interpreted(), reason="a capture is imitated; below is a real one")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", KERNELS)
def test_a_capture_launches_no_kernel_that_its_warm_up_did_not(backend, name, monkeypatch):
    objective, options = CASES[name]
    # In 16 bits, as on GPUs; the row kernels of the CPU are not those of its fp32 passes.
    case = case_of(torch.bfloat16)
    with launched(backend) as before:
        expected = steps(case, objective, backend, **options)
    monkeypatch.setattr(selection, "_capturing", lambda device: True)
    with launched(backend) as inside:
        actual = steps(case, objective, backend, **options)
    assert inside
    assert inside <= before
    assert_same_result(actual, expected, torch.bfloat16)
    for key, value in expected.metrics.items():
        assert_close(actual.metrics[key], value, 3e-2, key, floor=1.0)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_tokens_and_rows_that_do_not_count_are_fused(backend, reduction, dtype, monkeypatch):
    if backend == "triton" and not interpreted():
        pytest.skip("launches are seen in the interpreter")
    if backend == "cpu" and operands.products_of(dtype) is not None:
        pytest.skip("has passes of its own")
    objective = tk.Objective(expert="luffy", policy="clip", entropy_coef=0.05, kl_coef=0.1, reduction=reduction)
    case = case_of(dtype)
    clean = make_case(ROWS, 70, dtype=dtype, with_bias=True)
    clean.inputs["mask"][0], clean.targets[0], clean.targets[1] = False, 3, -100
    expected = oracle(clean, objective, sequence_ids=IDS)
    for capturing in (False, True):
        monkeypatch.setattr(selection, "_capturing", lambda device, now=capturing: now)
        with launched(backend) as seen:
            actual = run(case, objective, backend, sequence_ids=IDS)
        names = {k if isinstance(k, str) else k[0] for k in seen}
        assert names == {FUSED[backend]} | ({"target_logits"} if dtype == torch.bfloat16 else set())
        assert_same_result(actual, expected, dtype)


@pytest.mark.skipif(DEVICE != "cuda", reason="only a GPU captures graphs: pytest --device cuda")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_step_gives_the_loss_and_gradients_of_new_inputs_when_replayed(backend, name, dtype):
    objective, options = CASES[name]
    case, other = case_of(dtype), case_of(dtype, seed=1)
    case.requires_grad()

    def step():
        out = tk.linear_policy_loss(case.hidden, case.weight, case.targets, objective, bias=case.bias, backend=backend,
                                    **case.inputs, **options)  # fmt: skip
        return out.loss, *torch.autograd.grad(out.loss, case.params())

    replay = captured(step, DEVICE)
    for given in (case, other, case_of(dtype)):
        with torch.no_grad():
            for mine, new in zip(case.params(), given.params(), strict=True):
                mine.copy_(new)
            case.targets.copy_(given.targets)
            for key, value in given.inputs.items():
                case.inputs[key].copy_(value)
        loss, *grads = replay()
        torch.cuda.synchronize()
        expected = run(case, objective, backend, **options)
        assert_close(loss, expected.loss, TOLERANCE[dtype], "loss", floor=1.0)
        for a, b in zip(grads, expected.grads, strict=True):
            assert_close(a, b, TOLERANCE[dtype], "gradient")
