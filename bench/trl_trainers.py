"""TRL's trainers with their own head and with `fuse(trainer)`: time and memory of an update, side by side.

    python -m bench.trl_trainers sft dpo        # these; all without names; adds to bench/results/trl_trainers.json
    python -m bench.trl_trainers --steps 20 --layers 30          # real steps, and what they log, instead of times

The first `--layers` layers of SmolLM2-135M-Instruct (D = 576, V = 49,152), fp32, all parameters trained, eight
sequences of about 128 tokens. Timed is the trainer's own `compute_loss` and its backward on one batch, whose
completions (where the trainer samples) are drawn once; generation and the optimizer, the same on both sides, are left
out. Both sides are one trainer and one batch in one process, in turns, one thread; CPU seconds, the best of the rounds
after one that warms up. Memory is the process's high-water mark over the update less what was resident before it and
less the gradients that the parameters keep. `gradient` is the largest difference between the gradients of the two
sides, as a share of the largest gradient.

With `--steps` each side is a trainer of its own that trains: optimizer, generation and rewards included, four short
rows a step. Compared is every number that is logged but times, by |a − b| / max(|b|, 0.05): rewards and divergences
are differences of log-probabilities, whose rounding does not shrink with them. `rewards/accuracies` is left out where
the margin that it is the sign of is 0 but for rounding, as in a first step, whose policy is its own reference.
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
FLOOR = 0.05  # of a logged number, for a relative difference: as in tests/integrations/test_trl_fuse.py
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


def write_teacher(model: Path) -> Path:
    """Writes a teacher beside the model: the model with other weights, or there is nothing to distil."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model.with_name(f"{model.name}-teacher")
    if not (folder / "config.json").exists():
        teacher = AutoModelForCausalLM.from_pretrained(model)
        torch.manual_seed(0)
        with torch.no_grad():
            for p in teacher.parameters():
                if p.ndim > 1:
                    p.add_(0.2 * p.std() * torch.randn_like(p))
        teacher.save_pretrained(folder)
        AutoTokenizer.from_pretrained(model).save_pretrained(folder)
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
    teacher = write_teacher(model) if name == "distillation" else None
    trainer = trl_trainers.make_trainer(name, model, folder, teacher=teacher, **sizes)
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


def steps_of(name: str, model: Path, folder: Path, steps: int) -> dict[str, Any]:
    """Trains both sides, and returns how far apart the numbers are that they log."""
    import trl_trainers

    from trapo_kernels.integrations.trl import fuse

    logs, path = [], ""
    teacher = write_teacher(model) if name == "distillation" else None
    for fused in (False, True):
        trainer = trl_trainers.make_trainer(
            name, model, folder, teacher=teacher, max_steps=steps, gradient_accumulation_steps=1, learning_rate=1e-5
        )
        handle = fuse(trainer) if fused else None
        logs.append(trl_trainers.logs_of(trainer))
        path = path if handle is None else handle.path
        del trainer, handle
        gc.collect()
    stock, ours = logs
    assert len(stock) == len(ours) == steps
    pairs = [
        (abs(a[key] - b[key]) / max(abs(b[key]), FLOOR), key)
        for a, b in zip(ours, stock, strict=True)
        for key in b
        if "time" not in key and b[key] == b[key] and not (key == "rewards/accuracies" and tie(b))
    ]
    largest, key = max(pairs)
    return {"trainer": name, "path": path, "steps": steps, "numbers": len(pairs), "largest": largest, "key": key}


def tie(logged: dict[str, float]) -> bool:
    return abs(logged["rewards/margins"]) < 1e-5


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
    rows = sorted(results.get("rows", []), key=lambda row: (row["layers"], NAMES.index(row["trainer"])))
    for row in rows:
        times = row["trl_seconds"] / row["fused_seconds"]
        lines.append(
            f"| {row['trainer']} | {row['layers']} | {row['path'].split(':')[0]} | {row['trl_seconds']:.2f} | "
            f"{row['fused_seconds']:.2f} | {times:.2f}× | {row['trl_mb']:.0f} | {row['fused_mb']:.0f} | "
            f"{row['gradient']:.0e} |"
        )
    lines += ["<!-- --8<-- [end:table] -->", "", *_notes(rows, "rounds")]
    steps = sorted(results.get("steps", []), key=lambda row: NAMES.index(row["trainer"]))
    if steps:
        lines += [
            "Real steps of the whole model, each side a trainer of its own; the largest difference of all logged "
            f"numbers but times, as a share of the number, or of {FLOOR}, which is more. `rewards/accuracies` is left "
            "out where the margin that it is the sign of is 0 but for rounding.\n",
            "<!-- --8<-- [start:steps] -->",
            "| trainer | layers | steps | logged numbers | largest difference | of |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for row in steps:
            lines.append(
                f"| {row['trainer']} | {row['layers']} | {row['steps']} | {row['numbers']} | {row['largest']:.0e} | "
                f"{row['key']} |"
            )
        lines += ["<!-- --8<-- [end:steps] -->", "", *_notes(steps, "steps")]
    return "\n".join(lines)


def _notes(rows: list[dict[str, Any]], unit: str) -> list[str]:
    notes = [f"{r['trainer']} {r['layers']}: {r['date']}, {r[unit]} {unit}, {r['note']}" for r in rows]
    return ["; ".join(notes) + ".", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", default=NAMES, metavar="trainer", help=", ".join(NAMES))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="compare what so many real steps log, instead of times")
    parser.add_argument("--model", type=Path, help="a folder that an earlier run wrote, or will")
    parser.add_argument("--note", default="", help="what else the machine did, kept with the rows")
    parser.add_argument("--out", type=Path, default=RESULTS / "trl_trainers.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kind = "steps" if arguments.steps else "rows"
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or Path(folder, "model")
        if not (model / "config.json").exists():
            write_model(model, arguments.layers)
        for name in arguments.names:
            if arguments.steps:
                row = steps_of(name, model, Path(folder), arguments.steps)
            else:
                row = row_of(name, model, Path(folder), arguments.rounds)
            row |= {"layers": arguments.layers, "note": arguments.note, "date": time.strftime("%Y-%m-%d")}
            keep(arguments.out, kind, row)
            print(json.dumps(row), flush=True)


def keep(path: Path, kind: str, row: dict[str, Any]) -> None:
    """Writes a row in the place of an earlier one of its trainer and layers, and the page with it."""
    results = json.loads(path.read_text()) if path.exists() else {}
    same = (row["trainer"], row["layers"])
    earlier = [r for r in results.get(kind, []) if (r["trainer"], r["layers"]) != same]
    results |= {kind: [*earlier, row], "machine": machine()}
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(report(results))


if __name__ == "__main__":
    main()
