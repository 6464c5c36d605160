"""Tokens a second of engine hf: our loop beside transformers' `generate`, on the demo's prompts.

python -m bench.decode [--rows 4,12,32] [--rounds 3] [--threads 2] [--cases call,step] [--bfloat16]

A *call* draws 40 tokens for each of so many prompts. A *step* is what a step of the demo asks for with so many prompts:
a call for them, one with half of an expert trace after each, one for every second of them again. Weights count as new
at its start, so packing them is in it. No token ends a response. They take turns, in one process; a cell is the best
round. --bfloat16: our loop in bfloat16, too, on the same float32 weights, beside itself in float32. Wall time says
little on a machine that others use; the ratio of CPU times (user and system) says more there.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trapo.config import ModelConfig
from trapo.data.encode import EncodedProblem, encode_problems
from trapo.data.loading import load_problems
from trapo.engines.hf import HFEngine
from trapo.engines.protocol import Request
from trapo.engines.ways import WAYS
from trapo.models.loading import SMOLLM2, load_model

NEW_TOKENS = 40
ENGINES = {"generate": WAYS[1], "own loop": WAYS[0]}
HALF = "own loop, bfloat16"
Calls = list[list[Request]]


def demo_problems(tokenizer: PreTrainedTokenizerBase) -> Iterator[EncodedProblem]:
    problems = load_problems("task://word_problems?split=train&n=2000&seed=1")
    return iter(encode_problems(problems, tokenizer, max_prompt_tokens=200, max_trace_tokens=NEW_TOKENS)[0])


def one_call(problems: Sequence[EncodedProblem]) -> Calls:
    return [[Request(p.prompt_ids, NEW_TOKENS) for p in problems]]


def one_step(problems: Sequence[EncodedProblem]) -> Calls:
    halves = [p.traces[0].token_ids[: len(p.traces[0].token_ids) // 2] for p in problems]
    return [
        [Request(p.prompt_ids, NEW_TOKENS, keep=True) for p in problems],
        [Request(p.prompt_ids + h, NEW_TOKENS - len(h), keep=True) for p, h in zip(problems, halves, strict=True)],
        [Request(p.prompt_ids, NEW_TOKENS) for p in problems[::2]],
    ]


def timed(engine: HFEngine, calls: Calls, seed: int) -> tuple[float, float]:
    """(wall, CPU) seconds; the weights count as new ones."""
    engine.rest()
    wall, cpu = time.perf_counter(), time.process_time()
    for number, requests in enumerate(calls):
        found = engine.generate(requests, temperature=1.0, seed=seed + number)
        assert [len(c.token_ids) for c in found] == [r.max_new_tokens for r in requests]
    return time.perf_counter() - wall, time.process_time() - cpu


def engines(model: PreTrainedModel, *, half: bool = False) -> dict[str, HFEngine]:
    made = {name: HFEngine(model, eos_ids=[], pad_id=2) for name in ENGINES}
    for name, engine in made.items():
        engine.way = ENGINES[name]
    if half:
        made[HALF] = HFEngine(model, eos_ids=[], pad_id=2, precision="bfloat16")
        made[HALF].way = WAYS[0]
    return made


def compare(made: dict[str, HFEngine], calls: Callable[[], Calls], rounds: int) -> dict[str, tuple[float, float]]:
    """Each engine's best (wall, CPU) seconds a token."""
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    for number in range(rounds):
        asked = calls()
        tokens = sum(r.max_new_tokens for requests in asked for r in requests)
        for name in sorted(made, reverse=bool(number % 2)):
            wall, cpu = timed(made[name], asked, number)
            took[name].append((wall / tokens, cpu / tokens))
    return {name: (min(w for w, _ in pairs), min(c for _, c in pairs)) for name, pairs in took.items()}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(": ")[1] for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    )
    return f"{names[0] if names else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Our loop beside generate.")
    parser.add_argument("--rows", default="4,12,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", default="call,step")
    parser.add_argument("--bfloat16", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = load_model(ModelConfig(path=SMOLLM2))
    made, problems = engines(model, half=options.bfloat16), demo_problems(tokenizer)
    timed(made["own loop"], one_call(list(islice(problems, 4))), 0)
    load = os.getloadavg()[0]
    print(f"SmolLM2-135M, float32; {cpu_name()}, {options.threads} threads, torch {torch.__version__}, ", end="")
    busy = "shared machine" if load > options.threads + 0.5 else "quiet"
    print(f"{datetime.date.today()}, load {load:.1f} ({busy}); best of {options.rounds}\n")
    more = ["own loop in bfloat16, tokens/s", "ratio to float32", "ratio of CPU time"] if options.bfloat16 else []
    head = ["case", "rows", "generate, tokens/s", "own loop, tokens/s", "ratio", "ratio of CPU time", *more]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for case in options.cases.split(","):
        for rows in map(int, options.rows.split(",")):
            calls = {"call": one_call, "step": one_step}[case]
            best = compare(made, lambda c=calls, n=rows: c(list(islice(problems, n))), options.rounds)
            (old_wall, old_cpu), (wall, cpu) = best["generate"], best["own loop"]
            cells = [case, str(rows), f"{1 / old_wall:.1f}", f"{1 / wall:.1f}"]
            cells += [f"{old_wall / wall:.2f}", f"{old_cpu / cpu:.2f}"]
            if options.bfloat16:
                half_wall, half_cpu = best[HALF]
                cells += [f"{1 / half_wall:.1f}", f"{wall / half_wall:.2f}", f"{cpu / half_cpu:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
