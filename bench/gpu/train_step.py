"""Stage: a real training step: a Llama of random weights with a real vocabulary, the stock loss beside ours."""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch

import trapo_kernels as tk
from bench.gpu.rows import Rows, one_line, options, settle

__all__ = ["main"]

SIZES = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 12,
    "num_attention_heads": 16, "num_key_value_heads": 4,
}  # fmt: skip
BATCH = {"cuda": (8, 2048), "cpu": (2, 16)}  # sequences, tokens of each
STEPS = 6
# Losses of the same steps may differ by the rounding of bf16, which grows from step to step.
APART = 2e-2


def train(backend: str | None, device: str) -> dict[str, Any]:
    """Returns the milliseconds, tokens per second, peak memory and losses of some steps; backend None: transformers'
    own loss."""
    from bench.gpu.llama import random_llama
    from trapo_kernels.integrations.transformers import patch_causal_lm_loss

    torch.manual_seed(0)
    sequences, length = BATCH[device]
    with torch.device(device):
        model = random_llama(device, SIZES, max_position_embeddings=4096).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if backend is not None:
        patch_causal_lm_loss(model, tk.Objective.sft(), backend=backend)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (sequences, length), generator=generator).to(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, losses = [], []
    for _ in range(STEPS):
        settle(device)
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss))
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[1:])
    peak = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if device == "cuda" else {}
    return {"ms": 1e3 * seconds, "tokens_per_s": ids.numel() / seconds, **peak, "losses": losses}


def main(arguments: list[str] | None = None) -> int:
    chosen = options(__doc__, arguments)
    rows, stock, bad = Rows(chosen.rows), None, False
    names = [b.name for b in tk.backends().values() if b.kernel is not None]
    for name in [None, *(n for n in names if tk.backends()[n].device in (None, chosen.device))]:
        label = name or "transformers' own loss"
        if name is not None and not tk.backends()[name].available:
            rows.add(what="training step", loss=label, left_out=tk.backends()[name].missing)
            continue
        try:
            row = train(name, chosen.device)
        except Exception as error:
            bad |= name is not None
            rows.add(what="training step", loss=label, failed=one_line(error))
            continue
        if name is None:
            stock = row["losses"]
        elif stock is not None:
            row["apart"] = max(abs(a - b) for a, b in zip(row["losses"], stock, strict=True))
            bad |= not row["apart"] <= APART
        rows.add(what="training step", loss=label, **row)
        if chosen.device == "cuda":
            torch.cuda.empty_cache()
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
