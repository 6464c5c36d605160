"""TRL's GRPOTrainer, TrapoGRPOTrainer, and TrapoGRPOTrainer with expert prefixes: the same 20 steps, side by side.

    python bench/trl_run.py --out bench/results/trl_run            # writes .json and .md

SmolLM2-135M-Instruct on arithmetic word problems (trapo.tasks.word_problems), T = 1, one prompt a step with four
rollouts of at most 16 tokens: small, so that three runs end within the hour on two cores. The first two runs see the
same data in the same order from the same seed; they differ by rounding only until a sampled token differs, and are then
two samples of one process. What is compared is the loss, its metrics and the memory, not the learning of 20 steps.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

RUNS = ("trl", "trapo", "trapo+prefixes")
SHOWN = ("loss", "reward", "entropy", "grad_norm", "clip_ratio/region_mean", "completions/mean_length")
EXPERT = ("expert/guided", "expert/tokens", "expert/prob")


def train(run: str, steps: int, seed: int, folder: Path) -> dict[str, Any]:
    """One run in this process: what its log says of each step, and the peak memory."""
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from trapo.config import ModelConfig
    from trapo.guidance import NEVER, schedule
    from trapo.model import SMOLLM2, load_model
    from trapo.rewards import math_reward
    from trapo.tasks.word_problems import generate
    from trapo_kernels.integrations.trl import TrapoGRPOTrainer

    torch.manual_seed(seed)
    model, tokenizer = load_model(ModelConfig(path=SMOLLM2))
    problems = generate("train", steps, seed=seed, difficulty="easy", example=False)
    data = Dataset.from_list(
        [{"prompt": list(p.prompt), "answer": p.answer, "trace": p.traces[0]} for p in problems]
    )  # fmt: skip

    def reward(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
        return [math_reward(text[0]["content"], right) for text, right in zip(completions, answer, strict=True)]

    config = GRPOConfig(
        str(folder), max_steps=steps, per_device_train_batch_size=4, num_generations=4, max_completion_length=16,
        learning_rate=5e-6, lr_scheduler_type="constant", loss_type="dapo", entropy_coef=0.001, epsilon_high=0.28,
        logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False,
        disable_tqdm=True, seed=seed, scale_rewards="none",
    )  # fmt: skip
    extra: dict[str, Any] = {}
    if run == "trapo+prefixes":
        extra["guidance"] = schedule([2, 1, 1], [0.0, 0.5, 1.0], [NEVER, 0.7, 0.9])
    kind = GRPOTrainer if run == "trl" else TrapoGRPOTrainer
    trainer = kind(model, reward_funcs=reward, args=config, train_dataset=data, processing_class=tokenizer, **extra)
    start = time.perf_counter()
    trainer.train()
    return {
        "run": run,
        "loss_path": getattr(trainer, "loss_path", "TRL's own"),
        "seconds": time.perf_counter() - start,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "steps": [row for row in trainer.state.log_history if "reward" in row],
    }


def versions() -> dict[str, str]:
    import torch
    import transformers
    import trl

    return {
        "machine": platform.machine(), "cpus": str(torch.get_num_threads()), "python": platform.python_version(),
        "torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__,
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """The report, in Markdown."""
    lines = [
        "# 20 steps of TRL's GRPOTrainer and of TrapoGRPOTrainer",
        "",
        "SmolLM2-135M-Instruct, word problems, one prompt and 4 rollouts of at most 16 tokens a step, dapo, fp32 on a "
        "CPU; made by `bench/trl_run.py`. "
        "`trl` and `trapo` start from the same seed: equal up to rounding until a sampled token differs.",
        "",
    ]
    for result in results:
        lines.append(f"- `{result['run']}`: loss in {result['loss_path']}; peak memory {result['peak_mib']:.0f} MiB")
    lines += ["", "Seconds are in the JSON; other work ran on the machine, so they compare nothing.", ""]
    for name in (*SHOWN, *EXPERT):
        present = [r for r in results if any(name in step for step in r["steps"])]
        lines += [f"## {name}", "", "| step | " + " | ".join(r["run"] for r in present) + " |"]
        lines.append("|" + " --- |" * (len(present) + 1))
        for i in range(max(len(r["steps"]) for r in present)):
            cells = [r["steps"][i].get(name) for r in present]
            lines.append(f"| {i + 1} | " + " | ".join("" if c is None else f"{float(c):.5g}" for c in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/trl_run"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", choices=RUNS, help="this run alone, as JSON on stdout: how the script calls itself")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.run:
        print("\n" + json.dumps(train(args.run, args.steps, args.seed, args.out.parent / "unused")))
        return
    results = []
    for run in RUNS:  # a process each, so that peak memory is its own
        command = [sys.executable, __file__, "--run", run, "--steps", str(args.steps), "--seed", str(args.seed)]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        results.append(json.loads(found.stdout.strip().splitlines()[-1]))
        print(run, f"{results[-1]['seconds']:.0f} s", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(json.dumps({"versions": versions(), "runs": results}, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    main()
