"""TRL's trainers with their own head and with `fuse(trainer)`: time and memory of an update, side by side.

    python -m bench.trl_trainers sft dpo        # these; all without names; adds to bench/results/trl_trainers.json

The first `--layers` layers of SmolLM2-135M-Instruct (D = 576, V = 49,152), fp32, all parameters trained, eight
sequences of about 128 tokens. Timed is the trainer's own `compute_loss` and its backward on one batch, whose
completions (where the trainer samples) are drawn once; generation and the optimizer, the same on both sides, are left
out. Both sides are one trainer and one batch in one process, in turns, one thread; CPU seconds, the best of the rounds
after one that warms up. Memory is the process's high-water mark over the update less what was resident before it and
less the gradients that the parameters keep. `gradient` is the largest difference between the gradients of the two
sides, as a share of the largest gradient.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from bench.measure import RESULTS, machine, resident

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "integrations"))

NAMES = ("sft", "dpo", "kto", "rloo", "grpo", "distillation")
ROWS, TOKENS = 8, 128
SENTENCE = "The river runs past the mill and the town, and the people of the town walk along it every day of the week. "


def write_model(folder: Path, layers: int) -> Path:
    """Writes the first layers of SmolLM2-135M-Instruct, with its head and tokenizer."""
    from trapo.config import ModelConfig
    from trapo.models.loading import SMOLLM2, load_model

    model, tokenizer = load_model(ModelConfig(path=SMOLLM2))
    if layers < len(model.model.layers):
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:layers]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make(name: str, model: Path, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Returns (the trainer, its first batch)."""
    import trl_trainers

    long = SENTENCE * 5
    trl_trainers.GOOD[:], trl_trainers.BAD[:] = [long[:-i] for i in range(1, 5)], [long[i:] for i in range(1, 5)]
    sizes: dict[str, Any] = {"per_device_train_batch_size": ROWS, "gradient_accumulation_steps": 1}
    if name == "dpo":
        sizes["per_device_train_batch_size"] = ROWS // 2  # pairs
    if name in ("rloo", "grpo", "distillation"):
        sizes["max_completion_length"] = TOKENS
    if name in ("rloo", "grpo"):
        sizes["num_generations"] = ROWS // 2
    trainer = trl_trainers.make_trainer(name, model, folder, **sizes)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def update(trainer: Any, batch: dict[str, Any]) -> tuple[float, int]:
    """Returns the CPU seconds of an update, and the bytes that it took beside the gradients that stay."""
    trainer.model.zero_grad()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed gradients that stay resident would be taken for room that was there
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident("VmRSS"), time.process_time()
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    seconds = time.process_time() - start
    kept = sum(p.grad.numel() * p.grad.itemsize for p in trainer.model.parameters() if p.grad is not None)
    return seconds, resident("VmHWM") - before - kept


def row_of(name: str, model: Path, folder: Path, rounds: int) -> dict[str, Any]:
    from trapo_kernels.integrations.trl import fuse

    trainer, batch = make(name, model, folder)
    sides: dict[str, list[tuple[float, int]]] = {"trl": [], "fused": []}
    gradients: dict[str, list[torch.Tensor]] = {}
    path = ""
    for turn in range(rounds + 1):
        for side, found in sides.items():
            fused = fuse(trainer) if side == "fused" else None
            measured = update(trainer, batch)
            if turn:
                found.append(measured)
            else:
                gradients[side] = [p.grad.clone() for p in trainer.model.parameters()]
            if fused is not None:
                path = fused.path
                fused.remove()
    largest = max(float(g.abs().max()) for g in gradients["trl"])
    pairs = zip(gradients["trl"], gradients["fused"], strict=True)
    return {
        "trainer": name, "path": path, "rounds": rounds,
        **{f"{side}_seconds": min(s for s, _ in found) for side, found in sides.items()},
        **{f"{side}_mb": min(b for _, b in found) / 1e6 for side, found in sides.items()},
        "gradient": max(float((a - b).abs().max()) for a, b in pairs) / largest,
    }  # fmt: skip


def report(results: dict[str, Any]) -> str:
    """Returns the rows as a page of their own."""
    m = results["machine"]
    lines = [
        "# TRL's trainers, their own head and `fuse(trainer)`\n",
        "Written by `python -m bench.trl_trainers`: loss and backward of one batch, fp32, one thread, CPU seconds; "
        f"{m['cpu']}, {m['capability']}, torch {m['versions']['torch']}, TRL {m['versions']['trl']}. The model is the "
        "first layers of SmolLM2-135M-Instruct, or all 30.\n",
        "<!-- --8<-- [start:table] -->",
        "| trainer | layers | gradients | TRL, s | fused, s | | TRL, MB | fused, MB | gradients differ by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results["rows"]:
        times = row["trl_seconds"] / row["fused_seconds"]
        lines.append(
            f"| {row['trainer']} | {row['layers']} | {row['path'].split(':')[0]} | {row['trl_seconds']:.2f} | "
            f"{row['fused_seconds']:.2f} | {times:.2f}× | {_mb(row, 'trl')} | {_mb(row, 'fused')} | "
            f"{row['gradient']:.0e} |"
        )
    notes = [f"{r['trainer']} {r['layers']}: {r['date']}, {r['rounds']} rounds, {r['note']}" for r in results["rows"]]
    return "\n".join([*lines, "<!-- --8<-- [end:table] -->", "", "; ".join(notes) + ".", ""])


def _mb(row: dict[str, Any], side: str) -> str:
    return f"{row[f'{side}_mb']:.0f}" if f"{side}_mb" in row else "not measured"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", default=NAMES, metavar="trainer", help=", ".join(NAMES))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, help="a folder that an earlier run wrote, or will")
    parser.add_argument("--note", default="", help="what else the machine did, kept with the rows")
    parser.add_argument("--out", type=Path, default=RESULTS / "trl_trainers.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": []}
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or Path(folder, "model")
        if not (model / "config.json").exists():
            write_model(model, arguments.layers)
        for name in arguments.names:
            row = row_of(name, model, Path(folder), arguments.rounds)
            row |= {"layers": arguments.layers, "note": arguments.note, "date": time.strftime("%Y-%m-%d")}
            same = [r for r in results["rows"] if (r["trainer"], r["layers"]) == (name, arguments.layers)]
            results["rows"] = [r for r in results["rows"] if r not in same] + [row]
            results["machine"] = machine()
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
            print(json.dumps(row), flush=True)
    arguments.out.with_suffix(".md").write_text(report(results))


if __name__ == "__main__":
    main()
