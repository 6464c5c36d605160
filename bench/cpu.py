"""`make bench`: the losses on this machine's CPU, every provider in one run.

    python -m bench.cpu table [--shape N,D,V ...] [--rounds 7]     time, ratio, memory, gradient error
                              [--dtype fp32|bf16] [--threads T]    rows of a table of their own
                              [--provider NAME ...] [--timing]     these rows alone, their time alone; the others stay
    python -m bench.cpu savings                                    masked tokens, tokens without advantage, forward only
    python -m bench.cpu budget                                     time against memory
    python -m bench.cpu sweep                                      time and memory against N and against V
    python -m bench.cpu plot                                       bench/results/cpu.png from what the others left
    python -m bench.cpu all                                        everything

Results: bench/results/cpu.json and cpu.md; each part replaces its own. Times are the best of several rounds in which
every provider runs once, so that what else the machine does meets them all; compare ratios, not seconds.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import trapo_kernels as tk
from bench.measure import (
    RESULTS,
    Shape,
    Worker,
    cpu_name,
    extra_memory,
    interleaved,
    load_case,
    machine,
    step,
    write_inputs,
    write_oracle,
)  # fmt: skip
from bench.providers import CHUNK as CHUNKS
from bench.providers import PROVIDERS, Case, Provider, ours

SHAPES = [Shape(2048, 576, 49152), Shape(1024, 896, 151936), Shape(512, 3584, 152064)]
FLOOR = PROVIDERS[0].name
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# Parts: each returns what goes under its name in cpu.json -------------------------------------------------------


def table(
    shapes: Sequence[Shape],
    rounds: int,
    providers: Sequence[Provider] = PROVIDERS,
    dtype: str = "fp32",
    timing: bool = False,
    beside: str | None = None,
) -> dict[str, Any]:
    """Returns a table for each shape, under a name that says what else it depends on."""
    threads = torch.get_num_threads()
    suffix = f"{dtype}, {threads} thread{'s' * (threads > 1)}, {cpu_name()}"
    return {f"{shape}, {suffix}": _one_shape(shape, rounds, providers, dtype, timing, beside) for shape in shapes}


def _one_shape(
    shape: Shape,
    rounds: int,
    providers: Sequence[Provider],
    dtype: str = "fp32",
    timing: bool = False,
    beside: str | None = None,
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        inputs = write_inputs(shape, Path(folder), DTYPES[dtype])
        kinds = [] if timing else sorted({p.gives for p in providers} - {"gemms", "values"})
        expected = {gives: _in_a_process(write_oracle, inputs, gives) for gives in kinds}
        workers = []
        for provider in providers:
            print(f"{shape}: {provider.name}", flush=True)
            threads = torch.get_num_threads()
            workers.append(Worker(provider, inputs, expected.get(provider.gives), threads, memory=not timing))
        able = [w for w in workers if not w.failed]
        with _running(beside) as over:
            for turn in range(rounds):
                if turn and over():
                    break
                print(f"{shape}: round {turn + 1} of {rounds}", flush=True)
                for worker in able:
                    worker.time()
        for worker in able:
            worker.stop()
    base = min(next(w for w in able if w.provider.name == FLOOR).seconds)
    rows = []
    for w in workers:
        row = {"provider": w.provider.name, "gives": w.provider.gives, "bounded": w.provider.bounded, **w.found}
        if not w.failed:
            row |= {"seconds": min(w.seconds), "ratio": min(w.seconds) / base, "all_seconds": w.seconds}
        rows.append(row)
    return {"rounds": max(len(w.seconds) for w in able), "machine": machine(), "rows": rows}


@contextmanager
def _running(command: str | None) -> Iterator[Callable[[], bool]]:
    """Runs a command, and yields what says whether it has ended."""
    if command is None:
        yield lambda: False
        return
    process = subprocess.Popen(shlex.split(command))
    time.sleep(2)  # until it is at work
    try:
        yield lambda: process.poll() is not None
    finally:
        process.terminate()
        process.wait()


def _in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a function in a process of its own, whose end gives its memory back."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _case(shape: Shape) -> Case:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        case = load_case(write_inputs(shape, Path(folder)))
        case = replace(case, hidden=case.hidden.clone(), weight=case.weight.clone())
    case.hidden.requires_grad_(), case.weight.requires_grad_()
    return case


def savings(rounds: int = 7) -> dict[str, Any]:
    """Times forward only against one GEMM, masked tokens, and tokens with A = 0."""
    return {str(shape): _savings_of(_case(shape), rounds) for shape in SHAPES[:2]}


def _savings_of(case: Case, rounds: int) -> dict[str, Any]:
    n = case.targets.numel()
    part = torch.rand(n, generator=torch.Generator().manual_seed(1)) < 0.6
    plain = tk.Objective.trapo()  # no entropy term: A = 0 leaves no gradient

    def loss(**changes: Any) -> Callable[[], float]:
        inputs = {"advantages": case.advantages, "expert_mask": torch.zeros(n, dtype=torch.bool), **changes}

        def run(c: Case) -> torch.Tensor:
            return tk.linear_policy_loss(c.hidden, c.weight, c.targets, plain, backend="cpu", **inputs).loss

        return lambda: step(Provider("", run, "logprobs", True), case)

    @torch.no_grad()
    def forward(c: Case) -> None:
        tk.linear_logprobs(c.hidden, c.weight, c.targets, entropy=True, backend="cpu")

    @torch.no_grad()
    def gemm(c: Case) -> None:
        logits = torch.empty(CHUNKS["cpu"], c.weight.shape[0])
        for chunk in c.hidden.split(CHUNKS["cpu"]):
            torch.mm(chunk, c.weight.t(), out=logits[: chunk.shape[0]])

    zero = case.advantages.masked_fill(part, 0)
    runs = {
        "one GEMM": lambda: step(Provider("", gemm, "gemms", True), case),
        "logprobs and entropy, no gradient": lambda: step(Provider("", forward, "logprobs", True), case),
        "every token": loss(),
        "60% of tokens masked": loss(mask=~part),
        "60% at A = 0": loss(advantages=zero),
        "60% at A = 0, skip_inactive": loss(advantages=zero, skip_inactive=True),
    }
    best = interleaved(runs, rounds)
    return {"rounds": rounds, "left_out": float(part.float().mean()), "seconds": best, "machine": machine()}


def budget(rounds: int = 3) -> list[dict[str, Any]]:
    """Measures time and memory of one shape as the budget changes."""
    shape = SHAPES[1]
    case = _case(shape)
    rows = []
    for megabytes in (16, 32, 64, 96, 144, 288, 576):
        with tk.budget_mb(megabytes):
            for backend in ("cpu", "torch"):
                run = Provider("", ours(backend), "entropy", True)
                best = interleaved({"": lambda run=run: step(run, case)}, rounds)[""]
                rows.append(
                    {
                        "shape": str(shape), "backend": backend, "budget_mb": megabytes * 2**20 / 1e6,
                        "seconds": best, "extra_mb": extra_memory(run, case) / 1e6,
                    }
                )  # fmt: skip
    return rows


def sweep(rounds: int = 3) -> list[dict[str, Any]]:
    """Measures time and memory against N and against V."""
    names = ("trapo_kernels cpu", "eager", "TRL chunked head", FLOOR)
    chosen = [p for p in PROVIDERS if p.name in names]
    shapes = [Shape(n, 576, 49152) for n in (512, 1024, 2048, 4096)]
    shapes += [Shape(1024, 576, v) for v in (16384, 32768, 65536, 131072)]
    rows = []
    for shape in shapes:
        found = _one_shape(shape, rounds, chosen)
        rows += [{"tokens": shape.tokens, "width": shape.width, "vocab": shape.vocab, **row} for row in found["rows"]]
    # Ours alone where others would take the machine's memory or the day.
    long = [p for p in PROVIDERS if p.name in ("trapo_kernels cpu", FLOOR)]
    for shape in (Shape(16384, 576, 49152), Shape(65536, 576, 49152)):
        found = _one_shape(shape, 1, [replace(p) for p in long])
        rows += [{"tokens": shape.tokens, "width": shape.width, "vocab": shape.vocab, **row} for row in found["rows"]]
    return rows


# Output ----------------------------------------------------------------------------------------------------------


def save(part: str, value: Any, keep_keys: bool) -> dict[str, Any]:
    """Write a part into cpu.json; the tables of other shapes stay, and the rows of other providers."""
    path = RESULTS / "cpu.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if part == "table":
        value = {name: _with_rows_of(results.get(part, {}).get(name), found) for name, found in value.items()}
    results[part] = {**results.get(part, {}), **value} if keep_keys else value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "cpu.md").write_text(markdown(results))
    return results


def _with_rows_of(before: dict[str, Any] | None, found: dict[str, Any]) -> dict[str, Any]:
    """Returns a table with what an earlier one has and this one has not: providers, memory, errors."""
    rows = {row["provider"]: row for row in (before or {}).get("rows", [])}
    for row in found["rows"]:
        old = rows.get(row["provider"], {})
        rows[row["provider"]] = row if "failed" in row or "failed" in old else {**old, **row}
    order = [p.name for p in PROVIDERS]
    return {**found, "rows": sorted(rows.values(), key=lambda row: order.index(row["provider"]))}


def markdown(results: dict[str, Any]) -> str:
    lines = [
        "# Losses on a CPU",
        "",
        "Written by `python -m bench.cpu`; forward + backward, best of the rounds, fp32 where nothing else is said.",
        "Each ratio is to the bare GEMMs, in the same dtype, that took turns with it.",
        "",
    ]
    for shape, found in results.get("table", {}).items():
        m = found["machine"]
        lines += [
            f"## {shape}", "",
            f"{m['cpu']}, {m['capability']}, {m['threads']} threads, torch {m['versions']['torch']}, {m['date']}; "
            f"{found['rounds']} rounds.", "",
            "| provider | gives | seconds | × three GEMMs | extra memory, MB | error d_hidden | error d_weight |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        lines += [_table_row(row) for row in found["rows"]] + [""]
    for shape, found in results.get("savings", {}).items():
        seconds = found["seconds"]
        lines += [f"## What is left out, {shape}", "", "| | seconds | ratio |", "| --- | --- | --- |"]
        for name, value in seconds.items():
            base = "one GEMM" if name in ("one GEMM", "logprobs and entropy, no gradient") else "every token"
            lines.append(f"| {name} | {value:.3f} | {value / seconds[base]:.2f} × {base} |")
        lines.append("")
    if results.get("budget"):
        lines += ["## Time against memory", "", "| shape | backend | budget, MB | extra memory, MB | seconds |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        for row in results["budget"]:
            cells = [row["shape"], row["backend"], f"{row['budget_mb']:.0f}", f"{row['extra_mb']:.0f}"]
            lines.append("| " + " | ".join([*cells, f"{row['seconds']:.2f}"]) + " |")
        lines.append("")
    if results.get("sweep"):
        lines += ["## Against N and V", "", "| N | D | V | provider | seconds | × three GEMMs | extra memory, MB |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
        for row in results["sweep"]:
            where = f"| {row['tokens']} | {row['width']} | {row['vocab']} | {row['provider']} "
            lines.append(where + f"| {row['seconds']:.2f} | {row['ratio']:.2f} | {row['extra_mb']:.0f} |")
        lines.append("")
    return "\n".join(lines)


def _table_row(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"| {row['provider']} | {row['gives']} | failed: {row['failed']} | | | | |"
    errors = [f"{row[name]:.1e}" if name in row else "" for name in ("d_hidden", "d_weight")]
    cells = [row["provider"], row["gives"], f"{row['seconds']:.2f}", f"{row['ratio']:.2f}", _megabytes(row)]
    return "| " + " | ".join([*cells, *errors]) + " |"


def _megabytes(row: dict[str, Any]) -> str:
    without_gradients = row["gives"] == "values" or row["provider"] == "one bare GEMM"  # which are subtracted
    return f"{row['extra_mb']:.0f}" if "extra_mb" in row and not without_gradients else ""


def plot() -> None:
    """Draws time and memory against N and against V."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = json.loads((RESULTS / "cpu.json").read_text())["sweep"]
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), constrained_layout=True, facecolor="white")
    sides = [("tokens", "vocab", 49152, "N, tokens"), ("vocab", "tokens", 1024, "V, vocabulary")]
    names = list(dict.fromkeys(r["provider"] for r in rows))
    for column, (x, fixed, value, label) in enumerate(sides):
        for i, name in enumerate(names):
            mine = sorted(
                (r[x], r["seconds"], r["extra_mb"]) for r in rows if r["provider"] == name and r[fixed] == value
            )
            short = [m for m in mine if x == "vocab" or m[0] <= 4096]  # time: where all providers are
            axes[0][column].plot([m[0] for m in short], [m[1] for m in short], f"C{i}o-", label=name)
            if name != FLOOR:
                axes[1][column].plot([m[0] for m in mine], [m[2] for m in mine], f"C{i}o-", label=name)
        title = f"D = 576, {'V' if x == 'tokens' else 'N'} = {value}"
        axes[0][column].set(title=title, xlabel=label, ylabel="seconds, forward + backward", ylim=(0, None))
        axes[1][column].set(xlabel=label, ylabel="memory beyond inputs and gradients, MB", yscale="log", xscale="log")
        for line in axes[:, column]:
            line.grid(alpha=0.3)
            line.legend()
    figure.savefig(RESULTS / "cpu.png", dpi=110)
    print(RESULTS / "cpu.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["table", "savings", "budget", "sweep", "plot", "all"])
    parser.add_argument("--shape", action="append", help="N,D,V; default: the three of docs/results.md")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--provider", action="append", help="of the table; default: all")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the table's head")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument(
        "--beside", help="a command that runs beside the rounds, which end with it: one that stops others"
    )
    parser.add_argument("--timing", action="store_true", help="neither memory nor errors")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    shapes = [Shape(*map(int, s.split(","))) for s in arguments.shape] if arguments.shape else SHAPES
    names = [FLOOR, *arguments.provider] if arguments.provider else [p.name for p in PROVIDERS]
    providers = [p for p in PROVIDERS if p.name in names]
    everything = arguments.part == "all"
    if everything or arguments.part == "table":
        for shape in shapes:
            found = table([shape], arguments.rounds, providers, arguments.dtype, arguments.timing, arguments.beside)
            save("table", found, keep_keys=True)
    if everything or arguments.part == "savings":
        save("savings", savings(), keep_keys=True)
    if everything or arguments.part == "budget":
        save("budget", budget(), keep_keys=False)
    if everything or arguments.part == "sweep":
        save("sweep", sweep(), keep_keys=False)
    if everything or arguments.part == "plot":
        plot()
    print((RESULTS / "cpu.md").read_text())


if __name__ == "__main__":
    main()
