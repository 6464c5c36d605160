"""This file gives verl rollouts with expert prefixes: an agent loop, named in a file that verl's configuration names.

    # guided.yaml
    - name: trapo
      _target_: trapo.integrations.verl.GuidedAgentLoop
      guidance: paper                      # or official, or sizes, ratios, thresholds, ... of `trapo.guidance.schedule`
      trace_column: expert_trace           # the data's column with expert traces: a string, or a list of strings

    actor_rollout_ref.rollout.agent.agent_loop_config_path=guided.yaml
    actor_rollout_ref.rollout.agent.default_agent_loop=trapo

verl starts the rollouts of a prompt side by side in one worker. Here a later micro-group waits until the earlier ones
have their rewards, which the loop computes itself, with verl's own reward manager. Each rollout hands over an
expert_mask, which the loss of `trapo_kernels.integrations.verl` reads. For verl's trainer V1, which is its default.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar
from uuid import uuid4

import numpy as np
import torch
from tensordict import TensorDict
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput
from verl.trainer.ppo.reward import load_reward_manager
from verl.utils.profiler import simple_timer

from trapo.data.encode import PromptEncoder, Trace, TraceEncoder
from trapo.guidance import PRESETS, Opening, Schedule, open_micro_group, schedule
from trapo.integrations.guided_rollouts import Guided, with_every_row

__all__ = ["GuidedAgentLoop", "GuidedOutput"]

SAMPLING = ("temperature", "top_p", "top_k")  # what a rollout for training is sampled with
UNGUIDED = Opening(0, 0.0, (), supervised=False, whole=False)


class GuidedOutput(AgentLoopOutput):
    """Is verl's output of a rollout with a mask of the tokens that an expert wrote."""

    expert_mask: list[int]

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields that verl keeps, as tensors."""
        fields: dict[str, Any] = super().as_dict()
        fields["expert_mask"] = torch.tensor(fields["expert_mask"], dtype=torch.int64)
        return fields


class PromptGroup:
    """Holds the rollouts of one prompt while they are drawn: the openings of its micro-groups, and their rewards."""

    def __init__(self, plan: Schedule, traces: Sequence[Trace], max_tokens: int, rng: random.Random) -> None:
        self.plan, self.prompt, self.max_tokens, self.rng = plan, Guided(traces), max_tokens, rng
        self.left = 0  # rollouts that are done
        self.versions: dict[str, Any] = {}  # of the weights that sampled, as verl's servers tell it
        self._rewards: dict[int, float] = {}
        self._opened: dict[int, list[Opening]] = {}
        self._scored = [asyncio.Event() for _ in plan.micro_groups]
        self._failed = False

    def place(self, session: int) -> tuple[int, int]:
        """Returns (micro-group, place in it) of a rollout of the prompt."""
        for level, group in enumerate(self.plan.micro_groups):
            if session < group.size:
                return level, session
            session -= group.size
        raise ValueError(f"GuidedAgentLoop: rollout.n must be {self.plan.rollouts_per_prompt}; got more rollouts")

    async def opening(self, session: int) -> Opening:
        """Returns how the rollout begins, once all rollouts of earlier micro-groups have rewards."""
        level, index = self.place(session)
        for scored in self._scored[:level]:
            await scored.wait()
        if self._failed:
            raise RuntimeError("GuidedAgentLoop: an earlier rollout of the prompt failed")
        if level not in self._opened:
            start = session - index
            rewards = [self._rewards[i] for i in range(start)]
            self._opened[level] = open_micro_group(
                self.plan, level, [self.prompt], [rewards], self.max_tokens, self.rng
            )
        return self._opened[level][index]

    def reward(self, session: int, value: float) -> None:
        """Takes the reward of a rollout."""
        self._rewards[session] = value
        level, index = self.place(session)
        start = session - index
        if all(i in self._rewards for i in range(start, start + self.plan.micro_groups[level].size)):
            self._scored[level].set()

    def fail(self) -> None:
        """Lets nobody wait for a rollout that failed."""
        self._failed = True
        for scored in self._scored:
            scored.set()


class GuidedAgentLoop(AgentLoopBase):
    """Draws one rollout, which may continue an expert prefix.

    Args:
        guidance: a preset, or keyword arguments of `trapo.guidance.schedule`. Sizes must add up to rollout.n;
            thresholds are compared with means of what the reward manager gives.
        trace_column: rows without it, or with an empty one, are not guided ("trace" is an argument of verl's own, and
            no column can have that name). Neither are rows that are sampled otherwise
            than the rollouts for training; a validation file whose sampling is the same must have no such column.
        **verls: what verl gives an agent loop.

    Raises:
        ValueError: settings that do not go together; the message names them.
    """

    groups: ClassVar[dict[str, PromptGroup]] = {}  # of this worker, by verl's uid of the prompt
    rewards: ClassVar[Any] = None  # verl's reward manager, made once in a worker

    def __init__(
        self, *, guidance: str | Mapping[str, Any] = "paper", trace_column: str = "expert_trace", **verls: Any
    ) -> None:
        super().__init__(**verls)
        self.plan, self.trace_column = with_every_row(_schedule(guidance)), trace_column
        caller, rollout, size = type(self).__name__, self.rollout_config, self.plan.rollouts_per_prompt
        if rollout.n != size:
            raise ValueError(f"{caller}: rollout.n must be {size}, the sum of guidance sizes; got {rollout.n}")
        if rollout.calculate_log_probs:
            raise ValueError(
                f"{caller}: rollout.calculate_log_probs must be False, for the engine gives none of prefixes; got True"
            )
        reward = self.config.reward
        if reward.reward_model.enable and reward.custom_reward_function.path is None:
            raise ValueError(f"{caller}: reward.reward_model.enable must be False without a custom_reward_function")
        if self.processor is not None:
            raise ValueError(f"{caller}: the model must read text alone; got one with a processor")

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> GuidedOutput:
        """Returns a rollout of the row, which verl calls for each of the prompt's."""
        if "session_id" not in row:
            raise ValueError(f"{type(self).__name__}: trainer.use_v1 must be True; got verl's legacy trainer")
        traces = self._traces(row) if self._for_training(sampling_params) else []
        if not traces:
            return await self._draw(sampling_params, row, UNGUIDED, {})
        session = int(row["session_id"])
        group = self._join(str(row["uid"]), row, traces)
        try:
            output = await self._draw(sampling_params, row, await group.opening(session), group.versions)
            assert output.reward_score is not None
            group.reward(session, output.reward_score)
        except BaseException:
            group.fail()
            raise
        finally:
            group.left += 1
            if group.left == self.plan.rollouts_per_prompt:
                self.groups.pop(str(row["uid"]), None)
        return output

    def _for_training(self, sampling_params: Mapping[str, Any]) -> bool:
        return all(sampling_params.get(name) == self.rollout_config[name] for name in SAMPLING)

    def _join(self, uid: str, row: Mapping[str, Any], traces: Sequence[Trace]) -> PromptGroup:
        if uid not in self.groups:
            seed = (self.data_config.get("seed"), row.get("global_steps"), row.get("index"), traces)
            rng = random.Random(repr(seed))
            self.groups[uid] = PromptGroup(self.plan, traces, self.rollout_config.response_length, rng)
        return self.groups[uid]

    def _traces(self, row: Mapping[str, Any]) -> list[Trace]:
        value = row.get(self.trace_column)
        texts = [value] if isinstance(value, str) else list(value) if value is not None else []
        if not any(texts):
            return []
        encoder = TraceEncoder(self.tokenizer, self.plan.trace_part, PromptEncoder(self.tokenizer).opening)
        return [encoder.encode(text) for text in texts if text]

    async def _draw(
        self, sampling_params: dict[str, Any], row: dict[str, Any], opening: Opening, versions: dict[str, Any]
    ) -> GuidedOutput:
        """Returns the rollout with this opening. `versions` are of the prompt's rollouts so far, and are added to."""
        limit, prefix = self.rollout_config.response_length, list(opening.prefix_ids)
        metrics: dict[str, float] = {}
        prompt_ids = await self.ct_build_initial_tokens(list(row["raw_prompt"]))
        own, extra, preempted = [], {}, -1
        if not opening.whole and len(prefix) < limit:
            with simple_timer("generate_sequences", metrics):
                found = await self.server_manager.generate(
                    request_id=uuid4().hex, prompt_ids=[*prompt_ids, *prefix],
                    sampling_params={**sampling_params, "max_tokens": limit - len(prefix)},
                    priority=int(row.get("priority", 0)),
                )  # fmt: skip
            own, extra = list(found.token_ids)[: limit - len(prefix)], dict(found.extra_fields)
            preempted = -1 if found.num_preempted is None else found.num_preempted
            versions.update({name: value for name, value in extra.items() if name.endswith("_global_steps")})
        steps = row.get("global_steps")
        extra = {"min_global_steps": steps, "max_global_steps": steps, **versions, **extra}
        output = GuidedOutput(
            prompt_ids=prompt_ids,
            response_ids=prefix + own,
            response_mask=[int(opening.supervised)] * len(prefix) + [1] * len(own),
            expert_mask=[int(opening.supervised)] * len(prefix) + [0] * len(own),
            num_turns=2,
            metrics={**metrics, "num_preempted": preempted},
            extra_fields={**extra, "turn_scores": [], "tool_rewards": [], "prefix_length": len(prefix)},
        )
        scored = await self._score(output, row)
        output.reward_score = float(scored["reward_score"])
        output.extra_fields["reward_extra_info"] = scored["reward_extra_info"]
        return output

    async def _score(self, output: GuidedOutput, row: dict[str, Any]) -> dict[str, Any]:
        """Returns what verl's reward manager says of the whole response."""
        if GuidedAgentLoop.rewards is None:
            GuidedAgentLoop.rewards = load_reward_manager(self.config, self.tokenizer)
        prompts, responses = (torch.tensor([ids]) for ids in (output.prompt_ids, output.response_ids))
        input_ids = torch.cat([prompts, responses], dim=1)
        tensors = {
            "prompts": prompts, "responses": responses, "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
        }  # fmt: skip
        fields = {**row, "__num_turns__": output.num_turns, "tool_extra_fields": {}}
        others = {name: np.empty(1, dtype=object) for name in fields}
        for name, value in fields.items():
            others[name][0] = dict(value) if name == "extra_info" and value is not None else value
        batch = DataProto(batch=TensorDict(tensors, batch_size=1), non_tensor_batch=others)
        found: dict[str, Any] = await GuidedAgentLoop.rewards.run_single(batch)
        return found


def _schedule(guidance: str | Mapping[str, Any]) -> Schedule:
    if isinstance(guidance, Mapping):
        return schedule(**{str(name): value for name, value in guidance.items()})
    if guidance not in PRESETS:
        accepted = ", ".join(PRESETS)
        raise ValueError(f"GuidedAgentLoop: guidance must be {accepted}, or a schedule's columns; got {guidance!r}")
    return PRESETS[guidance]
