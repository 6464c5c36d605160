"""What one path for eager and compiled code would cost in eager code: the streamed losses by their functions of
autograd (autograd.py), and by the operators that a compiled graph calls (ops.py), both called without a compiler.

    python -m bench.two_paths            prints a table (two minutes, 1 thread)

Time is the CPU time of a forward and backward, the best of calls in turns; memory the high-water mark of a process of
its own, beyond what was resident before the step, less the gradients.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import trapo_kernels as tk
from bench.measure import Shape, interleaved, load_case, machine, resident, write_inputs
from bench.providers import Case

SHAPES = {"small": Shape(64, 64, 2048), "a micro-batch of `make demo`": Shape(768, 576, 49152)}
PATHS = ("function of autograd", "operator")


def loss(case: Case) -> Tensor:
    return tk.linear_policy_loss(
        case.hidden,
        case.weight,
        case.targets,
        tk.Objective.trapo(),
        advantages=case.advantages,
        expert_mask=case.expert_mask,
    ).loss


def logprobs(case: Case) -> Tensor:
    return tk.linear_logprobs(case.hidden, case.weight, case.targets, entropy=True).logprobs.sum()


CALLS: dict[str, Callable[[Case], Tensor]] = {"linear_policy_loss": loss, "linear_logprobs": logprobs}


def step(call: str, path: str, case: Case) -> float:
    """Returns the CPU seconds of a forward and backward by this path."""
    case.hidden.grad = case.weight.grad = None
    # What a trace sees: the package chooses the operator where this is true.
    chosen = mock.patch("torch.compiler.is_compiling", return_value=True) if path == "operator" else mock.MagicMock()
    start = time.process_time()
    with chosen:
        found = CALLS[call](case)
    found.backward()
    return time.process_time() - start


def ready(inputs: Path) -> Case:
    case = load_case(inputs)
    case.hidden.requires_grad_(), case.weight.requires_grad_()
    return case


def megabytes(call: str, path: str, inputs: Path) -> float:
    """Returns what a step takes at its peak, in this process."""
    case = ready(inputs)
    step(call, path, case)
    case.hidden.grad = case.weight.grad = None
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step(call, path, case)
    return (resident("VmHWM") - before - 4 * (case.hidden.numel() + case.weight.numel())) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--memory", nargs=3, metavar=("CALL", "PATH", "INPUTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        call, path, inputs = options.memory
        print(megabytes(call, path, Path(inputs)))
        return
    print(json.dumps(machine()))
    print("| shape | call | path | ms | MB |\n| --- | --- | --- | --- | --- |")
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            inputs = write_inputs(shape, Path(folder))
            case = ready(inputs)
            for call in CALLS:
                rounds = options.rounds if shape.vocab > 10_000 else 50 * options.rounds
                runs = {path: functools.partial(step, call, path, case) for path in PATHS}
                best = interleaved(runs, rounds)
                for path in PATHS:
                    command = [sys.executable, "-m", "bench.two_paths", "--memory", call, path, str(inputs)]
                    extra = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                    print(f"| {name}: {shape} | `{call}` | {path} | {best[path] * 1e3:.3g} | {extra:.0f} |", flush=True)


if __name__ == "__main__":
    main()
