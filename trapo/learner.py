"""One update: hidden states of the rollouts -> fused loss -> optimizer step.

Every micro-batch divides by the same denominator, that of the whole batch, so how rollouts are cut into micro-batches
does not change the update.
"""

from __future__ import annotations

import dataclasses
import math
import random
import warnings
from collections.abc import Sequence

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

import trapo_kernels as tk
from trapo.batching import Batch, collate, loss_tokens, micro_batches, sampled_logprobs
from trapo.collect import Rollout
from trapo.config import Config, OptimConfig
from trapo.errors import TrapoError
from trapo.metrics import ProbabilityHistogram
from trapo.model import head_of
from trapo.timing import StepTimer


@dataclasses.dataclass(frozen=True)
class Update:
    """What one call of `Learner.update` did."""

    metrics: dict[str, float | None]  # of trapo_kernels, over the rollouts that were not skipped; None: not finite
    optimizer_steps: int
    skipped_steps: int  # left out because a loss or gradient was not finite
    grad_norm: float  # before clipping; the last optimizer step's
    trained_tokens: int  # that went through the model, prompts included
    expert_histogram: list[int]  # expert tokens by their probability, see ProbabilityHistogram


class Learner:
    """Owns the optimizer and its schedule. `reference` gives ref_logprobs when the objective has a KL term."""

    def __init__(
        self, model: PreTrainedModel, config: Config, *, pad_id: int, reference: PreTrainedModel | None = None
    ) -> None:
        self.model = model
        self.reference = reference
        self.config = config
        self.pad_id = pad_id
        self.expert_histogram = ProbabilityHistogram()
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if any(p.dtype != torch.float32 for p in self.parameters):
            # An AdamW step is about lr in size: added to a 16-bit weight it is rounded away.
            raise TrapoError(f"model.dtype: training needs float32 weights; got {config.model.dtype}")
        if config.model.gradient_checkpointing:
            prepare_checkpointing(model)
        o = config.optim
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay
        )
        self.scheduler = LambdaLR(self.optimizer, lambda step: lr_factor(step, o, config.train.steps))

    @property
    def lr(self) -> float:
        return float(self.scheduler.get_last_lr()[0])

    def update(
        self, rollouts: Sequence[Rollout], objective: tk.Objective, *, seed: int, timer: StepTimer | None = None
    ) -> Update:
        """`train.updates_per_step` optimizer steps on the rollouts, then one step of the learning-rate schedule."""
        timer = timer or StepTimer()
        minibatches = self._minibatches(rollouts, seed)
        old_logprobs: dict[int, torch.Tensor] = {}
        if len(minibatches) > 1:  # after the first step the policy is no longer the one that generated
            with timer.part("logprobs"):
                old_logprobs = self._logprobs(self.model, [r for r in rollouts if r.own_ids])
        ref_logprobs: dict[int, torch.Tensor] = {}
        if objective.kl_coef and self.reference is not None:
            with timer.part("logprobs"):
                ref_logprobs = self._logprobs(self.reference, rollouts)
        rollout_logprobs: dict[int, torch.Tensor] = {}
        if "rollout_logprobs" in objective.needs:
            rollout_logprobs = {id(r): sampled_logprobs(r) for r in rollouts if r.own_ids}
        metrics: list[dict[str, torch.Tensor]] = []
        steps, skipped, norm, tokens = 0, 0, 0.0, 0
        for minibatch in minibatches:
            trained = [r for r in minibatch if self._has_gradient(r, objective)]
            if not trained:
                continue
            denominator, losses = self._denominator(minibatch, len(minibatches)), []
            for batch in self._micro_batches(trained):
                loss = self._loss(batch, objective, denominator, old_logprobs, ref_logprobs, rollout_logprobs)
                loss.loss.backward()
                losses.append(loss.loss.detach())
                metrics.append(loss.metrics)
                tokens += sum(len(r) for r in batch)
            norm = self._step(float(torch.stack(losses).sum()))
            finite = math.isfinite(norm)
            steps, skipped = steps + finite, skipped + (not finite)
        with warnings.catch_warnings():  # a first step with nothing to learn has a schedule step, no optimizer step
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self.scheduler.step()
        merged = _merge(metrics, steps + skipped)
        return Update(merged, steps, skipped, norm, tokens, self.expert_histogram.take())

    def own_logprobs(self, rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
        """What the model gives each rollout's own tokens, [tokens] each, at the rollouts' temperature."""
        found = self._logprobs(self.model, rollouts)
        return [found[id(r)][len(r) - 1 - len(r.own_ids) :] for r in rollouts]

    def state_dict(self) -> dict[str, object]:
        return {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])

    def _minibatches(self, rollouts: Sequence[Rollout], seed: int) -> list[list[Rollout]]:
        count = min(self.config.train.updates_per_step, len(rollouts))
        shuffled = list(rollouts)
        if count > 1:
            random.Random(seed).shuffle(shuffled)
        return [shuffled[i::count] for i in range(count)]

    def _has_gradient(self, rollout: Rollout, objective: tk.Objective) -> bool:
        """False for a rollout whose every token has a zero gradient: A = 0, no expert term, no entropy or KL term."""
        if not self.config.train.skip_inactive:
            return loss_tokens(rollout) > 0
        if rollout.supervised and objective.expert is not None and objective.expert_coef > 0:
            return True
        if objective.entropy_coef or (objective.kl_coef and rollout.own_ids):
            return loss_tokens(rollout) > 0
        return bool(rollout.own_ids) and objective.policy is not None and rollout.advantage != 0.0

    def _denominator(self, rollouts: Sequence[Rollout], minibatches: int) -> float:
        """Of the whole minibatch, rollouts that are skipped included: skipping changes cost, not the update."""
        train = self.config.train
        if train.normalizer == "tokens":
            return float(max(sum(loss_tokens(r) for r in rollouts), 1))
        if train.normalizer_constant is not None:
            return train.normalizer_constant / minibatches
        return float(len(rollouts) * self.config.rollout.max_response_tokens)

    def _micro_batches(self, rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
        groups = micro_batches([len(r) for r in rollouts], self.config.train.micro_batch_tokens)
        return [[rollouts[i] for i in group] for group in groups]

    def _hidden_states(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        """[B, T, D], what the head would be applied to."""
        output = model.get_decoder()(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        return output.last_hidden_state

    def _loss(
        self,
        rollouts: Sequence[Rollout],
        objective: tk.Objective,
        denominator: float,
        old_logprobs: dict[int, torch.Tensor],
        ref_logprobs: dict[int, torch.Tensor],
        rollout_logprobs: dict[int, torch.Tensor],
    ) -> tk.PolicyLoss:
        batch = collate(rollouts, self.pad_id, self.model.device)
        head = head_of(self.model)
        loss = tk.linear_policy_loss(
            self._hidden_states(self.model, batch),
            head.weight,
            batch.targets,
            objective,
            advantages=batch.advantages,
            old_logprobs=_padded(rollouts, old_logprobs, batch),
            ref_logprobs=_padded(rollouts, ref_logprobs, batch),
            rollout_logprobs=_padded(rollouts, rollout_logprobs, batch),
            expert_mask=batch.expert_mask,
            mask=batch.mask,
            normalizer=denominator,
            bias=head.bias,
            temperature=self.config.rollout.temperature,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
        )
        self.expert_histogram.add(loss.logprobs, batch.expert_mask & batch.mask)
        return loss

    @torch.no_grad()
    def _logprobs(self, model: PreTrainedModel, rollouts: Sequence[Rollout]) -> dict[int, torch.Tensor]:
        """Logprobs [T] of each rollout's targets, by id(rollout)."""
        found: dict[int, torch.Tensor] = {}
        head = head_of(model)
        for group in self._micro_batches(rollouts):
            batch = collate(group, self.pad_id, model.device)
            result = tk.linear_logprobs(
                self._hidden_states(model, batch),
                head.weight,
                batch.targets.masked_fill(~batch.mask, -100),
                bias=head.bias,
                temperature=self.config.rollout.temperature,
                softcap=head.softcap,
                logit_scale=head.logit_scale,
            )
            for rollout, logprobs in zip(group, result.logprobs, strict=True):
                found[id(rollout)] = logprobs[: len(rollout) - 1]
        return found

    def _step(self, loss: float) -> float:
        """Clip and step; a loss or gradient that is not finite changes nothing. Returns the norm before clipping, NaN
        where the loss is not finite."""
        limit = self.config.optim.grad_clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit)) if math.isfinite(loss) else math.nan
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def lr_factor(step: int, optim: OptimConfig, steps: int) -> float:
    """What the learning rate of a step (counted from 0) is multiplied by. Warmup does not start at 0: a step whose
    rollouts were paid for should learn something."""
    warmup = min(1.0, (step + 1) / (optim.warmup_steps + 1))
    done = min(max(step - optim.warmup_steps, 0) / max(steps - optim.warmup_steps, 1), 1.0)
    decay = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return warmup * decay[optim.schedule]


def prepare_checkpointing(model: PreTrainedModel) -> None:
    """transformers checkpoints in train mode alone; with its dropout at 0 that mode changes nothing else."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 (nn.Module's __setattr__ is typed for tensors)
    model.train()


def _merge(metrics: Sequence[dict[str, torch.Tensor]], minibatches: int) -> dict[str, float | None]:
    """Metrics of all micro-batches as one; a loss is the mean over minibatches. The update's only host sync."""
    merged = {name: float(value) for name, value in tk.merge_metrics(metrics).items()}
    means = {name: value / minibatches if name.startswith("loss") else value for name, value in merged.items()}
    return {name: value if math.isfinite(value) else None for name, value in means.items()}  # JSON has no NaN


def _padded(rollouts: Sequence[Rollout], logprobs: dict[int, torch.Tensor], batch: Batch) -> torch.Tensor | None:
    """The rollouts' logprobs as [B, T], zeros where there are none; None when none were computed."""
    if not logprobs:
        return None
    padded = torch.zeros(batch.targets.shape, dtype=torch.float32, device=batch.targets.device)
    for row, rollout in enumerate(rollouts):
        if (known := logprobs.get(id(rollout))) is not None:
            padded[row, : len(known)] = known
    return padded
