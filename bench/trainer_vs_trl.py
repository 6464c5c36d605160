"""The update phase of trapo's learner against that of TRL's GRPOTrainer: tokens per second and peak memory.

    python -m bench.trainer_vs_trl                       # writes bench/results/trainer_vs_trl.json
    python -m bench.trainer_vs_trl --profile             # where trapo's update spends its time, by operator

SmolLM2-135M-Instruct, all parameters trained in fp32, GSM8K prompts, 8 rollouts each that transformers' `generate` drew
once (T = 1); both sides get these token ids and the same rewards, so both compute the same update (the gradient norms
are reported side by side). Timed is everything from given rollouts to new weights: forward, loss, backward, clipping,
AdamW; TRL's generation and scoring is left out. A token is one of a prompt or a completion; padding is not counted,
but is paid for. Each side runs in fresh processes, in turns, and speeds are medians over rounds of each process's best
step. Memory is a fresh process's high-water mark over its updates, gradients and AdamW's state included, less what was
resident before the first (the weights); both are in the result.

TRL's settings: fp32 without gradient checkpointing (its fastest here), SDPA attention, its chunked fused head (always
on), dapo's loss, no KL term, no old logprobs (it knows that one update needs none), `--trl-batch` sequences in a
micro-batch. trapo's: mode grpo, the same loss; micro-batches of as many padded tokens as TRL's (or `--budget`).
`apart` is trapo with each rollout in a row of its own, as TRL has them: what computing shared prompts once gives.
No group has equal rewards, so that nothing is gained by leaving rollouts without advantage out. The gradient norms
differ by 2e-4: TRL divides advantages by std + 1e-4, trapo by std + 1e-6.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from bench.measure import resident

SIDES = ("trl", "trapo", "apart")  # the last: trapo with train.share_prefixes=never
GROUP = 8
EPSILON = 0.2
LR = 1e-6


def draw_rollouts(path: Path, prompts: int, max_tokens: int, data: Path) -> None:
    """Generate the rollouts that both sides train on: [{prompt, prompt_ids, completion_ids: GROUP lists}]."""
    from trapo.config import merge_config
    from trapo.data.encode import encode_problems
    from trapo.data.loading import load_problems
    from trapo.engines.make import make_engine
    from trapo.engines.protocol import Request
    from trapo.models.loading import SMOLLM2, load_model

    source = str(data / "gsm8k-train.jsonl") if (data / "gsm8k-train.jsonl").exists() else None
    problems = load_problems(source or f"task://word_problems?split=train&n={prompts}&seed=0", limit=prompts)
    config = merge_config({"model": {"path": SMOLLM2}})
    model, tokenizer = load_model(config.model)
    encoded, _ = encode_problems(problems, tokenizer, max_prompt_tokens=1024, max_trace_tokens=1024)
    requests = [Request(p.prompt_ids, max_tokens) for p in encoded for _ in range(GROUP)]
    limits = {"max_tokens": 8192, "precision": config.train.precision, "run_dir": Path(config.run_dir)}
    found = make_engine(config.rollout, model, tokenizer, **limits).generate(requests, temperature=1.0, seed=0)
    rows = [
        {
            "prompt": list(p.problem.prompt),
            "prompt_ids": list(p.prompt_ids),
            "completion_ids": [list(c.token_ids) for c in found[i * GROUP : (i + 1) * GROUP]],
        }
        for i, p in enumerate(encoded)
    ]
    path.write_text(json.dumps({"source": "gsm8k-train" if source else "word_problems", "rows": rows}))


def reward_of(index: int) -> float:
    """Returns the reward of a group's rollout: one in two is right, in an order that has nothing to do with lengths."""
    return float(index % 2)


class Meter:
    """Seconds of updates, the first one (which warms up) left out, and the peak memory of all of them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.memory: dict[str, float] = {}
        self.updates = 0

    def start(self) -> None:
        if not self.updates:
            gc.collect()
            with contextlib.suppress(OSError, AttributeError):  # what was freed while loading is not the model's
                ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
            self.memory["baseline_mb"] = resident("VmRSS") / 1e6
        self.began = time.perf_counter()

    def stop(self) -> None:
        took = time.perf_counter() - self.began
        if self.updates:
            self.seconds.append(took)
        self.updates += 1
        self.memory["peak_mb"] = resident("VmHWM") / 1e6
        self.memory["update_mb"] = self.memory["peak_mb"] - self.memory["baseline_mb"]


def run_trl(rows: list[dict[str, Any]], steps: int, batch: int) -> dict[str, Any]:
    """Measures updates of TRL's own trainer, its generation replaced (by its `rollout_func`) with the given
    rollouts."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from trapo.config import ModelConfig
    from trapo.models.loading import SMOLLM2, load_model

    model, tokenizer = load_model(ModelConfig(path=SMOLLM2))
    by_text = {row["prompt"][-1]["content"]: row for row in rows}
    meter, sequences = Meter(), len(rows) * GROUP

    def given(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        drawn: dict[str, int] = {}
        ids: dict[str, list[list[int]]] = {"prompt_ids": [], "completion_ids": []}
        for prompt in prompts:
            text = prompt[-1]["content"]
            index = drawn[text] = drawn.get(text, -1) + 1
            ids["prompt_ids"].append(by_text[text]["prompt_ids"])
            ids["completion_ids"].append(by_text[text]["completion_ids"][index])
        return {**ids, "logprobs": None}

    def rewards(completions: list[Any], **_: Any) -> list[float]:
        return [reward_of(i % GROUP) for i in range(len(completions))]

    class Stops(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.stop()

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder, max_steps=steps + 1, per_device_train_batch_size=batch, num_generations=GROUP,
            gradient_accumulation_steps=sequences // batch, learning_rate=LR, lr_scheduler_type="constant",
            loss_type="dapo", scale_rewards="group", beta=0.0, epsilon=EPSILON, max_grad_norm=1.0, logging_steps=1,
            max_completion_length=max(len(c) for row in rows for c in row["completion_ids"]), report_to=[],
            save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, seed=0,
        )  # fmt: skip
        prompts = Dataset.from_list([{"prompt": r["prompt"]} for r in rows])
        trainer = GRPOTrainer(
            model, reward_funcs=rewards, args=config, train_dataset=prompts,
            processing_class=tokenizer, rollout_func=given, callbacks=[Stops()],
        )  # fmt: skip
        score = trainer._generate_and_score_completions

        def score_then_start(batch: Any) -> Any:
            # Once a step, before its first forward: what comes after this, up to the step's end, is the update.
            result = score(batch)
            meter.start()
            return result

        trainer._generate_and_score_completions = score_then_start
        trainer.train()
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": sequences // batch}
    return {**meter.memory, "seconds": meter.seconds, "grad_norm": norms[0], "settings": settings}


def run_trapo(rows: list[dict[str, Any]], steps: int, budget: int, share: str, profile: bool) -> dict[str, Any]:
    """Measures updates of trapo's learner."""
    import trapo_kernels as tk
    from trapo.config import merge_config
    from trapo.models.loading import SMOLLM2, load_model
    from trapo.rollouts import assign_advantages
    from trapo.trainer import make_learner

    settings = {"micro_batch_tokens": budget, "steps": steps + 1, "share_prefixes": share}
    config = merge_config({"mode": "grpo", "model": {"path": SMOLLM2}, "optim": {"lr": LR}, "train": settings})
    model, tokenizer = load_model(config.model)
    rollouts = as_rollouts(rows)
    assign_advantages(rollouts, "all", True)
    learner = make_learner(config, model, pad_id=tokenizer.pad_token_id)
    objective = tk.Objective.grpo(clip_low=EPSILON, clip_high=EPSILON)
    meter, norms = Meter(), []
    for step in range(steps + 1):
        meter.start()
        if profile and step:
            update = profiled(lambda: learner.update(rollouts, objective, seed=0))
        else:
            update = learner.update(rollouts, objective, seed=0)
        meter.stop()
        norms.append(update.grad_norm)
    extra = {"settings": settings, "backend": tk.default_backend()}
    return {**meter.memory, "seconds": meter.seconds, "grad_norm": norms[0], **extra}


def as_rollouts(rows: list[dict[str, Any]]) -> list[Any]:
    from trapo.data.encode import EncodedProblem
    from trapo.data.problem import Problem
    from trapo.rollouts import Rollout

    rollouts = []
    for group, row in enumerate(rows):
        problem = EncodedProblem(Problem(str(group), tuple(row["prompt"]), "", (), ""), tuple(row["prompt_ids"]), ())
        for i, ids in enumerate(row["completion_ids"]):
            rollouts.append(Rollout(problem, group, 0, 0.0, (), tuple(ids), False, True, reward_of(i)))
    return rollouts


def profiled(function: Any) -> Any:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CPU]) as profile:
        result = function()
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25), file=sys.stderr)
    return result


def side(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Runs one side in this process."""
    import torch

    torch.set_num_threads(args.threads)
    rows = json.loads(args.rollouts.read_text())["rows"]
    if name == "trl":
        return run_trl(rows, args.steps, args.trl_batch)
    longest = max(len(r["prompt_ids"]) + len(c) for r in rows for c in r["completion_ids"])
    share = "never" if name == "apart" else "auto"
    return run_trapo(rows, args.steps, args.budget or args.trl_batch * longest, share, args.profile)


def fresh_process(name: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.trainer_vs_trl", "--side", name]
    for flag in ("steps", "trl_batch", "budget", "threads", "rollouts"):
        if (value := getattr(args, flag)) is not None:
            command += ["--" + flag.replace("_", "-"), str(value)]
    command += ["--profile"] * args.profile
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(runs: dict[str, list[dict[str, Any]]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns ratios, and the numbers that they come from."""
    tokens = sum(len(r["prompt_ids"]) + len(c) for r in rows for c in r["completion_ids"])
    found = {}
    for name, rounds in runs.items():
        found[name] = {
            "tokens_per_second": tokens / statistics.median(min(r["seconds"]) for r in rounds),
            "best_tokens_per_second": tokens / min(min(r["seconds"]) for r in rounds),
            "update_memory_mb": statistics.median(r["update_mb"] for r in rounds),
            "peak_rss_mb": statistics.median(r["peak_mb"] for r in rounds),
            "baseline_rss_mb": statistics.median(r["baseline_mb"] for r in rounds),
            "grad_norm": rounds[0]["grad_norm"],
            "rounds": rounds,
        }
    trl, trapo, apart = found["trl"], found["trapo"], found["apart"]
    return {
        "sharing_speedup": trapo["tokens_per_second"] / apart["tokens_per_second"],
        "sharing_memory_ratio": trapo["update_memory_mb"] / apart["update_memory_mb"],
        "update_speedup": trapo["tokens_per_second"] / trl["tokens_per_second"],
        "update_speedup_of_bests": trapo["best_tokens_per_second"] / trl["best_tokens_per_second"],
        "memory_ratio": trapo["update_memory_mb"] / trl["update_memory_mb"],
        "peak_rss_ratio": trapo["peak_rss_mb"] / trl["peak_rss_mb"],
        "tokens": tokens,
        "completion_lengths": sorted(len(c) for r in rows for c in r["completion_ids"]),
        "prompt_lengths": [len(r["prompt_ids"]) for r in rows],
        **found,
    }


def versions(threads: int) -> dict[str, str]:
    import torch
    import transformers
    import trl

    return {
        "date": time.strftime("%Y-%m-%d"), "machine": platform.machine(), "threads": str(threads),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(), "python": platform.python_version(),
        "torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__,
    }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/trainer_vs_trl.json"))
    parser.add_argument("--rollouts", type=Path, help="file of rollouts, drawn if it is not there")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="where gsm8k-train.jsonl lies")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=256, help="of a completion")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed updates of a process")
    parser.add_argument("--trl-batch", type=int, default=8, help="TRL's per_device_train_batch_size")
    parser.add_argument("--budget", type=int, help="trapo's micro_batch_tokens")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--profile", action="store_true", help="trapo alone, under torch's profiler")
    parser.add_argument("--side", choices=SIDES, help="this side alone, as JSON: how the script calls itself")
    return parser.parse_args()


def main() -> None:
    args = parse()
    warnings.filterwarnings("ignore")
    if args.side:
        print("\n" + json.dumps(side(args.side, args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.rollouts = args.rollouts or Path(folder) / "rollouts.json"
        if not args.rollouts.exists():
            draw_rollouts(args.rollouts, args.prompts, args.max_tokens, args.data)
        given = json.loads(args.rollouts.read_text())
        if args.profile:
            fresh_process("trapo", args)
            return
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
        for number in range(args.rounds):
            for name in SIDES:
                run = fresh_process(name, args)
                runs[name].append(run)
                print(number + 1, name, f"{min(run['seconds']):.1f} s, {run['update_mb']:.0f} MB", flush=True)
    result = {"versions": versions(args.threads), "source": given["source"], **compare(runs, given["rows"])}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for key in ("update_speedup", "memory_ratio", "peak_rss_ratio", "sharing_speedup", "sharing_memory_ratio"):
        print(f"{key}: {result[key]:.2f}")
    print("grad norms:", *(f"{name} {result[name]['grad_norm']:.6g}" for name in SIDES))


if __name__ == "__main__":
    main()
