"""One provider in one process: time, memory and gradient error of a loss, as the process that asked for it is told.

Inputs lie in a file of shared memory that every process maps, so that many providers can wait side by side and be timed
in turns. Memory is the process's own high-water mark, reset before the step, less what was resident before and less
the gradients themselves.
"""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import multiprocessing
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.providers import PROVIDERS, Case, Provider, oracle

SEED = 0
# d_weight is compared in this many rows at most, those of the first targets among them.
COMPARED_ROWS = 4096
LARGEST_ORACLE = 2**29  # logits; 4 GiB of them in float64, several times over
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "trl", "liger-kernel", "cut-cross-entropy", "transformers")


@dataclass(frozen=True)
class Shape:
    tokens: int
    width: int
    vocab: int

    def __str__(self) -> str:
        return f"N={self.tokens} D={self.width} V={self.vocab}"


def write_inputs(shape: Shape, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Writes random inputs of the scale of a trained head's: logits of about unit variance. The head is in `dtype`."""
    g = torch.Generator().manual_seed(SEED)
    n, d, v = shape.tokens, shape.width, shape.vocab
    inputs = {
        "hidden": torch.randn(n, d, generator=g).to(dtype),
        "weight": torch.randn(v, d, generator=g).div_(d**0.5).to(dtype),
        "targets": torch.randint(0, v, (n,), generator=g),
        "advantages": torch.randn(n, generator=g),
        "expert_mask": torch.rand(n, generator=g) < 0.3,
    }
    path = folder / "inputs.pt"
    torch.save(inputs, path)
    return path


def load_case(path: Path) -> Case:
    """Returns the inputs, mapped and touched."""
    inputs = torch.load(path, mmap=True, weights_only=True)
    for t in inputs.values():
        t.sum()
    return Case(**inputs)


def compared_rows(case: Case) -> Tensor:
    """Returns the rows of d_weight in which gradients are compared."""
    spread = torch.arange(0, case.weight.shape[0], max(1, case.weight.shape[0] // (COMPARED_ROWS // 2)))
    return torch.cat([spread, case.targets[: COMPARED_ROWS // 2]]).unique()


def write_oracle(inputs: Path, gives: str) -> Path | None:
    """Writes the float64 gradients of the loss that some providers give; None where they would not fit."""
    case = load_case(inputs)
    if case.hidden.shape[0] * case.weight.shape[0] > LARGEST_ORACLE:
        return None
    rows = compared_rows(case)
    case = case.double()
    case.hidden.requires_grad_(), case.weight.requires_grad_()
    d_hidden, d_weight = torch.autograd.grad(oracle(case, gives), (case.hidden, case.weight))
    path = inputs.with_name(f"oracle-{gives}.pt")
    torch.save({"d_hidden": d_hidden, "d_weight": d_weight[rows].clone()}, path)
    return path


def free_gradients(case: Case) -> None:
    case.hidden.grad = case.weight.grad = None
    gc.collect()


def step(provider: Provider, case: Case) -> float:
    """Returns the seconds of one forward and backward, before which gradients are freed."""
    free_gradients(case)
    start = time.perf_counter()
    loss = provider.run(case)
    if loss is not None:
        loss.backward()
    return time.perf_counter() - start


def interleaved(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Returns the best seconds of each, in turns."""
    best = {name: float("inf") for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            seconds = run()
            if turn:  # the first turn warms up
                best[name] = min(best[name], seconds)
    return best


def resident(key: str) -> int:
    """Returns VmRSS or VmHWM of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def extra_memory(provider: Provider, case: Case) -> int:
    """Returns the bytes at the peak of a step beyond what was there before and the gradients."""
    free_gradients(case)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step(provider, case)
    return resident("VmHWM") - before - case.hidden.nbytes - case.weight.nbytes


def gradient_error(case: Case, expected: Path) -> dict[str, float]:
    """Returns the largest error of each gradient relative to its largest entry."""
    want = torch.load(expected, weights_only=True)
    assert case.hidden.grad is not None
    assert case.weight.grad is not None
    got = {"d_hidden": case.hidden.grad.double(), "d_weight": case.weight.grad[compared_rows(case)].double()}
    return {name: float((got[name] - want[name]).abs().max() / want[name].abs().max()) for name in want}


def work(
    connection: Connection, name: str, inputs: Path, expected: Path | None, threads: int, memory: bool = True
) -> None:
    """Runs as the process of a provider: reports memory and error once, then times a step for every message that
    comes."""
    torch.set_num_threads(threads)
    provider = next(p for p in PROVIDERS if p.name == name)
    try:
        case = load_case(inputs)
        case.hidden.requires_grad_(), case.weight.requires_grad_()
        step(provider, case)
        found = {"extra_mb": extra_memory(provider, case) / 1e6} if memory else {}
        if expected is not None:
            found |= gradient_error(case, expected)
        free_gradients(case)  # while it waits: a dozen d_weights would not fit
        connection.send(found)
        while connection.recv():
            connection.send(step(provider, case))
            free_gradients(case)
    except EOFError:
        pass
    except Exception as error:  # a peer that cannot do this shape is a row of the table, not the end of it
        connection.send({"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})


class Worker:
    """A provider's process, from outside."""

    def __init__(
        self, provider: Provider, inputs: Path, expected: Path | None, threads: int, memory: bool = True
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.provider = provider
        self.connection, theirs = context.Pipe()
        arguments = (theirs, provider.name, inputs, expected, threads, memory)
        self.process = context.Process(target=work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the connection
        try:
            self.found: dict = self.connection.recv()
        except EOFError:  # killed, for its memory most likely
            self.process.join()
            self.found = {"failed": f"its process ended with {self.process.exitcode}"}
        self.seconds: list[float] = []

    @property
    def failed(self) -> bool:
        return "failed" in self.found

    def time(self) -> None:
        self.connection.send(True)
        self.seconds.append(self.connection.recv())

    def stop(self) -> None:
        self.connection.close()
        self.process.join(10)


def cpu_name() -> str:
    """Returns the CPU's name and, as some names say little, its family and model number."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    if "model name" not in found:
        return platform.machine()
    return f"{found['model name']} (family {found.get('cpu family')}, model {found.get('model')})"


def machine() -> dict[str, Any]:
    """Returns what a result depends on: the CPU, its threads and the versions of what was compared."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }
