"""This file gives TRL's GRPOTrainer expert prefixes and the fused loss.

    from trapo_kernels.integrations.trl import TrapoGRPOTrainer

    TrapoGRPOTrainer(model, reward_funcs, args=GRPOConfig(num_generations=8, loss_type="dapo", ...),
                     train_dataset=dataset, guidance="paper").train()      # dataset columns: prompt, trace

Without `guidance` it is GRPOTrainer, with the same metrics. The loss is trapo_kernels/integrations/trl/'s; here are the
rollouts.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from trl.data_utils import is_conversational

from trapo.data.encode import PromptEncoder, Trace, TraceEncoder
from trapo.guidance import PRESETS, Schedule
from trapo.integrations.guided_rollouts import draw_guided, unlogged
from trapo.rewards.worker import within
from trapo_kernels.integrations.trl import FusedGRPOTrainer
from trapo_kernels.objective import Objective

__all__ = ["TrapoGRPOTrainer"]

log = logging.getLogger(__name__)


class TrapoGRPOTrainer(FusedGRPOTrainer):
    """Is TRL's GRPOTrainer whose loss is fused, and whose rollouts can start with expert prefixes.

    Args:
        *args, **kwargs: as GRPOTrainer.
        objective: the loss. None: what GRPOConfig says (loss_type, epsilon, epsilon_high, delta, beta, entropy_coef),
            and TrSFT with α = 0.1 on expert tokens. One that is given decides alone; loss_type then gives the
            normalizer (one of "dapo", "bnpo", "dr_grpo").
        guidance: None, a preset ("paper", "official") or a `trapo.guidance.Schedule`, whose sizes add up to
            num_generations. Rewards decide who is guided: thresholds are means of shares of 1.
        reward_range: the lowest and the highest weighted sum of the rewards, which thresholds take for 0 and 1. A sum
            outside ends the training in one line. Advantages stay those of TRL.
        trace_column: the dataset's column with expert traces: a string, or a list of strings; may be empty.
        backend: of the loss; None = the fastest here.

    With expert tokens the token losses share one normalizer, and the entropy bonus is over all of them, as in TRAPO;
    with the other loss types the expert part is a mean over the batch's tokens beside TRL's own loss.

    Raises:
        ValueError: settings that do not go together; the message names them.
    """

    def __init__(
        self,
        *args: Any,
        objective: Objective | None = None,
        guidance: Schedule | str | None = None,
        reward_range: tuple[float, float] = (0.0, 1.0),
        trace_column: str = "trace",
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.schedule, self.trace_column = _schedule(guidance), trace_column
        self.reward_range = _range(reward_range)
        self.guided = self.schedule is not None
        super().__init__(*args, objective=objective, backend=backend, **kwargs)
        self._encoder: TraceEncoder | None = None
        self._said_long_trace = False
        self._rng = random.Random(self.args.seed)
        self._rollouts: Any = None
        self._rows: list[dict[str, Any]] = []
        self._rewards: Tensor | None = None

    def _check_settings(self) -> None:
        super()._check_settings()
        if self.schedule is None:
            return
        caller, a, size = "TrapoGRPOTrainer", self.args, self.schedule.rollouts_per_prompt
        if size != self.num_generations:
            raise ValueError(
                f"{caller}: guidance sizes must add up to num_generations={self.num_generations}; got {size}"
            )
        local = a.per_device_train_batch_size * a.steps_per_generation
        if local % size:
            raise ValueError(
                f"{caller}: per_device_train_batch_size · steps_per_generation must be a multiple of {size} with "
                f"guidance, so that a prompt's rollouts are on one rank; got {local}"
            )
        if self.objective.expert is None:
            raise ValueError(f"{caller}: objective must have an expert term with guidance; got expert=None")
        if self._is_vlm or self.tools or self.environment_factories or self.rollout_func:
            raise ValueError(f"{caller}: guidance must be None with images, tools, environments or a rollout_func")
        if any(getattr(self._tokenizer, name, None) is not None for name in ("response_template", "response_schema")):
            raise ValueError(f"{caller}: guidance must be None with a tokenizer that parses responses")

    # Rollouts

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows, self._rollouts, self._rewards = inputs, None, None
        output = super()._generate_and_score_completions(inputs)
        if self._rollouts is None:
            return output
        shape, device = output["completion_ids"].shape, output["completion_ids"].device
        lengths = torch.tensor(self._rollouts.prefix_lengths, device=device)[:, None]
        prefix = torch.arange(shape[1], device=device)[None] < lengths
        output["expert_mask"] = prefix & output["completion_mask"].bool()
        supervised = torch.tensor(self._rollouts.supervised, device=device)[:, None]
        if bool((prefix & ~supervised).any()):  # prefix tokens that nothing is learnt from
            output["tool_mask"] = (~(prefix & ~supervised)).long()
            kept = (output["completion_mask"] * output["tool_mask"]).sum()
            output["num_items_in_batch"] = self.accelerator.gather(kept).sum()
        guided = (lengths > 0).float().mean()
        self._metrics["train"]["expert/guided"].append(self.accelerator.reduce(guided, reduction="mean").item())
        return output

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, num_generations: int, *args: Any, **kwargs: Any
    ) -> Any:
        generate = super()._generate_single_turn
        if self.schedule is None or not self.model.training:
            return generate(prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs)
        gathered: list[tuple[list[int], Tensor]] = []

        def score(rows: list[int], responses: list[list[int]]) -> Sequence[float]:
            found = self._score(rows, responses)
            gathered.append((rows, found))
            rank = self.accelerator.process_index
            mine = found.view(self.accelerator.num_processes, len(rows), -1)[rank]
            sums = (mine * self.reward_weights.to(mine.device)).nansum(dim=1).tolist()
            return [_share(value, *self.reward_range) for value in sums]

        self._rollouts = draw_guided(
            self.schedule,
            prompt_ids,
            [self._traces(row) for row in self._rows],
            generate=lambda prompts: generate(prompts, None, {}, 1),
            score=score,
            max_tokens=self.max_completion_length,
            rng=self._rng,
            always_generate=self.accelerator.num_processes > 1,
        )
        self._keep_rewards(gathered, len(prompt_ids))
        return self._rollouts.responses, self._rollouts.logprobs

    def _score(self, rows: list[int], responses: list[list[int]]) -> Tensor:
        """Returns the rewards [processes · rows, functions]."""
        inputs = [self._rows[row] for row in rows]
        prompts = [row["prompt"] for row in inputs]
        texts: list[Any] = self.processing_class.batch_decode(responses, skip_special_tokens=True)
        if is_conversational({"prompt": prompts[0]}):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        return super()._calculate_rewards(inputs, prompts, texts, responses)

    def _keep_rewards(self, gathered: list[tuple[list[int], Tensor]], rows: int) -> None:
        """Keeps all rewards, in the order of the batch, for the call that asks for them next."""
        processes = self.accelerator.num_processes
        functions = gathered[0][1].shape[-1]
        rewards = gathered[0][1].new_empty(processes, rows, functions)
        for at, found in gathered:
            rewards[:, at] = found.view(processes, len(at), functions)
        self._rewards = rewards.view(-1, functions)
        for column, values in self._pending_extra_logs.items():
            if len(values) == rows:
                self._pending_extra_logs[column] = unlogged(values, self._rollouts.order)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        known, self._rewards = self._rewards, None
        if known is not None:
            return known
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _traces(self, row: dict[str, Any]) -> list[Trace]:
        """Returns the row's traces. One that no completion can hold is never given whole (guided_rollouts.py); said
        once."""
        if self._encoder is None:
            assert self.schedule is not None
            opening = PromptEncoder(self._tokenizer).opening if is_conversational({"prompt": row["prompt"]}) else ""
            self._encoder = TraceEncoder(self._tokenizer, self.schedule.trace_part, opening)
        value = row.get(self.trace_column)
        texts = [value] if isinstance(value, str) else list(value or [])
        traces = [self._encoder.encode(text) for text in texts if text]
        unfit = any(len(trace.token_ids) > self.max_completion_length for trace in traces)
        if unfit and not self._said_long_trace:
            self._said_long_trace = True
            log.warning("traces over max_completion_length=%d are never given whole", self.max_completion_length)
        return traces


def _schedule(guidance: Schedule | str | None) -> Schedule | None:
    if guidance is None or isinstance(guidance, Schedule):
        return guidance
    if guidance not in PRESETS:
        accepted = ", ".join(map(repr, PRESETS))
        raise ValueError(f"TrapoGRPOTrainer: guidance must be {accepted}, a Schedule or None; got {guidance!r}")
    return PRESETS[guidance]


def _range(pair: tuple[float, float]) -> tuple[float, float]:
    low, high = pair
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(
            f"TrapoGRPOTrainer: reward_range must be two finite numbers, the lower one first; got {pair!r}"
        )
    return low, high


def _share(value: float, low: float, high: float) -> float:
    """Returns the reward as a share of 1, which is what thresholds are."""
    inside = within(value, low, high)
    if inside is None:
        raise ValueError(
            f"TrapoGRPOTrainer: reward_range must hold every weighted sum of the rewards, which guidance compares with "
            f"its thresholds; got {value:g} with reward_range=({low:g}, {high:g})"
        )
    return (inside - low) / (high - low)
