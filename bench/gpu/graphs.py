"""Stage: a loss and its gradients captured in a CUDA graph after the usual warm-up, replayed on other inputs, and held
against the same call without a graph. On a CPU the same code runs without one."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

import trapo_kernels as tk
from bench.gpu.losses import make_case
from bench.gpu.rows import Rows, one_line, options, seconds_of
from bench.providers import Case

__all__ = ["main"]

SHAPES = {"cuda": (4096, 2048, 128256), "cpu": (24, 16, 257)}
OBJECTIVES = {
    "trapo": tk.Objective.trapo(entropy_coef=0.001),
    "sequence mean": tk.Objective.grpo(reduction="sequence_mean"),
}

Step = Callable[[], tuple[Tensor, ...]]


def step_of(case: Case, ids: Tensor, mask: Tensor, objective: tk.Objective, backend: str) -> Step:
    def step() -> tuple[Tensor, ...]:
        out = tk.linear_policy_loss(
            case.hidden, case.weight, case.targets, objective, advantages=case.advantages,
            expert_mask=case.expert_mask if objective.expert else None, mask=mask, backend=backend,
            sequence_ids=ids if objective.reduction == "sequence_mean" else None,
        )  # fmt: skip
        return out.loss, *torch.autograd.grad(out.loss, (case.hidden, case.weight))

    return step


def captured(step: Step, device: str) -> Step:
    """Returns the step as a graph: three calls on a side stream, then the capture. Each replay writes its outputs
    anew."""
    if device == "cpu":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return outputs

    return replay


def refill(case: Case, mask: Tensor) -> None:
    """Puts other values into the same memory, and lets other tokens not count."""
    g = torch.Generator(case.hidden.device).manual_seed(1)
    with torch.no_grad():
        case.hidden.normal_(generator=g)
        case.advantages.normal_(generator=g)
        case.targets.random_(0, case.weight.shape[0], generator=g)
        mask.copy_(torch.rand(mask.shape, generator=g, device=mask.device) < 0.6)


def compared(name: str, backend: str, device: str) -> dict[str, float]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    case = make_case(*SHAPES[device], dtype, device)
    n = case.hidden.shape[0]
    ids, mask = torch.arange(n, device=device) // 8, torch.ones(n, dtype=torch.bool, device=device)
    step = step_of(case, ids, mask, OBJECTIVES[name], backend)
    replay = captured(step, device)
    refill(case, mask)
    found = [t.detach().clone() for t in replay()]
    pairs = zip(found, step(), strict=True)
    error = max(((a.double() - b.double()).abs().max() / b.abs().max()).item() for a, b in pairs)
    return {
        "error": error,
        "ms": 1e3 * seconds_of(step, device, 0.3),
        "replayed_ms": 1e3 * seconds_of(replay, device, 0.3),
    }


def main(arguments: list[str] | None = None) -> int:
    chosen = options(__doc__, arguments)
    rows, bad = Rows(chosen.rows), False
    for backend in tk.backends().values():
        if backend.kernel is None or backend.device not in (None, chosen.device) or not backend.available:
            continue
        for name in OBJECTIVES:
            try:
                row = compared(name, backend.name, chosen.device)
                bad |= not row["error"] <= 2e-2
                rows.add(what="graph", backend=backend.name, objective=name, **row)
            except Exception as error:
                bad = True
                rows.add(what="graph", backend=backend.name, objective=name, failed=one_line(error))
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
