"""Losses over a linear head on a GPU, ours beside the peers': correctness first, then time and memory, in one table.

    python -m bench.kernels --device cuda                              # the shapes of the paper's models, bf16
    python -m bench.kernels --device cpu --shapes 256,64,4000 --dtype float32

For each shape N,D,V every provider first computes its loss and gradients on 128 tokens and is held against the oracle
in float64; one that is wrong is shown as wrong and not timed. Then forward + backward on all N tokens: the median of
CUDA events (triton.testing.do_bench) or of a CPU's clock, and on CUDA the peak of allocated memory beyond the inputs.
The second part is forward only: log-probabilities and entropies as an old or reference policy needs them. CPU runs
are there to exercise this script; bench/cpu.py measures CPUs. Until a file of results with `"device": "cuda"` is
committed, no GPU has run it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import trapo_kernels as tk
from bench.evidence import peers
from bench.providers import OBJECTIVE, Case, Provider, oracle
from bench.providers import PROVIDERS as CPU_PROVIDERS

__all__ = ["main"]

SHAPES = ("8192,3584,152064", "16384,4096,128256", "32768,2048,151936")
CHECKED_ROWS = 128
# Largest error relative to the largest magnitude.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
# Of bench/providers.py, what runs on any device as it is.
SHARED = ("eager", "torch.compile", "TRL chunked head", "eager, no entropy", "TRL chunked head, no entropy")


@dataclass(frozen=True)
class Run:
    """What was asked for."""

    device: str
    dtype: torch.dtype
    repeats: int
    only: tuple[str, ...]

    def wants(self, name: str) -> bool:
        return not self.only or any(word in name for word in self.only)


def ours(backend: str) -> Callable[[Case], Tensor]:
    def run(case: Case) -> Tensor:
        return tk.linear_policy_loss(
            case.hidden, case.weight, case.targets, OBJECTIVE, advantages=case.advantages,
            expert_mask=case.expert_mask, backend=backend,
        ).loss  # fmt: skip

    return run


def ours_two_passes(backend: str) -> Callable[[Case], Tensor]:
    """The recomputing backward: log-probabilities first, the objective on vectors, by autograd."""

    def run(case: Case) -> Tensor:
        found = tk.linear_logprobs(case.hidden, case.weight, case.targets, entropy=True, backend=backend)
        assert found.entropy is not None
        return sum(OBJECTIVE.losses(case.tokens(*found)).values(), torch.zeros_like(found.logprobs)).mean()

    return run


def gemms(case: Case) -> None:
    """The three products of exact gradients over chunks of 4096 rows, d_weight summed in fp32: a floor."""
    hidden, weight = case.hidden.detach(), case.weight.detach()
    rows, low = min(4096, hidden.shape[0]), hidden.dtype != torch.float32
    logits = hidden.new_empty(rows, weight.shape[0])
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
    for start in range(0, hidden.shape[0], rows):
        chunk = hidden[start : start + rows]
        z = logits[: chunk.shape[0]]
        torch.mm(chunk, weight.t(), out=z)
        torch.mm(z, weight, out=d_hidden[start : start + rows])
        if low and hidden.is_cuda:
            torch.addmm(d_weight, z.t(), chunk, out_dtype=torch.float32, out=d_weight)
        else:
            d_weight.addmm_(z.t().float(), chunk.float())


def cce(case: Case) -> Tensor:
    """Its Triton kernels, with the gradient filter off: exact gradients, as everybody else's."""
    from cut_cross_entropy import linear_cross_entropy

    nll = linear_cross_entropy(case.hidden, case.weight, case.targets, reduction="none", impl="cce", filter_eps=None)
    losses = replace(OBJECTIVE, entropy_coef=0.0).losses(case.tokens(-nll, torch.zeros_like(nll)))
    return sum(losses.values(), torch.zeros_like(nll)).mean()


def liger(case: Case) -> Tensor:
    """Fused linear cross-entropy, plain NLL: its kernels take no other loss from hidden states on a GPU."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(case.hidden, case.weight, case.targets)[0]


def providers(device: str) -> Iterator[Provider]:
    """Everybody who can run on the device: a peer that is not installed is left out."""
    yield Provider("three bare GEMMs", gemms, "gemms", True)
    for name, backend in tk.backends().items():
        takes = backend.device in (None, device)
        if backend.available and takes and name != "reference":
            yield Provider(f"trapo_kernels {name}", ours(name), "entropy", True)
            yield Provider(f"trapo_kernels {name}, recomputing", ours_two_passes(name), "entropy", True)
    packages = {"trl": "trl", None: "torch"}
    for provider in CPU_PROVIDERS:
        if provider.name in SHARED and (packages[provider.package] == "torch" or peers.installed("trl")):
            yield provider
    if device == "cuda" and peers.installed("cut_cross_entropy"):
        yield Provider("CCE, exact", cce, "logprobs", True, "cut-cross-entropy")
    if device == "cuda" and peers.installed("liger_kernel"):
        yield Provider("Liger fused linear CE", liger, "nll", True, "liger-kernel")


def forward_only(device: str) -> Iterator[tuple[str, Callable[[Case], Any]]]:
    for name, backend in tk.backends().items():
        if backend.available and backend.device in (None, device) and name != "reference":
            yield (
                f"trapo_kernels {name}",
                lambda case, name=name: tk.linear_logprobs(  # type: ignore[misc]
                    case.hidden, case.weight, case.targets, entropy=True, backend=name
                ),
            )
    yield "eager", lambda case: _eager_logprobs(case)
    if peers.installed("trl"):
        from bench.providers import _trl

        yield "TRL chunked head", lambda case: _trl(case, ("entropy",))


def _eager_logprobs(case: Case) -> tuple[Tensor, Tensor]:
    log_pi = F.log_softmax(F.linear(case.hidden, case.weight).float(), dim=-1)
    return log_pi.gather(1, case.targets[:, None]).squeeze(1), -(log_pi.exp() * log_pi).sum(1)


def make_case(n: int, d: int, v: int, dtype: torch.dtype, device: str) -> Case:
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    hidden, weight = normal(n, d).to(dtype), (normal(v, d) / d**0.5).to(dtype)
    targets = torch.randint(0, v, (n,), generator=g, device=device)
    expert = torch.rand(n, generator=g, device=device) < 0.3
    return Case(hidden.requires_grad_(), weight.requires_grad_(), targets, normal(n), expert)


def rows_of(case: Case, n: int) -> Case:
    """The first n tokens, with parameters of their own."""
    hidden = case.hidden.detach()[:n].clone().requires_grad_()
    weight = case.weight.detach().clone().requires_grad_()
    return Case(hidden, weight, case.targets[:n], case.advantages[:n], case.expert_mask[:n])


def error_of(provider: Provider, case: Case) -> float:
    """Largest error of loss and gradients on a few tokens, relative to the largest magnitude in float64."""
    small, exact = rows_of(case, CHECKED_ROWS), rows_of(case, CHECKED_ROWS)
    exact = exact.double()
    loss, right = provider.run(small), oracle(exact, provider.gives)
    assert loss is not None
    found = torch.autograd.grad(loss, (small.hidden, small.weight))
    expected = torch.autograd.grad(right, (exact.hidden, exact.weight))
    pairs = [(loss, right), *zip(found, expected, strict=True)]
    return max(((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-6)).item() for a, b in pairs)


def median_ms(step: Callable[[], Any], device: str, repeats: int) -> float:
    """Median of CUDA events with a cold L2, or of a CPU's clock."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(step, warmup=100, rep=100 * repeats, return_mode="median"))
    step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def peak_bytes(step: Callable[[], Any], device: str) -> int | None:
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def measured(row: dict[str, Any], check: Callable[[], float], step: Callable[[], Any], run: Run) -> dict[str, Any]:
    """The row with its error, and, if that is small enough, with time and memory."""
    try:
        row = {**row, "error": check()}
        if not row["error"] <= TOLERANCE[run.dtype]:
            return {**row, "failed": f"wrong: error {row['error']:.1e}"}
        return {**row, "peak_bytes": peak_bytes(step, run.device), "ms": median_ms(step, run.device, run.repeats)}
    except ImportError as error:
        return {**row, "failed": str(error)}
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {**row, "failed": "out of memory"}


def loss_rows(case: Case, run: Run) -> list[dict[str, Any]]:
    """Forward, backward and both gradients of everybody."""
    rows = []
    for provider in providers(run.device):
        if not run.wants(provider.name):
            continue

        def step(provider: Provider = provider) -> None:
            loss = provider.run(case)
            if loss is not None:
                torch.autograd.grad(loss, (case.hidden, case.weight))

        def check(provider: Provider = provider) -> float:
            return 0.0 if provider.gives == "gemms" else error_of(provider, case)

        row = {"provider": provider.name, "part": "loss and gradients", "gives": provider.gives}
        rows.append(measured(row, check, step, run))
    return rows


@torch.no_grad()
def forward_rows(case: Case, run: Run) -> list[dict[str, Any]]:
    """Log-probabilities and entropies alone."""
    few = rows_of(case, CHECKED_ROWS)
    right = _eager_logprobs(few.double())
    rows = []
    for name, logprobs in forward_only(run.device):
        if not run.wants(name):
            continue

        def check(logprobs: Callable[[Case], Any] = logprobs) -> float:
            pairs = zip(logprobs(few), right, strict=False)
            return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)

        def step(logprobs: Callable[[Case], Any] = logprobs) -> None:
            logprobs(case)

        rows.append(measured({"provider": name, "part": "forward only"}, check, step, run))
    return rows


def table(results: dict[str, Any]) -> str:
    lines = [f"{results['card']}, {results['dtype']}, torch {results['torch']}; median ms, peak GiB beyond the inputs"]
    for row in results["rows"]:
        memory = "" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 2**30:8.2f}"
        time_ = row.get("failed") or f"{row['ms']:10.2f}"
        shape = "x".join(map(str, row["shape"]))
        lines.append(f"{shape:>20}  {row['part']:18}  {row['provider']:36}  {time_:>10}  {memory}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="N,D,V")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5, help="on a CPU; on CUDA hundreds of milliseconds")
    parser.add_argument("--only", nargs="*", default=[], help="providers whose name holds one of these words")
    parser.add_argument("--out", type=Path, help="JSON; default bench/results/kernels_DEVICE.json")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here; --device cpu exercises the script")
    run = Run(options.device, getattr(torch, options.dtype), options.repeats, tuple(options.only))
    results: dict[str, Any] = {
        "device": options.device,
        "card": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
        "dtype": options.dtype,
        "torch": torch.__version__,
        "peers": {name: peers.installed(name) for name in peers.PEERS},
        "rows": [],
    }
    for text in options.shapes:
        shape = tuple(int(part) for part in text.split(","))
        case = make_case(*shape, run.dtype, run.device)
        results["rows"] += [{"shape": shape, **row} for row in loss_rows(case, run) + forward_rows(case, run)]
        del case
    out = options.out or Path(__file__).parent / "results" / f"kernels_{options.device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    return 1 if any("wrong" in row.get("failed", "") for row in results["rows"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
