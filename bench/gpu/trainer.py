"""Stage: `trapo train` for a few steps, on a random model with a tokenizer of bytes: nothing is downloaded."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.gpu.rows import Rows, options
from bench.gpu.running import ROOT

__all__ = ["main", "write_model"]

STEPS = {"cuda": 5, "cpu": 2}
SIZES = {
    "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"
SHOWN = ("loss", "grad_norm", "reward", "entropy", "step_seconds", "seconds", "tokens_per_second", "peak_memory_gb")


def write_model(folder: Path, device: str) -> None:
    """Writes a Llama of random weights, and byte-level BPE without a merge: 256 tokens and four names."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from bench.gpu.llama import random_llama

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    bytes_alone = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_alone, eos_token=special[0], pad_token=special[0])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    random_llama(device, SIZES, **ids).save_pretrained(folder)


def command(folder: Path, device: str) -> list[str]:
    on_gpu = device == "cuda"
    traces, length = (512, 128) if on_gpu else (256, 8)
    return [
        *(sys.executable, "-m", "trapo.cli", "train", "demo", f"run_dir={folder / 'run'}"),
        *(f"model.path={folder / 'model'}", f"model.device={device}", "train.precision=bfloat16"),
        *(f"train.steps={STEPS[device]}", f"train.prompts_per_step={8 if on_gpu else 1}", "optim.warmup_steps=1"),
        *("data.train=task://word_problems?split=train&n=64&seed=1", "data.eval=null", "data.max_prompt_tokens=1024"),
        *(f"data.max_trace_tokens={traces}", f"rollout.max_response_tokens={traces + length}", "eval.before=false"),
        *("checkpoint.every=0", "train.micro_batch_tokens=4096"),
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    chosen = options(__doc__, arguments)
    rows = Rows(chosen.rows)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", chosen.device)
        start = time.monotonic()
        done = subprocess.run(command(folder, chosen.device), cwd=ROOT, capture_output=True, text=True, check=False)
        print(done.stdout, done.stderr, sep="\n")
        metrics = folder / "run" / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        steps = [line for line in map(json.loads, lines) if "loss" in line]
        for step in steps:
            rows.add(what="trainer's step", **{k: v for k, v in step.items() if k == "step" or k in SHOWN})
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()
        why = {} if done.returncode == 0 else {"failed": words[-1][:300] if words else f"status {done.returncode}"}
        seconds = round(time.monotonic() - start, 1)
        rows.add(what="trapo train", steps=len(steps), of=STEPS[chosen.device], seconds=seconds, **why)
    return done.returncode or int(len(steps) < STEPS[chosen.device])


if __name__ == "__main__":
    sys.exit(main())
