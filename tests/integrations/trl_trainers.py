"""Each of TRL's trainers on a tiny model and a few rows, for tests and for bench/trl_trainers.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trl
from datasets import Dataset

TRAINERS = ("sft", "dft", "dpo", "kto", "rloo", "grpo", "distillation")
PROMPTS = ["2 + 3 =", "The sky is", "One two three", "Why"]
GOOD = [" 5, the sum of both", " blue over the sea", " four five six seven", " because it is so"]
BAD = [" 7", " made of green stones and cheese", " nine", " not"]

COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 20, "learning_rate": 1e-4,
    "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": [], "save_strategy": "no", "use_cpu": True,
    "seed": 0, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
}  # fmt: skip
SAMPLED = {"num_generations": 4, "max_completion_length": 12}


def letters(completions: list[str], **_: Any) -> list[float]:
    """A reward that random models earn now and then."""
    return [sum(c.isdigit() or c in "aeiou" for c in text) / (len(text) + 1) for text in completions]


def make_trainer(name: str, model: Any, folder: Path, *, peft: Any = None, teacher: Any = None, **settings: Any) -> Any:
    """Returns the trainer of this name; `settings` are arguments of its configuration. `model`, `teacher`: paths."""
    arguments, folder = {**COMMON, **settings}, str(folder)
    prompts, good, bad = (texts * 4 for texts in (PROMPTS, GOOD, BAD))
    given = {"model": str(model), "peft_config": peft}
    if name in ("sft", "dft"):
        rows = {"prompt": prompts, "completion": good}
        config = trl.SFTConfig(folder, loss_type="nll" if name == "sft" else "dft", **arguments)
        return trl.SFTTrainer(**given, args=config, train_dataset=Dataset.from_dict(rows))
    if name == "dpo":
        rows = {"prompt": prompts, "chosen": good, "rejected": bad}
        config = trl.DPOConfig(folder, **arguments)
        return trl.DPOTrainer(**given, args=config, train_dataset=Dataset.from_dict(rows))
    if name == "kto":
        rows = {"prompt": prompts, "completion": (GOOD + BAD) * 2, "label": [True] * 4 + [False] * 4}
        rows["label"] = rows["label"] * 2
        config = trl.KTOConfig(folder, **arguments)
        return trl.KTOTrainer(**given, args=config, train_dataset=Dataset.from_dict(rows))
    rows = {"prompt": prompts}
    if name == "distillation":
        config = trl.DistillationConfig(folder, **{"max_completion_length": 12, **arguments})
        return trl.DistillationTrainer(
            **given, teacher_model=str(teacher or model), args=config, train_dataset=Dataset.from_dict(rows)
        )
    kind, kind_of_config = {
        "rloo": (trl.RLOOTrainer, trl.RLOOConfig),
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
    }[name]
    config = kind_of_config(folder, **{**SAMPLED, **arguments})
    return kind(**given, reward_funcs=letters, args=config, train_dataset=Dataset.from_dict(rows))


def logs_of(trainer: Any) -> list[dict[str, float]]:
    """Trains, and returns what was logged at each step."""
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]
