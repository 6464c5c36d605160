"""TRL: GRPOTrainer with expert prefixes and the fused loss.

    from trapo_kernels.integrations.trl import TrapoGRPOTrainer

    TrapoGRPOTrainer(model, reward_funcs, args=GRPOConfig(num_generations=8, loss_type="dapo", ...),
                     train_dataset=dataset, guidance="paper").train()      # dataset columns: prompt, trace

Without `guidance` it is GRPOTrainer, with the same metrics. Where the loss can be computed in one pass (three GEMMs)
it is; where a quantity must be known first (top-entropy masks, off-policy masks, sequence-level ratios, ...) TRL's own
loss is used, on log-probabilities and entropies of this package (four GEMMs). `trainer.loss_path` says which, and why.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from trl import GRPOTrainer
from trl.data_utils import is_conversational
from trl.trainer.utils import FusedCausalLMOutput

from trapo.data.encode import PromptEncoder, Trace, TraceEncoder
from trapo.guidance import PRESETS, Schedule

from ..functional import PolicyLoss, linear_logprobs, linear_policy_loss
from ..objective import Objective, Tokens
from .guided_rollouts import draw_guided, unlogged
from .transformers import IGNORED, LinearHead, PatchedForward

__all__ = ["TrapoGRPOTrainer"]

log = logging.getLogger(__name__)

CLIP_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")  # TRL's loss types that clip a ratio; they differ in the normalizer
TOKEN_LOSSES = ("bnpo", "dr_grpo", "dapo")  # one normalizer for every token

# (hidden [B, T, D], head) -> the loss
FusedLoss = Callable[[Tensor, LinearHead], PolicyLoss]


class FusedHead(PatchedForward):
    """TRL's `model(..., labels=labels, fused_lm_head=True)`, computed here; and `model(..., fused_loss=fn)`."""

    def __init__(self, model: Any, temperature: float, entropy: bool, float32: bool, backend: str | None) -> None:
        super().__init__(model)
        self.follows_autocast = not float32
        self.temperature, self.entropy, self.backend = temperature, entropy, backend

    def forward(self, kwargs: dict[str, Any]) -> Any:
        fused_loss, wanted = kwargs.pop("fused_loss", None), kwargs.pop("fused_lm_head", False)
        if fused_loss is None and not wanted:
            return self.stock(kwargs)
        labels, targets = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        count = kwargs.pop("num_items_in_batch", None)
        hidden, head, outputs = self.hidden_states({**kwargs, "use_cache": False})
        aux_loss = getattr(outputs, "aux_loss", None)
        if fused_loss is not None:
            out = fused_loss(hidden, head)
            return FusedCausalLMOutput(loss=out.loss, log_probs=out.logprobs, entropy=out.entropy, aux_loss=aux_loss)
        shifted = targets is not None
        if targets is None:
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        logprobs, entropy = linear_logprobs(
            hidden, head.weight, targets, temperature=self.temperature, entropy=self.entropy, ignore_index=IGNORED,
            backend=self.backend, **head.options,
        )  # fmt: skip
        mask = targets != IGNORED
        if not shifted:
            mask, logprobs = mask[:, :-1], logprobs[:, :-1]
            entropy = None if entropy is None else entropy[:, :-1]
        loss = -logprobs.sum() / (mask.sum().clamp(min=1) if count is None else count)
        return FusedCausalLMOutput(loss=loss, log_probs=logprobs, entropy=entropy, label_mask=mask, aux_loss=aux_loss)


class TrapoGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose loss is fused, and whose rollouts can start with expert prefixes.

    Args:
        *args, **kwargs: as GRPOTrainer.
        objective: the loss. None: what GRPOConfig says (loss_type, epsilon, epsilon_high, delta, beta, entropy_coef),
            and TrSFT with α = 0.1 on expert tokens. One that is given decides alone; loss_type then gives the
            normalizer (one of "dapo", "bnpo", "dr_grpo").
        guidance: None, a preset ("paper", "official") or a `trapo.guidance.Schedule`, whose sizes add up to
            num_generations. Rewards decide who is guided; thresholds are means of the weighted sum of the rewards.
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
        trace_column: str = "trace",
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.schedule, self.trace_column, self.backend = _schedule(guidance), trace_column, backend
        self._own_objective = objective is not None
        self.objective = objective or self._objective_of_args()
        self._check_settings()
        self.loss_path = self._loss_path()
        self._fused_heads = [
            FusedHead(
                self.accelerator.unwrap_model(model), self.temperature, entropy, self.args.cast_lm_head_to_fp32, backend
            )
            for model, entropy in ((self._base_model(), True), (self.ref_model, False))
            if model is not None
        ]
        self._encoder: TraceEncoder | None = None
        self._said_long_trace = False
        self._rng = random.Random(self.args.seed)
        self._rollouts: Any = None
        self._rows: list[dict[str, Any]] = []
        self._rewards: Tensor | None = None
        self._scored: tuple[Tensor, Tensor | None] | None = None

    def _base_model(self) -> Any:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    # What the loss is

    def _objective_of_args(self) -> Objective:
        a = self.args
        return Objective(
            expert="trsft" if self.schedule else None,
            policy="clip",
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
            dual_clip=a.delta if a.delta is not None and a.delta > 1 + self.epsilon_high else None,
            entropy_coef=a.entropy_coef,
            kl_coef=self.beta,
        )

    def _check_settings(self) -> None:
        caller, a, o = "TrapoGRPOTrainer", self.args, self.objective
        if self._own_objective and self.loss_type not in TOKEN_LOSSES:
            accepted = ", ".join(TOKEN_LOSSES)
            raise ValueError(f"{caller}: loss_type must be {accepted} with an objective; got {self.loss_type!r}")
        if o.kl_coef and self.beta == 0.0:
            raise ValueError(f"{caller}: beta must not be 0 with kl_coef={o.kl_coef}, or there is no reference model")
        if o.tis_cap is not None and not self.use_vllm:
            raise ValueError(f"{caller}: tis_cap={o.tis_cap} needs use_vllm, which gives the rollouts' logprobs")
        if self.schedule is None:
            return
        size = self.schedule.rollouts_per_prompt
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
        if o.expert is None:
            raise ValueError(f"{caller}: objective must have an expert term with guidance; got expert=None")
        if self._is_vlm or self.tools or self.environment_factories or self.rollout_func:
            raise ValueError(f"{caller}: guidance must be None with images, tools, environments or a rollout_func")
        if any(getattr(self._tokenizer, name, None) is not None for name in ("response_template", "response_schema")):
            raise ValueError(f"{caller}: guidance must be None with a tokenizer that parses responses")

    def _loss_path(self) -> str:
        """One pass, or two passes and the reason."""
        a, reason = self.args, None
        if self._own_objective:
            pass
        elif self.loss_type not in CLIP_LOSSES:
            reason = f"loss_type={self.loss_type!r}"
        elif self.importance_sampling_level != "token":
            reason = f"importance_sampling_level={self.importance_sampling_level!r}"
        elif a.delta is not None and self.objective.dual_clip is None:
            reason = f"delta={a.delta} within the clip range"
        elif self.beta != 0.0 and a.use_bias_correction_kl:
            reason = "use_bias_correction_kl"
        elif self.use_adaptive_entropy:
            reason = "use_adaptive_entropy"
        elif self.loss_type == "grpo" and (self.schedule is not None or self.beta != 0.0):
            reason = "loss_type='grpo' weighs each sequence, expert and KL terms too"
        elif self.beta != 0.0 and self._entropy_bonus_enabled and self.loss_type != "bnpo" and self.schedule is None:
            reason = "beta and entropy_coef have normalizers of their own"
        if reason is None and self._is_vlm:
            reason = "images"
        if reason is None and self.top_entropy_quantile < 1.0:
            reason = f"top_entropy_quantile={self.top_entropy_quantile}"
        if reason is None and self.off_policy_mask_threshold is not None:
            reason = f"off_policy_mask_threshold={self.off_policy_mask_threshold}"
        if reason is not None and self._own_objective:
            raise ValueError(f"TrapoGRPOTrainer: objective must be None with what takes two passes; got {reason}")
        return "one pass" if reason is None else f"two passes: {reason}"

    # Loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self.loss_path == "one pass":
            return self._one_pass_loss(model, inputs)
        expert = inputs.get("expert_mask")
        if expert is None:
            return super()._compute_loss(model, inputs)
        kept = inputs.get("tool_mask", torch.ones_like(inputs["completion_mask"]))
        loss = super()._compute_loss(model, {**inputs, "tool_mask": kept * ~expert})
        return loss + self._expert_loss(inputs, expert & kept.bool() & inputs["completion_mask"].bool())

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._scored = found[:2]
        return found

    def _expert_loss(self, inputs: dict[str, Any], expert: Tensor) -> Tensor:
        """The expert term over expert tokens, from the logprobs that the policy term has just used."""
        assert self._scored is not None
        logprobs, entropy = self._scored
        assert entropy is not None
        advantages = _per_token(inputs["advantages"], expert)
        tokens = Tokens(logprobs[expert], entropy[expert], torch.ones_like(expert[expert]), advantages[expert])
        alone = replace(
            self.objective, policy=None, clip_low=None, clip_high=None, dual_clip=None, tis_cap=None, entropy_coef=0.0,
            kl_coef=0.0,
        )  # fmt: skip
        values = alone.losses(tokens)["expert"]
        self._log_expert(tokens.logprobs.detach(), values.detach().sum() / self._token_normalizer(inputs))
        return values.sum() / self._token_normalizer(inputs)

    def _token_normalizer(self, inputs: dict[str, Any]) -> Tensor:
        """TRL's for "dapo": tokens of the accumulation window, per process."""
        count = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self.model.training:
            count = count * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return count

    def _one_pass_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        prompt_length = inputs["prompt_ids"].shape[1]
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        expert = inputs.get("expert_mask")
        advantages, normalizer, objective = self._weights(inputs, mask)
        given = {
            "advantages": advantages, "expert_mask": expert, "mask": mask,
            "old_logprobs": inputs.get("old_per_token_logps"), "ref_logprobs": inputs.get("ref_per_token_logps"),
        }  # fmt: skip
        if objective.tis_cap is not None:
            given["rollout_logprobs"] = inputs["sampling_per_token_logps"]
        # Column t of hidden predicts token t + 1: completions are predicted from column prompt_length − 1 on.
        place = (prompt_length - 1, 1)
        given = {name: F.pad(t, place) for name, t in given.items() if t is not None}
        targets = F.pad(input_ids[:, 1:], (0, 1))
        found: list[PolicyLoss] = []

        def fused_loss(hidden: Tensor, head: LinearHead) -> PolicyLoss:
            out = linear_policy_loss(
                hidden, head.weight, targets, objective, normalizer=normalizer, temperature=self.temperature,
                backend=self.backend, **given, **head.options,
            )  # fmt: skip
            found.append(out)
            return out

        extra = {"output_router_logits": True} if self.aux_loss_enabled else {}
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        with self.accelerator.autocast():
            outputs = model(input_ids=input_ids, attention_mask=attention_mask, fused_loss=fused_loss, **extra)
        loss, self._aux_loss = outputs.loss, outputs.aux_loss
        if self.aux_loss_enabled:
            steps = self.current_gradient_accumulation_steps if self.model.training else 1.0
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
        self._log_one_pass(inputs, found[0], mask)
        return loss

    def _weights(self, inputs: dict[str, Any], mask: Tensor) -> tuple[Tensor, Tensor, Objective]:
        """(advantages [B, C], normalizer, objective) that give TRL's reduction.

        A policy term is proportional to the advantage, so a weight of its own is put there: TRL's weight of a sequence,
        its importance ratio between engine and trainer, the ratio of the policy's and the entropy bonus's normalizer.
        """
        steps = self.current_gradient_accumulation_steps if self.model.training else 1.0
        advantages = _per_token(inputs["advantages"], mask)
        tokens = mask.sum().clamp(min=1).float()
        if self.loss_type == "dapo":
            normalizer = self._token_normalizer(inputs).float()
        elif self.loss_type == "dr_grpo":
            count = float(mask.shape[0] * self.max_completion_length * steps)
            normalizer = torch.full((), count, dtype=torch.float32, device=mask.device)
        else:
            normalizer = tokens * steps
        if self._own_objective:
            return advantages, normalizer, self.objective
        if self.loss_type == "grpo":
            advantages = advantages * (tokens / mask.shape[0] / mask.sum(-1, keepdim=True).clamp(min=1))
        elif self._entropy_bonus_enabled and self.schedule is None:
            advantages, normalizer = advantages * (tokens * steps / normalizer), tokens * steps
        if self.use_vllm and self.vllm_importance_sampling_correction:
            advantages = advantages * inputs["importance_sampling_ratio"]  # 1 on expert tokens
        return advantages, normalizer, self.objective

    # Metrics, by TRL's names

    @torch.no_grad()
    def _log_one_pass(self, inputs: dict[str, Any], out: PolicyLoss, mask: Tensor) -> None:
        mode = "train" if self.model.training else "eval"
        log = self._metrics[mode]
        columns = slice(inputs["prompt_ids"].shape[1] - 1, -1)
        logprobs, entropy = out.logprobs[:, columns], out.entropy[:, columns]
        expert = inputs.get("expert_mask")
        own = mask if expert is None else mask & ~expert
        if self._entropy_bonus_enabled:
            steps = self.current_gradient_accumulation_steps if mode == "train" and self.loss_type != "dapo" else 1.0
            policy_loss = (out.metrics["loss_policy"] + out.metrics["loss_kl"]) * steps
            log["policy_loss"].append(self.accelerator.gather(policy_loss).nanmean().item())
            if mode == "train" and self.accelerator.sync_gradients:
                log["entropy_coef"].append(self.entropy_coef)
        if self.aux_loss_enabled:
            log["aux_loss"].append(self.accelerator.gather_for_metrics(self._aux_loss).mean().item())
        ref = inputs.get("ref_per_token_logps")
        if ref is not None:
            log["kl"].append(self._mean(torch.exp(ref - logprobs) - (ref - logprobs) - 1, own))
        log["entropy"].append(self._mean(entropy, own))
        old = inputs.get("old_per_token_logps", logprobs)
        self._log_clipping(log, torch.exp(logprobs - old), _per_token(inputs["advantages"], own), own)
        if expert is not None:
            self._log_expert(logprobs[mask & expert], out.metrics["loss_expert"])

    def _log_clipping(self, log: Any, ratio: Tensor, advantages: Tensor, own: Tensor) -> None:
        o = self.objective
        none = torch.zeros_like(own)
        low = none if o.clip_low is None else (ratio < 1 - o.clip_low) & (advantages < 0)
        high = none if o.clip_high is None else (ratio > 1 + o.clip_high) & (advantages > 0)
        for name, where in (("low_mean", low), ("high_mean", high), ("region_mean", low | high)):
            log[f"clip_ratio/{name}"].append(self._mean(where.float(), own))
        counts = own.sum(-1)  # a sequence without own tokens has no ratio: NaN, which is left out
        lows, highs = ((where & own).sum(-1) / counts for where in (low, high))
        log["clip_ratio/low_min"].append(_nan_extreme(self.accelerator.gather(lows), torch.amin))
        log["clip_ratio/high_max"].append(_nan_extreme(self.accelerator.gather(highs), torch.amax))

    def _log_expert(self, logprobs: Tensor, loss: Tensor) -> None:
        log = self._metrics["train" if self.model.training else "eval"]
        probs = logprobs.exp()
        stats = torch.stack([probs.sum(), (probs < self.objective.alpha).sum(), torch.ones_like(probs).sum()])
        total, low, count = self.accelerator.reduce(stats, reduction="sum").tolist()
        log["expert/loss"].append(self.accelerator.reduce(loss.detach(), reduction="mean").item())
        log["expert/tokens"].append(count)
        if count:
            log["expert/prob"].append(total / count)
            log["expert/trsft_clipped"].append(low / count)

    def _mean(self, values: Tensor, mask: Tensor) -> float:
        sums = torch.stack([(values * mask).sum(), mask.sum().float()])
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        return total / max(count, 1.0)

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
            return (mine * self.reward_weights.to(mine.device)).nansum(dim=1).tolist()

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
        """Rewards [processes · rows, functions]."""
        inputs = [self._rows[row] for row in rows]
        prompts = [row["prompt"] for row in inputs]
        texts: list[Any] = self.processing_class.batch_decode(responses, skip_special_tokens=True)
        if is_conversational({"prompt": prompts[0]}):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        return super()._calculate_rewards(inputs, prompts, texts, responses)

    def _keep_rewards(self, gathered: list[tuple[list[int], Tensor]], rows: int) -> None:
        """All rewards, in the order of the batch, for the call that asks for them next."""
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
        """The row's traces. One that no completion can hold is never given whole (guided_rollouts.py); said once."""
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


def _per_token(advantages: Tensor, like: Tensor) -> Tensor:
    """Advantages [B] or [B, C] as [B, C]."""
    return (advantages[:, None] if advantages.ndim == 1 else advantages).expand(like.shape).float()


def _nan_extreme(values: Tensor, extreme: Callable[[Tensor], Tensor]) -> float:
    kept = values[~values.isnan()]
    return float(extreme(kept)) if kept.numel() else float("nan")
