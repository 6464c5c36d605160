"""This file has TRL's GRPOTrainer with the fused loss, and with expert tokens.

    from trapo_kernels.integrations.trl import FusedGRPOTrainer

    FusedGRPOTrainer(model, reward_funcs, args=GRPOConfig(num_generations=8, loss_type="dapo", ...),
                     train_dataset=dataset).train()

It is `fuse` and a loss more: batches without expert tokens have TRL's own loss, by the head of `fuse`. With them, or
with an objective of yours, the loss is computed here: in one pass (three GEMMs) where it can be; where a quantity must
be known first (top-entropy masks, off-policy masks, sequence-level ratios, ...) TRL's own loss is used beside the
expert term (four GEMMs). `trainer.loss_path` says which, and why.

With expert prefixes it is `TrapoGRPOTrainer`, which is in trapo/integrations/trl.py, since it needs `trapo`'s rules of
guidance; it can be imported from here too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from trl import GRPOTrainer

from ...formulas.ratios import outside_clip
from ...functional import PolicyLoss, linear_policy_loss, policy_loss_from_logprobs
from ...objective import Objective
from ..transformers import LinearHead
from .fuse import KEPT, fuse
from .settings import objective_of, per_token, reduction_of, token_normalizer, why_two_passes

__all__ = ["FusedGRPOTrainer"]

TOKEN_LOSSES = ("bnpo", "dr_grpo", "dapo")  # one normalizer for every token


class FusedGRPOTrainer(GRPOTrainer):
    """Is TRL's GRPOTrainer whose loss is fused. Loss, gradients and metrics are TRL's.

    Args:
        *args, **kwargs: as GRPOTrainer.
        objective: the loss. None: what GRPOConfig says (loss_type, epsilon, epsilon_high, delta, beta, entropy_coef).
            One that is given decides alone; loss_type then gives the normalizer (one of "dapo", "bnpo", "dr_grpo").
        backend: of the loss; None = the fastest here.

    Where a batch has an expert_mask [B, C] and `guided` is True, the token losses share one normalizer, and the entropy
    bonus is over all of them, as in TRAPO; with the loss types that take two passes the expert part is a mean over the
    batch's tokens beside TRL's own loss.

    Raises:
        ValueError: settings that do not go together; the message names them.
    """

    guided = False  # batches can have expert tokens

    def __init__(
        self, *args: Any, objective: Objective | None = None, backend: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.backend = backend
        self._own_objective = objective is not None
        self.objective = objective or objective_of(self, "trsft" if self.guided else None)
        self._check_settings()
        self.loss_path = self._loss_path()
        self.fused = fuse(self, backend=backend)
        delattr(self, KEPT)  # what is fused by its class is not fused, and not restored, by the function
        self._scored: tuple[Tensor, Tensor | None] | None = None

    # What the loss is

    def _check_settings(self) -> None:
        caller, o = type(self).__name__, self.objective
        if self._own_objective and self.loss_type not in TOKEN_LOSSES:
            accepted = ", ".join(TOKEN_LOSSES)
            raise ValueError(f"{caller}: loss_type must be {accepted} with an objective; got {self.loss_type!r}")
        if o.kl_coef and self.beta == 0.0:
            raise ValueError(f"{caller}: beta must not be 0 with kl_coef={o.kl_coef}, or there is no reference model")
        if o.tis_cap is not None and not self.use_vllm:
            raise ValueError(f"{caller}: tis_cap={o.tis_cap} needs use_vllm, which gives the rollouts' logprobs")

    def _loss_path(self) -> str:
        """Returns "one pass", or two passes and the reason."""
        reason = why_two_passes(self, own_objective=self._own_objective, expert=self.guided)
        if reason is not None and self._own_objective:
            raise ValueError(f"{type(self).__name__}: objective must be None with what takes two passes; got {reason}")
        return "one pass" if reason is None else f"two passes: {reason}"

    # Loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        expert = inputs.get("expert_mask")
        if expert is None and not self._own_objective:
            return super()._compute_loss(model, inputs)
        if self.loss_path == "one pass":
            return self._one_pass_loss(model, inputs)
        assert expert is not None  # an objective takes one pass, or is refused
        kept = inputs.get("tool_mask", torch.ones_like(inputs["completion_mask"]))
        loss = super()._compute_loss(model, {**inputs, "tool_mask": kept * ~expert})
        return loss + self._expert_loss(inputs, expert & kept.bool() & inputs["completion_mask"].bool())

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._scored = found[:2]
        return found

    def _expert_loss(self, inputs: dict[str, Any], expert: Tensor) -> Tensor:
        """Returns the expert term over expert tokens, from the logprobs that the policy term has just used."""
        assert self._scored is not None
        logprobs, entropy = self._scored
        assert entropy is not None
        alone = replace(
            self.objective, policy=None, clip_low=None, clip_high=None, dual_clip=None, tis_cap=None, entropy_coef=0.0,
            kl_coef=0.0,
        )  # fmt: skip
        loss = policy_loss_from_logprobs(
            logprobs, alone, entropy=entropy, advantages=per_token(inputs["advantages"], expert), mask=expert,
            normalizer=token_normalizer(self, inputs),
        ).loss  # fmt: skip
        self._log_expert(logprobs[expert].detach(), loss.detach())
        return loss

    def _one_pass_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        prompt_length = inputs["prompt_ids"].shape[1]
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        expert = inputs.get("expert_mask")
        objective = self.objective
        weights, normalizer = reduction_of(
            self, inputs, mask, own_objective=self._own_objective, expert=self.guided
        )  # fmt: skip
        given = {
            "advantages": per_token(inputs["advantages"], mask), "policy_weights": weights, "expert_mask": expert,
            "mask": mask,
            "old_logprobs": inputs.get("old_per_token_logps"), "ref_logprobs": inputs.get("ref_per_token_logps"),
        }  # fmt: skip
        if objective.tis_cap is not None:
            given["rollout_logprobs"] = inputs["sampling_per_token_logps"]
        # Column t of hidden predicts token t + 1: completions are predicted from column prompt_length − 1 on.
        place = (prompt_length - 1, 1)
        given = {name: F.pad(t, place) for name, t in given.items() if t is not None}
        targets = F.pad(input_ids[:, 1:], (0, 1))
        found: list[PolicyLoss] = []

        def fused_loss(hidden: Tensor, head: LinearHead) -> tuple[Tensor, Tensor, Tensor]:
            out = linear_policy_loss(
                hidden, head.weight, targets, objective, normalizer=normalizer, temperature=self.temperature,
                backend=self.backend, **given, **head.options,
            )  # fmt: skip
            found.append(out)
            return out.loss, out.logprobs, out.entropy

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
        self._log_clipping(log, torch.exp(logprobs - old), per_token(inputs["advantages"], own), own)
        if expert is not None:
            self._log_expert(logprobs[mask & expert], out.metrics["loss_expert"])

    def _log_clipping(self, log: Any, ratio: Tensor, advantages: Tensor, own: Tensor) -> None:
        o = self.objective
        low, high, _ = outside_clip(ratio, advantages, o.clip_low, o.clip_high)
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


def _nan_extreme(values: Tensor, extreme: Callable[[Tensor], Tensor]) -> float:
    kept = values[~values.isnan()]
    return float(extreme(kept)) if kept.numel() else float("nan")
