"""What a loss on a teacher's top-k costs: ours against the bare products, against the same formula in checkpointed
chunks, and against peers' divergences over the whole vocabulary, which they have in its place.

    python -m bench.support --shape 0 --runs gemms,topk8,topk64,topk256,checkpointed --rounds 2
    python -m bench.support --shape 0 --runs gemms,trl,liger --rounds 1

Every call measures its runs in turns and adds rows to bench/results/support.json; `gemms` must be among them. Time is
CPU time of one thread, best of the rounds; memory is the process's high-water mark beyond inputs and gradients.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import trapo_kernels as tk
from bench.measure import RESULTS, Shape, machine, resident
from bench.providers import Case, floor

SHAPES = (Shape(2048, 576, 49152), Shape(1024, 896, 151936))
CHUNK = 512
NAMES = {
    "gemms": "three bare GEMMs",
    "checkpointed": "the same formula, K = 64, torch, chunks of 512 tokens checkpointed",
    "trl": "TRL's ChunkedDivergenceFunction, forward KL over the vocabulary, teacher's hidden states",
    "trl_jsd": "TRL's ChunkedDivergenceFunction, JSD",
    "liger": "Liger's FusedLinearJSD, teacher's hidden states",
}


class Inputs:
    """Random inputs of the scale of a trained head's; the teacher's hidden states for peers, its top-k for ours."""

    def __init__(self, shape: Shape) -> None:
        g = torch.Generator().manual_seed(0)
        n, d, v = shape.tokens, shape.width, shape.vocab
        self.hidden = torch.randn(n, d, generator=g).requires_grad_()
        self.weight = torch.randn(v, d, generator=g).div_(d**0.5).requires_grad_()
        self.other = self.hidden.detach() + 0.3 * torch.randn(n, d, generator=g)
        self.ids = torch.empty(n, 256, dtype=torch.int64)
        self.logprobs = torch.empty(n, 256)
        for start in range(0, n, CHUNK):
            at = slice(start, start + CHUNK)
            logits = self.other[at] @ self.weight.detach().t()
            found, self.ids[at] = logits.log_softmax(-1).topk(256, -1)
            self.logprobs[at] = found

    def case(self) -> Case:
        empty = torch.empty(0)
        return Case(self.hidden, self.weight, empty, empty, empty)


def ours(k: int, given: Inputs) -> Tensor:
    ids, logprobs = given.ids[:, :k].contiguous(), given.logprobs[:, :k].contiguous()
    return tk.linear_topk_divergence(given.hidden, given.weight, ids, logprobs).loss


def forward_kl(hidden: Tensor, weight: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    """verl's formula (trainer/distillation/fsdp/losses.py), from all logits of some tokens."""
    student = F.log_softmax(F.linear(hidden, weight), -1).gather(-1, ids)
    return (logprobs.exp() * (logprobs - student)).sum()


def checkpointed(given: Inputs) -> Tensor:
    total = given.hidden.new_zeros(())
    for start in range(0, given.hidden.shape[0], CHUNK):
        at = slice(start, start + CHUNK)
        arguments = given.hidden[at], given.weight, given.ids[at, :64], given.logprobs[at, :64]
        total = total + checkpoint(forward_kl, *arguments, use_reentrant=False)
    return total / given.hidden.shape[0]


def trl(beta: float, given: Inputs) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    teacher = given.other, given.weight.detach(), None
    found, _ = ChunkedDivergenceFunction.apply(given.hidden, given.weight, None, *teacher, beta)
    return found.mean()


def liger(given: Inputs) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False, chunk_size=CHUNK)
    labels = torch.zeros(given.hidden.shape[0], dtype=torch.int64)
    found: Tensor = loss(given.hidden, given.weight, given.other, given.weight.detach(), labels)
    return found


def gemms(given: Inputs) -> None:
    floor(given.case())


RUNS: dict[str, Callable[[Inputs], Tensor | None]] = {
    "gemms": gemms, "checkpointed": checkpointed, "trl": partial(trl, 0.0), "trl_jsd": partial(trl, 0.5),
    "liger": liger, **{f"topk{k}": partial(ours, k) for k in (8, 64, 256)},
}  # fmt: skip


def step(run: Callable[[Inputs], Tensor | None], given: Inputs) -> tuple[float, float]:
    """(CPU seconds, MB beyond inputs and gradients) of one forward and backward."""
    given.hidden.grad = given.weight.grad = None
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident("VmRSS"), time.process_time()
    loss = run(given)
    if loss is not None:
        loss.backward()
    seconds = time.process_time() - start
    gradients = 4 * (given.hidden.numel() + given.weight.numel())
    return seconds, (resident("VmHWM") - before - gradients) / 1e6


def measure(shape: Shape, names: list[str], rounds: int) -> list[dict[str, Any]]:
    given = Inputs(shape)
    best = {name: (float("inf"), float("inf")) for name in names}
    for _ in range(rounds):
        for name in names:
            found = step(RUNS[name], given)
            best[name] = min(best[name][0], found[0]), min(best[name][1], found[1])
    base = best["gemms"][0]
    return [
        {"shape": str(shape), "run": name, "seconds": s, "gemms": s / base, "extra_mb": mb, "rounds": rounds}
        for name, (s, mb) in best.items()
    ]


def markdown(results: dict[str, Any]) -> str:
    m = results["machine"]
    lines = [
        "# A divergence from a teacher's top-k", "",
        f"{m['cpu']}, {m['capability']}, one thread, fp32, {m['date']}; {m['note']}. Forward and backward, gradients "
        "of hidden states and weight. Ratios are to the three bare GEMMs of the same call.", "",
        "| shape | | CPU seconds | of three GEMMs | extra memory, MB |", "| --- | --- | ---: | ---: | ---: |",
    ]  # fmt: skip
    for row in results["rows"]:
        name = NAMES.get(row["run"], f"trapo_kernels, K = {row['run'].removeprefix('topk')}")
        lines.append(f"| {row['shape']} | {name} | {row['seconds']:.2f} | {row['gemms']:.2f} | {row['extra_mb']:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, default=0, choices=range(len(SHAPES)))
    parser.add_argument("--runs", default="gemms,topk8,topk64,topk256,checkpointed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--note", default="nothing else ran", help="about the machine, for the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(SHAPES[arguments.shape], arguments.runs.split(","), arguments.rounds)
    path = RESULTS / "support.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    fresh = {(row["shape"], row["run"]) for row in rows}
    kept = [row for row in kept if (row["shape"], row["run"]) not in fresh]
    order = [*RUNS]
    together = sorted(kept + rows, key=lambda row: (-int(row["shape"].split()[0][2:]), order.index(row["run"])))
    results = {"machine": {**machine(), "note": arguments.note}, "rows": together}
    path.write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "support.md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
