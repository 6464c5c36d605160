"""TRL's GRPOTrainer, TrapoGRPOTrainer, and TrapoGRPOTrainer with expert prefixes: the same 20 steps, side by side.

    python bench/trl_run.py --out bench/results/trl_run            # writes .json and .md

SmolLM2-135M-Instruct on arithmetic word problems (trapo.data.tasks.word_problems), T = 1, one prompt a step with four
rollouts of at most 16 tokens, the last six layers trained: small, so that three runs end within the hour on two cores.
The first two runs see the same data in the same order from the same seed; they differ by rounding only until a sampled
token differs, and are then two samples of one process. What is compared is the loss and its metrics, not the learning
of 20 steps.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

RUNS = ("trl", "trapo", "trapo+prefixes")
SHOWN = ("loss", "reward", "entropy", "grad_norm", "clip_ratio/region_mean", "completions/mean_length")
EXPERT = ("expert/guided", "expert/tokens", "expert/prob")


# All but the last six layers: a CPU's hour is short.
FROZEN = r"embed_tokens|layers\.(\d|1\d|2[0-3])\."


def overlap(text: str, trace: str) -> float:
    """Returns the share of the trace's numbers and signs that the text has: a reward that varies from the first step
    on."""
    wanted, found = (set(re.findall(r"\d+|[-+*/=#]", t)) for t in (trace, text))
    return len(wanted & found) / len(wanted)


def train(run: str, steps: int, seed: int, folder: Path) -> dict[str, Any]:
    """Runs one training in this process; returns what its log says of each step, and the peak memory."""
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from trapo.config import ModelConfig
    from trapo.data.tasks.word_problems import generate
    from trapo.guidance import NEVER, schedule
    from trapo.models.loading import SMOLLM2, load_model
    from trapo_kernels.integrations.trl import TrapoGRPOTrainer

    torch.manual_seed(seed)
    model, tokenizer = load_model(ModelConfig(path=SMOLLM2, freeze=FROZEN))
    problems = generate("train", steps, seed=seed, difficulty="easy", example=False)
    data = Dataset.from_list(
        [{"prompt": list(p.prompt), "answer": p.answer, "trace": p.traces[0]} for p in problems]
    )  # fmt: skip

    def reward(completions: list[Any], trace: list[str], **_: Any) -> list[float]:
        return [overlap(text[0]["content"], wanted) for text, wanted in zip(completions, trace, strict=True)]

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


def difference(first: dict[str, Any], second: dict[str, Any]) -> str:
    """Returns how far two runs' logs are apart."""
    worst = {}
    for a, b in zip(first["steps"], second["steps"], strict=True):
        for name in a.keys() - {"step_time", "total_flos"}:
            apart = abs(float(a[name]) - float(b[name])) / max(abs(float(a[name])), 1e-9)
            worst[name] = max(worst.get(name, 0.0), apart)
    apart = {name: value for name, value in worst.items() if value > 0}
    largest = ", ".join(f"{name} {value:.1g}" for name, value in sorted(apart.items()))
    return (
        f"Of {len(worst)} logged quantities `{first['run']}` and `{second['run']}` agree to the last digit in all but "
        f"these, in whose worst step the relative difference is: {largest or 'none'}."
    )


def table(results: list[dict[str, Any]]) -> str:
    """Returns the report, in Markdown."""
    lines = [
        "# 20 steps of TRL's GRPOTrainer and of TrapoGRPOTrainer",
        "",
        "SmolLM2-135M-Instruct, word problems, one prompt and 4 rollouts of at most 16 tokens a step, the last six "
        "layers trained, dapo, fp32 on a CPU; the reward is the share of the trace's numbers and signs that a response "
        "has. Made by `bench/trl_run.py`. "
        "`trl` and `trapo` start from the same seed: equal up to rounding until a sampled token differs.",
        "",
    ]
    for result in results:
        lines.append(f"- `{result['run']}`: loss in {result['loss_path']}; peak memory {result['peak_mib']:.0f} MiB")
    if len(results) > 1:
        lines += ["", difference(*results[:2])]
    lines += ["", "Seconds are in the JSON; other work ran on the machine, so they compare nothing.", ""]
    for name in (*SHOWN, *EXPERT):
        present = [r for r in results if any(name in step for step in r["steps"])]
        if not present:
            continue
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
    parser.add_argument("--resume", action="store_true", help="keep the runs that OUT.json has")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.run:
        with tempfile.TemporaryDirectory() as folder:
            print("\n" + json.dumps(train(args.run, args.steps, args.seed, Path(folder))))
        return
    file = args.out.with_suffix(".json")
    results = json.loads(file.read_text())["runs"] if args.resume and file.exists() else []
    for run in RUNS[len(results) :]:  # a process each, so that peak memory is its own
        command = [sys.executable, __file__, "--run", run, "--steps", str(args.steps), "--seed", str(args.seed)]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        results.append(json.loads(found.stdout.strip().splitlines()[-1]))
        print(run, f"{results[-1]['seconds']:.0f} s", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"versions": versions(), "runs": results}, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    main()
