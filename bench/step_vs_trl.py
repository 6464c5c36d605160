"""A whole step of trapo against one of TRL's GRPOTrainer: generation, rewards, log-probabilities and update.

    python -m bench.step_vs_trl trl/2 trl/8 trl/16              # TRL by its micro-batch, one round each
    python -m bench.step_vs_trl trl/8 trapo generate apart      # adds rounds to bench/results/step_vs_trl.json

SmolLM2-135M-Instruct, all parameters trained in fp32, prompts of GSM8K, 8 rollouts each at T = 1. Both sides get the
same prompts in the same order, and every response has exactly `--max-tokens` tokens: no token ends one
(`min_new_tokens` for TRL, no end of sequence for trapo). The tokens are each side's own. Both grade every response with
trapo's grader, in two worker processes; the loss then takes one reward in two for right, so that no group has equal
rewards and nothing is gained by leaving rollouts out.

`trl`: TRL's trainer as it is, without vLLM: transformers' `generate` and its chunked fused head; fp32, no gradient
checkpointing, dapo's loss, no KL term. The number is its `per_device_train_batch_size`; all rollouts of a step are
generated in one batch whatever it is. `trapo`: `train_step` as `trapo train` calls it, mode grpo, engine hf, all
defaults. `generate`: the same with transformers' `generate` instead of trapo's loop. `apart`: with `generate`, and
without sharing prompts in the update (train.share_prefixes=never): what the fused loss alone gives.

Each side runs in a fresh process: a step that warms up, then the timed ones. A cell is the best step of all rounds.
Memory is the high-water mark over all steps, less what was resident before the first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measure import RESULTS, machine
from bench.trainer_vs_trl import EPSILON, GROUP, LR, Meter, reward_of
from bench.trl_trainers import write_model

OURS = ("trapo", "generate", "apart")
LAYERS = 30  # all
PARTS = ("generate", "update")


def load_prompts(count: int, data: Path) -> list[Any]:
    """Returns the first problems of GSM8K, or of the demo's generator where that is not there."""
    from trapo.data.loading import load_problems

    file = data / "gsm8k-train.jsonl"
    source = str(file) if file.exists() else f"task://word_problems?split=train&n={count}&seed=0"
    return list(load_problems(source, limit=count))


def run_trl(args: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Measures steps of TRL's own trainer."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from trapo.config import ModelConfig
    from trapo.models.loading import load_model
    from trapo.rewards.scoring import make_pool, score_texts
    from trapo.settings.groups import RewardConfig

    model, tokenizer = load_model(ModelConfig(path=str(args.model)))
    problems = load_prompts(args.prompts, args.data)
    by_text = {p.prompt[-1]["content"]: p for p in problems}
    meter, parts, sequences = Meter(), [], args.prompts * GROUP

    class Timed(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            meter.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.stop()

    with tempfile.TemporaryDirectory() as folder, make_pool(RewardConfig(workers=2)) as pool:

        def rewards(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
            found = score_texts(
                pool, [c[-1]["content"] for c in completions], [by_text[p[-1]["content"]] for p in prompts]
            )
            return [reward_of(i % GROUP) for i in range(len(found))]

        config = GRPOConfig(
            folder, max_steps=args.steps + 1, per_device_train_batch_size=batch, num_generations=GROUP,
            gradient_accumulation_steps=sequences // batch, learning_rate=LR, lr_scheduler_type="constant",
            loss_type="dapo", scale_rewards="group", beta=0.0, epsilon=EPSILON, max_grad_norm=1.0, logging_steps=1,
            max_completion_length=args.max_tokens, generation_kwargs={"min_new_tokens": args.max_tokens},
            report_to=[], save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False,
            disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model, reward_funcs=rewards, args=config, processing_class=tokenizer, callbacks=[Timed()],
            train_dataset=Dataset.from_list([{"prompt": [dict(m) for m in p.prompt]} for p in problems]),
        )  # fmt: skip
        generate_and_score = trainer._generate_and_score_completions

        def timed(inputs: Any) -> Any:
            began = time.perf_counter()
            result = generate_and_score(inputs)
            parts.append({"generate": time.perf_counter() - began})
            return result

        trainer._generate_and_score_completions = timed
        trainer.train()
    lengths = [row["completions/min_length"] for row in trainer.state.log_history if "completions/min_length" in row]
    assert len(parts) == args.steps + 1
    assert min(lengths) == args.max_tokens, lengths
    for part, seconds in zip(parts[1:], meter.seconds, strict=True):
        part["update"] = seconds - part["generate"]
    return {**meter.memory, "seconds": meter.seconds, "parts": parts[1:]}


def run_trapo(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Measures steps of trapo, which `trapo train` makes by the same function."""
    from trapo.config import merge_config
    from trapo.data.encode import decode_text, encode_problems
    from trapo.engines.hf import HFEngine
    from trapo.engines.ways import WAYS
    from trapo.models.loading import load_model
    from trapo.modes import phases
    from trapo.rewards import Reward
    from trapo.rewards.scoring import make_pool, score_texts
    from trapo.rollouts import Rollout
    from trapo.tools.timing import StepTimer
    from trapo.trainer import make_learner, train_step

    sharing = "never" if name == "apart" else "auto"
    train = {"steps": args.steps + 1, "share_prefixes": sharing}
    config = merge_config({"mode": "grpo", "model": {"path": str(args.model)}, "optim": {"lr": LR}, "train": train})
    model, tokenizer = load_model(config.model)
    encoded, _ = encode_problems(
        load_prompts(args.prompts, args.data), tokenizer, max_prompt_tokens=1024, max_trace_tokens=1024
    )
    engine = HFEngine(model, eos_ids=[], pad_id=tokenizer.pad_token_id)
    engine.way = WAYS[0] if name == "trapo" else WAYS[1]
    (phase,) = phases(config)
    learner = make_learner(config, model, pad_id=tokenizer.pad_token_id, phase=phase)
    meter, parts, timer = Meter(), [], StepTimer()
    with make_pool(config.reward) as pool:

        def score(rollouts: Sequence[Rollout]) -> list[Reward]:
            texts = [decode_text(tokenizer, r.response_ids) for r in rollouts]
            found = score_texts(pool, texts, [r.problem.problem for r in rollouts])
            return [Reward(reward_of(i % GROUP), r.status, r.detail) for i, r in enumerate(found)]

        for step in range(args.steps + 1):
            meter.start()
            rollouts, update = train_step(
                encoded, phase, engine, score, learner,
                baseline="all", temperature=1.0, max_response_tokens=args.max_tokens, seed=step, timer=timer,
            )  # fmt: skip
            engine.sync(model)
            meter.stop()
            assert len(rollouts) == args.prompts * GROUP
            assert update.optimizer_steps == 1
            assert all(len(r.own_ids) == args.max_tokens for r in rollouts)
            taken = timer.take()
            parts.append({"generate": taken["seconds_generate"] + taken["seconds_reward"]})
            parts[-1]["update"] = taken["seconds_update"] + taken["seconds_logprobs"]
    return {**meter.memory, "seconds": meter.seconds, "parts": parts[1:]}


def fresh_process(name: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.step_vs_trl", name, "--here"]
    for flag in ("prompts", "max_tokens", "steps", "threads", "data", "model"):
        command += ["--" + flag.replace("_", "-"), str(getattr(args, flag))]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def best_of(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the seconds of the fastest step of all rounds, of its parts, and the memory of the leanest round."""
    steps = [(seconds, parts) for r in rounds for seconds, parts in zip(r["seconds"], r["parts"], strict=True)]
    seconds, parts = min(steps, key=lambda pair: pair[0])
    return {"seconds": seconds, "memory_mb": min(r["update_mb"] for r in rounds), **parts}


def report(results: dict[str, Any]) -> str:
    """Returns the page: a row for each side, TRL's fastest micro-batch first, and what its others take."""
    best = {name: best_of(rounds) for name, rounds in results["rounds"].items()}
    tried = sorted((n for n in best if n.startswith("trl/")), key=lambda n: best[n]["seconds"])
    chosen, settings, found = tried[0], results["settings"], results["machine"]
    packages = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "transformers", "trl"))
    computer = f"{found['cpu']}, {found['capability']}, {packages}"
    lines = [
        "# A whole step: trapo and TRL's GRPOTrainer",
        "",
        "Written by `python -m bench.step_vs_trl`: generation, rewards, log-probabilities and update; SmolLM2-135M, "
        f"fp32, {settings['prompts']} prompts of {settings['source']} × {GROUP} rollouts of {settings['max_tokens']} "
        f"tokens each, {settings['threads']} threads; {computer}, {results['date']}{results['note']}. "
        f"TRL has the fastest of the micro-batches that were tried; `generate` is trapo with transformers' `generate`, "
        f"`apart` that without sharing prompts in the update.",
        "",
        "<!-- --8<-- [start:table] -->",
        "| side | step, s | generation and rewards, s | update, s | steps an hour | × TRL | memory, MB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in (chosen, *(n for n in OURS if n in best)):
        b, speed = best[name], best[chosen]["seconds"] / best[name]["seconds"]
        title = f"TRL, micro-batch {name.removeprefix('trl/')}" if name == chosen else f"`{name}`"
        cells = (b["seconds"], *(b[part] for part in PARTS))
        lines.append(
            f"| {title} | {' | '.join(f'{c:.1f}' for c in cells)} | {3600 / b['seconds']:.0f} | {speed:.2f} | "
            f"{b['memory_mb']:.0f} |"
        )
    searched = ", ".join(f"{n.removeprefix('trl/')}: {best[n]['seconds']:.1f} s" for n in tried)
    rounds = ", ".join(
        f"{n} {sum(len(r['seconds']) for r in results['rounds'][n])}" for n in (chosen, *OURS) if n in best
    )
    lines += [
        "<!-- --8<-- [end:table] -->",
        "",
        f"TRL's step by its micro-batch: {searched}. Timed steps: {rounds}.",
        "",
    ]
    return "\n".join(lines)


def keep(args: argparse.Namespace, name: str, found: dict[str, Any]) -> None:
    """Adds a round to the results, and writes the page anew. Rounds of other settings are not mixed with it."""
    file, path = args.data / "gsm8k-train.jsonl", args.out
    settings = {flag: getattr(args, flag) for flag in ("prompts", "max_tokens", "threads")}
    settings["source"] = "GSM8K" if file.exists() else "word problems"
    results = json.loads(path.read_text()) if path.exists() else {"rounds": {}}
    if results.setdefault("settings", settings) != settings:
        raise SystemExit(f"{path}: has rounds of {results['settings']}; give --out another file")
    results["rounds"].setdefault(name, []).append(found)
    note = f", {args.note}" if args.note else ""
    results |= {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "note": note}
    path.write_text(json.dumps(results, indent=1) + "\n")
    if any(n.startswith("trl/") for n in results["rounds"]):
        path.with_suffix(".md").write_text(report(results))


def side(name: str) -> str:
    """Returns the name of a side, as argparse asks for it."""
    trl, _, batch = name.partition("/")
    if name in OURS or (trl == "trl" and batch.isdigit()):
        return name
    raise argparse.ArgumentTypeError(f"got {name!r}; accepted: trl/N (its micro-batch), {', '.join(OURS)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sides", type=side, nargs="+", help=f"trl/N (its micro-batch), {', '.join(OURS)}")
    parser.add_argument("--out", type=Path, default=RESULTS / "step_vs_trl.json")
    parser.add_argument("--model", type=Path, help="folder of the model, written if it is not there")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="where gsm8k-train.jsonl lies")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=64, help="of a response")
    parser.add_argument("--steps", type=int, default=1, help="timed steps of a process")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--note", default="", help="on the machine, for the page")
    parser.add_argument("--here", action="store_true", help="in this process, as JSON: how the script calls itself")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.here:
        torch.set_num_threads(args.threads)
        (name,) = args.sides
        batch = name.removeprefix("trl/")
        print("\n" + json.dumps(run_trapo(args, name) if name in OURS else run_trl(args, int(batch))))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.model = args.model or Path(folder, "model")
        if not (args.model / "config.json").exists():  # SmolLM2's own file takes long to read
            write_model(args.model, LAYERS)
        for name in args.sides:
            found = fresh_process(name, args)
            keep(args, name, found)
            print(name, f"{min(found['seconds']):.1f} s, {found['update_mb']:.0f} MB", found["parts"], flush=True)


if __name__ == "__main__":
    main()
