"""Run by test_trl.py under torchrun: guided training on two ranks; writes what each rank saw."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")


def vowels(completions, **kwargs):
    return [sum(c in "aeiou" for c in text) / (len(text) + 1) for text in completions]


def main(model_path: str, folder: str) -> None:
    import torch.distributed as dist
    from datasets import Dataset
    from trl import GRPOConfig

    from trapo.guidance import ALWAYS, NEVER, schedule
    from trapo_kernels.integrations.trl import TrapoGRPOTrainer

    prompts = [f"Number {i}:" for i in range(16)]
    rows = {"prompt": prompts, "trace": [f"the answer is {i} and so on" for i in range(16)]}
    config = GRPOConfig(
        folder, per_device_train_batch_size=4, num_generations=4, max_steps=2, max_completion_length=10, report_to=[],
        learning_rate=1e-3, logging_steps=1, save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
        gradient_checkpointing=False, loss_type="dapo", scale_rewards="none",
    )  # fmt: skip
    guidance = schedule([2, 1, 1], [0.0, 0.5, 1.0], [NEVER, ALWAYS, ALWAYS])
    trainer = TrapoGRPOTrainer(
        model_path, reward_funcs=vowels, args=config, train_dataset=Dataset.from_dict(rows), guidance=guidance
    )
    seen = []
    draw = trainer._generate_and_score_completions

    def watched(inputs):
        output = draw(inputs)
        texts = trainer.processing_class.batch_decode(trainer._rollouts.responses, skip_special_tokens=True)
        seen.append({"rewards": vowels(texts), "advantages": output["advantages"].tolist(), "prompts": len(inputs)})
        return output

    trainer._generate_and_score_completions = watched
    trainer.train()
    rank = dist.get_rank()
    weights = [float(p.detach().double().sum()) for p in trainer.model.parameters()]
    log = [row for row in trainer.state.log_history if "reward" in row]
    Path(folder, f"rank{rank}.json").write_text(json.dumps({"seen": seen, "weights": weights, "log": log}))


if __name__ == "__main__":
    main(*sys.argv[1:])
