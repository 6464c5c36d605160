"""How many torch operations a fused loss takes around its kernels: on a GPU each is a launch of microseconds."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from kernel_cases import BACKENDS, EVERYTHING, make_case, policy_loss
from torch.utils._python_dispatch import TorchDispatchMode

import trapo_kernels as tk
from trapo_kernels.arguments import validate

# Those that have the terms in their kernels.
FUSED = [name for name in ("triton", "cpu") if name in BACKENDS]

# They compute nothing: views, and memory that is not written.
VIEWS = {"view", "slice", "select", "expand", "unsqueeze", "squeeze", "detach", "alias", "t", "unbind"}
VIEWS |= {"empty", "new_empty", "empty_like"}


class Operations(TorchDispatchMode):
    """Every operation that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations(backend: str, objective: tk.Objective, given: tuple[str, ...], **options: Any) -> tuple[int, int]:
    """(all, those that compute something) of a forward of one chunk, metrics included, without those of CPU tensors
    alone: looking for targets out of range, widening 16-bit operands of products, and keeping d_hidden wide."""
    # On a CPU other heads go by panels, where terms are torch's.
    case = make_case(12, 64, width=8, dtype=torch.float64 if backend == "cpu" else torch.bfloat16)
    case.inputs = {name: _in_fp32(value) if name in given else None for name, value in case.inputs.items()}
    with Operations() as counted, mock.patch.object(validate, "can_look", return_value=False):
        policy_loss(case, objective, backend, **options)
    widened = 2 if backend == "cpu" else 3
    return counted.seen.total() - widened, sum(n for name, n in counted.seen.items() if name not in VIEWS) - widened


def _in_fp32(value: torch.Tensor | None) -> torch.Tensor | None:
    return value.float() if value is not None and value.is_floating_point() else value


@pytest.mark.parametrize("backend", FUSED)
def test_a_fused_loss_with_all_metrics_takes_so_many_operations(backend: str) -> None:
    """Of a kernel for the target's logit there is one on GPUs; the CPU's backend has plain torch."""
    trapo = operations(backend, tk.Objective.trapo(entropy_coef=0.01), ("advantages", "expert_mask"))
    everything = operations(backend, EVERYTHING, tuple(make_case(1, 2).inputs))
    found = (*trapo, *everything)
    plain = {"cpu": 8}.get(backend, 0)
    assert all(n <= most + plain for n, most in zip(found, (104, 60, 189, 127), strict=True)), found


@pytest.mark.parametrize("backend", FUSED)
def test_the_parts_of_a_loss_are_computed_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, losses = [], tk.Objective.losses
    monkeypatch.setattr(tk.Objective, "losses", lambda o, *given: calls.append(o) or losses(o, *given))
    case = make_case(12, 64, width=8, dtype=torch.bfloat16)
    for objective in (EVERYTHING, tk.Objective.grpo()):  # in one pass
        policy_loss(case, objective, backend)
        policy_loss(case, objective, "reference")
    assert len(calls) == 4
