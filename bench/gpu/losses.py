"""Stage: losses over a linear head, ours beside the peers': correctness first, then time and memory.

    python -m bench.gpu.losses --device cuda --shape 8192,3584,152064 --rows rows.jsonl [--only trapo TRL]

Every provider first computes its loss and gradients on 128 tokens and is held against the oracle in float64; one that
is wrong is shown as wrong and not timed. Then forward + backward on all N tokens: the median, and on CUDA the peak of
allocated memory beyond the inputs. The second part is forward only: log-probabilities and entropies as an old or
reference policy needs them. An exception is a row; a crash, or an exception that leaves the device unusable, is a row
too, and the others go on in a new process.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import trapo_kernels as tk
from bench.gpu import rows as stage
from bench.gpu.rows import Rows, one_line, peak_bytes, seconds_of, settle
from bench.gpu.running import ROOT, how_it_ended
from bench.providers import Case, Provider, head, installed, on, oracle, trl_head

__all__ = ["error_of", "jobs", "main", "make_case"]

CHECKED_ROWS = 128
# Largest error relative to the largest magnitude.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
DTYPES = {"cuda": "bfloat16", "cpu": "float32"}
# Those that compile for half a minute come last.
SLOW_TO_START = ("torch.compile", "Liger PPO head")
BOTH, FORWARD = "loss and gradients", "forward only"
_UNUSABLE = 3  # exit status of a worker whose device no longer answers


class Job(NamedTuple):
    """One row of the table."""

    part: str
    provider: str
    gives: str
    absent: str | None
    error: Callable[[Case], float]
    step: Callable[[Case], Any]


def make_case(n: int, d: int, v: int, dtype: torch.dtype, device: str) -> Case:
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    hidden, weight = normal(n, d).to(dtype), (normal(v, d) / d**0.5).to(dtype)
    targets = torch.randint(0, v, (n,), generator=g, device=device)
    expert = torch.rand(n, generator=g, device=device) < 0.3
    return Case(hidden.requires_grad_(), weight.requires_grad_(), targets, normal(n), expert)


def rows_of(case: Case, n: int) -> Case:
    """Returns the first n tokens, with parameters of their own."""
    hidden = case.hidden.detach()[:n].clone().requires_grad_()
    weight = case.weight.detach().clone().requires_grad_()
    return Case(hidden, weight, case.targets[:n], case.advantages[:n], case.expert_mask[:n])


def error_of(provider: Provider, case: Case) -> float:
    """Returns the largest error of loss and gradients on a few tokens, relative to the largest magnitude in float64."""
    if provider.gives == "gemms":
        return 0.0
    small, exact = rows_of(case, CHECKED_ROWS), rows_of(case, CHECKED_ROWS).double()
    loss, right = provider.run(small), oracle(exact, provider.gives)
    assert loss is not None
    found = torch.autograd.grad(loss, (small.hidden, small.weight))
    expected = torch.autograd.grad(right, (exact.hidden, exact.weight))
    return _worst([(loss, right), *zip(found, expected, strict=True)])


def _worst(pairs: list[tuple[Tensor, Tensor]]) -> float:
    errors = [((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-6)).item() for a, b in pairs]
    return next((e for e in errors if e != e), max(errors))  # a NaN is the worst


def _both(provider: Provider) -> Job:
    def step(case: Case) -> None:
        loss = provider.run(case)
        if loss is not None:
            torch.autograd.grad(loss, (case.hidden, case.weight))

    def error(case: Case) -> float:
        return error_of(provider, case)

    return Job(BOTH, provider.name, provider.gives, provider.absent(), error, step)


def _forward(name: str, logprobs: Callable[[Case], Any], absent: str | None) -> Job:
    @torch.no_grad()
    def step(case: Case) -> Any:
        return logprobs(case)

    @torch.no_grad()
    def error(case: Case) -> float:
        few = rows_of(case, CHECKED_ROWS)
        exact = few.double()
        right = head(exact.hidden, exact.weight, exact.targets)
        return _worst(list(zip(logprobs(few), right, strict=False)))

    return Job(FORWARD, name, "entropy", absent, error, step)


def jobs(device: str) -> Iterator[Job]:
    """Yields a job for everybody: those that start fast, then forward only, then those that compile for long."""
    with_gradients = (p for p in on(device) if p.gives != "values")  # forwards alone have their own jobs here
    everybody = sorted(with_gradients, key=lambda p: p.name in SLOW_TO_START)
    yield from (_both(p) for p in everybody if p.name not in SLOW_TO_START)
    for name, backend in tk.backends().items():
        if backend.device in (None, device) and name != "reference":

            def ours(case: Case, name: str = name) -> Any:
                return tk.linear_logprobs(case.hidden, case.weight, case.targets, entropy=True, backend=name)

            yield _forward(f"trapo_kernels {name}", ours, backend.missing)
    yield _forward("eager", lambda c: head(c.hidden, c.weight, c.targets), None)
    trl = None if installed("trl") else "trl is not installed"
    yield _forward("TRL chunked head", lambda c: trl_head(c, ("entropy",)), trl)
    yield from (_both(p) for p in everybody if p.name in SLOW_TO_START)


def measured(job: Job, case: Case, device: str) -> dict[str, Any]:
    """Returns the fields of a row: error, and, if that is small enough, time and memory; or why not."""
    if job.absent is not None:
        return {"left_out": job.absent}
    try:
        error = job.error(case)
        if not error <= TOLERANCE[case.hidden.dtype]:
            return {"error": error, "failed": f"wrong: error {error:.1e}"}
        peak = peak_bytes(lambda: job.step(case), device)
        ms = 1e3 * seconds_of(lambda: job.step(case), device)
        return {"error": error, "ms": ms, **({} if peak is None else {"peak_gib": peak / 2**30})}
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except Exception as error:  # of a peer's kernel, of its compiler: all are rows
        return {"failed": one_line(error)}


def worker(chosen: Any, shape: tuple[int, ...]) -> int:
    """Adds the rows of everybody whose row is not there yet."""
    known = {(r["part"], r["provider"]) for r in _of_shape(chosen, shape) if r["what"] == "loss"}
    rows = Rows(chosen.rows)
    case = make_case(*shape, getattr(torch, chosen.dtype or DTYPES[chosen.device]), chosen.device)
    for job in jobs(chosen.device):
        wanted = not chosen.only or any(word in job.provider for word in chosen.only)
        if not wanted or (job.part, job.provider) in known:
            continue
        who = {"shape": shape, "part": job.part, "provider": job.provider, "gives": job.gives}
        rows.add(what="begin", **who)
        rows.add(what="loss", **who, **measured(job, case, chosen.device))
        if chosen.device == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception:
                return _UNUSABLE
    settle(chosen.device)
    return 0


def _of_shape(chosen: Any, shape: tuple[int, ...]) -> list[dict[str, Any]]:
    return [r for r in stage.read(chosen.rows) if tuple(r.get("shape", ())) == shape]


def main(arguments: list[str] | None = None) -> int:
    chosen = stage.options(
        __doc__, arguments, shape={"required": True, "metavar": "N,D,V"}, only={"nargs": "*", "default": []},
        dtype={"choices": [str(d).removeprefix("torch.") for d in TOLERANCE], "default": None},
        worker={"action": "store_true", "help": "how this command calls itself"},
    )  # fmt: skip
    shape = tuple(int(part) for part in chosen.shape.split(","))
    if chosen.worker:
        return worker(chosen, shape)
    given = sys.argv[1:] if arguments is None else arguments
    code = None
    while code != 0:
        before = len(_of_shape(chosen, shape))
        code = subprocess.run(
            [sys.executable, "-m", "bench.gpu.losses", *given, "--worker"], cwd=ROOT, check=False
        ).returncode
        found = _of_shape(chosen, shape)
        if found and found[-1]["what"] == "begin":  # it crashed in this one
            Rows(chosen.rows).add(**{**found[-1], "what": "loss", "failed": f"its process {how_it_ended(code)}"})
        elif len(found) == before and code != 0:
            return code or 1
    wrong = [r for r in _of_shape(chosen, shape) if r["provider"].startswith("trapo_kernels") and "failed" in r]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
