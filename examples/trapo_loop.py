"""TRAPO on one page: the algorithm as a loop to be read from top to bottom, of the parts that make up `trapo train`.

A model that is asked hard questions fails most of them, and reinforcement learning learns nothing from failures alone.
TRAPO (arXiv 2512.17636) helps it just where it fails: there some rollouts begin with a piece of an expert's solution
and the model goes on from it. The expert's tokens are learned by a trust-region form of supervised learning, the
model's own by policy gradient: one loss, one optimizer step.

    python examples/trapo_loop.py        # SmolLM2-135M on word problems; under two minutes on two CPU cores

It prints how often the model was right, alone and with help, and the probability that it gives the expert's tokens;
the second half of the steps sees the first half's problems again, so that the two compare. `trapo train` has more:
evaluation, checkpoints, several GPUs, vLLM, rewards in processes that can be killed, options.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import trapo_kernels as tk
from trapo.batching import collate, loss_tokens, micro_batches
from trapo.config import ModelConfig
from trapo.data.encode import EncodedProblem, decode_text, encode_problems
from trapo.data.loading import load_problems
from trapo.engines.hf import HFEngine
from trapo.guidance import NEVER, schedule
from trapo.models.loading import eos_ids, load_model
from trapo.rewards import Reward, math_reward
from trapo.rollouts import Rollout, assign_advantages, collect

# The rollouts of a problem are drawn in micro-groups, one after the other. The first is never guided. The second begins
# with half of the expert's solution where the mean reward so far is below 0.7, the third is all of it where the mean is
# below 0.9 even then. (The paper draws 4, 2, 1 and 1 rollouts with 0, 20, 50 and 100 percent of the solution.)
MICRO_GROUPS = schedule(sizes=[1, 1, 1], ratios=[0.0, 0.5, 1.0], thresholds=[NEVER, 0.7, 0.9])

# On the expert's tokens TrSFT: the gradient of −log p, but bounded where p < alpha, so that a token which the model
# finds absurd cannot throw it off. On the model's own tokens the policy gradient, −advantage · log p.
OBJECTIVE = tk.Objective.trapo(alpha=0.1, expert_coef=4.0)

TEMPERATURE = 1.0  # of sampling, and therefore of the loss
MAX_RESPONSE = 40  # tokens, the expert's piece included


def load_training_problems(tokenizer: PreTrainedTokenizerBase, count: int) -> list[EncodedProblem]:
    """Arithmetic word problems as token ids, each with its answer and an expert's solution.

    These are generated; for problems of your own it is `load_problems("problems.jsonl")`.
    """
    problems = load_problems(f"task://word_problems?split=train&n={count}&seed=1")
    encoded, _ = encode_problems(problems, tokenizer, max_prompt_tokens=200, max_trace_tokens=MAX_RESPONSE)
    return encoded


def rewards(tokenizer: PreTrainedTokenizerBase, rollouts: Sequence[Rollout]) -> list[Reward]:
    """1 where the final answer of the text is right, else 0. The expert's piece counts as part of the text."""
    texts = [decode_text(tokenizer, rollout.response_ids) for rollout in rollouts]
    golds = [rollout.problem.problem.answer for rollout in rollouts]
    return [Reward(math_reward(text, gold), "ok") for text, gold in zip(texts, golds, strict=True)]


def update(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, rollouts: Sequence[Rollout], pad_id: int
) -> dict[str, torch.Tensor]:
    """One optimizer step on all rollouts; returns the loss's metrics."""
    total = sum(loss_tokens(rollout) for rollout in rollouts)  # one denominator for all micro-batches
    metrics = []
    for places in micro_batches([len(rollout) for rollout in rollouts], token_budget=768):
        batch = collate([rollouts[i] for i in places], pad_id, model.device)
        hidden = model.get_decoder()(input_ids=batch.input_ids, use_cache=False).last_hidden_state  # [B, T, D]
        # The logits [B, T, V] would be the largest tensor by far. They are never there: the head's product, the loss
        # and its gradient are computed chunk by chunk.
        out = tk.linear_policy_loss(
            hidden,
            model.get_output_embeddings().weight,  # [V, D]
            batch.targets,  # [B, T]: column t holds the token that must be predicted from there
            OBJECTIVE,
            advantages=batch.advantages,  # [B]
            expert_mask=batch.expert_mask,  # [B, T]: the expert's tokens
            mask=batch.mask,  # [B, T]: tokens in the loss, so no prompt and no padding
            normalizer=float(total),
            temperature=TEMPERATURE,
        )
        out.loss.backward()
        metrics.append(out.metrics)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return tk.merge_metrics(metrics)


def describe(step: int, rollouts: Sequence[Rollout], metrics: dict[str, torch.Tensor]) -> dict[str, float]:
    """What is worth looking at, printed and returned."""
    alone = [r.reward for r in rollouts if not r.guided]
    helped = [r.reward for r in rollouts if r.guided and r.own_ids]
    row = {
        "step": step,
        "alone": sum(alone) / len(alone),
        "helped": sum(helped) / max(len(helped), 1),
        "guided": sum(r.guided for r in rollouts) / len(rollouts),
        "expert_prob": float(metrics["expert_prob"]),
    }
    print(
        f"step {step}   right alone {row['alone']:4.0%}   right with half a solution {row['helped']:4.0%}   "
        f"rollouts with help {row['guided']:4.0%}   probability of the expert's tokens {row['expert_prob']:.2f}",
        flush=True,
    )
    return row


def train(path: str, *, steps: int, prompts: int, lr: float) -> list[dict[str, float]]:
    """TRAPO, top to bottom; one row of numbers a step."""
    torch.manual_seed(0)
    model, tokenizer = load_model(ModelConfig(path=path))
    problems = load_training_problems(tokenizer, (half := (steps + 1) // 2) * prompts)
    engine = HFEngine(model, eos_ids=eos_ids(model, tokenizer), pad_id=tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    rows = []
    for step in range(steps):
        # 1. Rollouts, micro-group after micro-group: later ones get help where earlier ones failed.
        rollouts = collect(
            problems[step % half * prompts :][:prompts],
            MICRO_GROUPS,
            engine,
            lambda drawn: rewards(tokenizer, drawn),
            temperature=TEMPERATURE,
            max_response_tokens=MAX_RESPONSE,
            seed=step,
        )
        # 2. Advantages: how far each reward is above the mean of its problem's. A rollout that is the expert's from end
        #    to end has no tokens to reward, so it is left out of that mean.
        assign_advantages(rollouts, baseline="own_tokens", std=False)
        # 3. One update, on the expert's and the model's own tokens together. An engine with a copy of the weights takes
        #    the new ones over in `sync`; this one has the model itself.
        metrics = update(model, optimizer, rollouts, tokenizer.pad_token_id)
        engine.sync(model)
        rows.append(describe(step + 1, rollouts, metrics))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="as model.path of `trapo train`")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=6, help="problems a step")
    parser.add_argument("--lr", type=float, default=5e-5)
    options = parser.parse_args()
    train(options.model, steps=options.steps, prompts=options.prompts, lr=options.lr)
