"""The learner makes one update: hidden states of the rollouts -> fused loss -> optimizer step.

Every micro-batch divides by the same denominator, that of the whole batch, so how rollouts are cut into micro-batches,
and which rank computes which, does not change the update.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import trapo_kernels as tk
from trapo.batching import (
    Batch,
    Divisors,
    Group,
    collate,
    divisors,
    expert_part,
    filler,
    groups,
    has_gradient,
    is_packed,
    layout,
    loss_tokens,
    own_part,
    pack,
    set_logprobs,
    share,
    shuffled_parts,
    supports_of,
    target_logprobs,
    with_entropy_mean,
)
from trapo.distillation import Tutor
from trapo.models import agreement, prefix_tree
from trapo.models.checkpointing import prepare_checkpointing
from trapo.models.loading import head_of
from trapo.models.optimizer import Gradients, Kept, Schedule, clip_gradients, main_grad, make_optimizer
from trapo.models.precision import compute_in, resolve
from trapo.models.sharding import as_forward, is_sharded, load_shards, reshard, scatter_optimizer_state
from trapo.report.metrics import ProbabilityHistogram, added_up, finite_or_none, merged_metrics, on_host
from trapo.rollouts import Rollout
from trapo.runs.ranks import ALONE, Ranks
from trapo.settings.groups import OptimConfig, TrainConfig
from trapo.tools.timing import StepTimer
from trapo_kernels.integrations.transformers import LinearHead


@dataclasses.dataclass(frozen=True)
class Update:
    """Says what one call of `Learner.update` did."""

    metrics: dict[str, float | None]  # of trapo_kernels, over the rollouts that were not skipped; None: not finite
    optimizer_steps: int
    skipped_steps: int  # left out because a loss or gradient was not finite
    grad_norm: float  # before clipping; the last optimizer step's
    trained_tokens: int  # that went through the model, prompts included
    expert_histogram: list[int]  # expert tokens by their probability, see ProbabilityHistogram


class Learner:
    """Owns the optimizer and its schedule. `reference` gives ref_logprobs when the objective has a KL term.

    temperature: that of the rollouts. max_response_tokens: their limit, by which train.normalizer=constant divides
    unless it has a constant of its own. checkpointing: as model.gradient_checkpointing. steps: of the learning rate's
    schedule; None: train.steps. With several ranks all of them
    call the same methods with the same rollouts, and their models are sharded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        train: TrainConfig,
        optim: OptimConfig,
        *,
        temperature: float,
        max_response_tokens: int,
        pad_id: int,
        checkpointing: bool = False,
        reference: PreTrainedModel | None = None,
        ranks: Ranks = ALONE,
        steps: int | None = None,
    ) -> None:
        self.model = model
        self.reference = reference
        self.train = train
        self.temperature, self.max_response_tokens = temperature, max_response_tokens
        self.checkpointing = checkpointing
        self.precision = resolve(train.precision, model.device)
        self.pad_id = pad_id
        self.ranks = ranks
        self.costs: prefix_tree.Costs | None = None  # of sharing what rollouts begin with; None: it is not shared
        self.layout = self._agreed()  # of packed rows; None: padded
        self.tutor: Tutor | None = None  # adds the divergence from a teacher to the loss
        self.expert_histogram = ProbabilityHistogram()
        self.apart = False  # the regions' gradients are kept as they are
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.begin(optim, train.steps if steps is None else steps)

    def begin(self, optim: OptimConfig, steps: int) -> None:
        """Take a new optimizer, without a past, and a schedule of its learning rate over so many steps."""
        self.optim, self.expert_schedule, own = optim, None, optim
        if optim.expert.lr is not None:
            own = dataclasses.replace(optim, weight_decay=0.0)  # Kept.step decays for both
            of_experts = dataclasses.replace(own, lr=optim.expert.lr, schedule=optim.expert.schedule)
            expert_optimizer = make_optimizer(self.model, self.parameters, of_experts)
            self.expert_schedule = Schedule(expert_optimizer, of_experts, steps)
        self.optimizer = make_optimizer(self.model, self.parameters, own)
        self.schedule = Schedule(self.optimizer, own, steps)
        self.kept = Kept(self.parameters)

    def _agreed(self) -> frozenset[str] | None:
        """Check that the model does what the learner takes for granted; how to tell it of packed rows, None to pad."""

        def check() -> frozenset[str] | None:
            with agreement.computing(model, self.precision):
                found = agreement.probe(model, self.pad_id)
                packed = is_packed(model, self.train.packing)
                row = layout(agreement.LENGTHS, model.device)
                names = agreement.packed_names(model, found, row) if packed else None
                wanted = not packed and self.train.share_prefixes == "auto"
                if wanted and agreement.shares_beginnings(model, found, self.pad_id):
                    self.costs = prefix_tree.costs_of(model)
                if self.checkpointing:
                    prepare_checkpointing(model)
                    agreement.check_checkpointing(model, found)
            return names

        model = self.model
        if self.reference is not None:
            agreement.check_model(self.reference, self.precision, self.pad_id)
        return agreement.as_probe(model, check)

    @property
    def packed(self) -> bool:
        """Returns whether micro-batches are rows of concatenated sequences."""
        return self.layout is not None

    @property
    def lr(self) -> float:
        return self.schedule.lr

    def update(
        self,
        rollouts: Sequence[Rollout],
        objective: tk.Objective,
        *,
        seed: int,
        timer: StepTimer | None = None,
        advance: bool = True,
        mix: Callable[[Gradients], Gradients] | None = None,
    ) -> Update:
        """Makes `train.updates_per_step` optimizer steps on the rollouts, then one step of the learning-rate schedule
        (unless the step of the run has another update, advance=False).

        mix: makes of the gradients of expert and of own tokens, each by a mean of its own and not clipped, those that
        the optimizers (of `own`, and of `expert`) step by; one that it leaves out does not step.
        """
        timer, train, self.apart = timer or StepTimer(), self.train, mix is not None
        minibatches = shuffled_parts(rollouts, train.updates_per_step, seed)
        compared = self._set_logprobs(rollouts, objective, updates=len(minibatches), timer=timer)
        if self.tutor is not None:
            with timer.part("teacher"):
                self.tutor.teacher.prepare(rollouts)
        metrics: list[dict[str, torch.Tensor]] = []
        rates = {region: schedule.lr for region, schedule in self._schedules().items()}
        steps, skipped, tokens = 0, 0, 0
        norms: dict[str, float] = {}
        for minibatch in minibatches:
            found: dict[str, float] = {}  # norms of gradients by region
            for region, rows, part in self._regions(minibatch, objective):
                taught = self.tutor is not None
                trained = [r for r in rows if has_gradient(r, part, train.skip_inactive and not taught)]
                if not trained:
                    continue
                by = divisors(
                    rows, part, train, minibatches=len(minibatches), max_response_tokens=self.max_response_tokens
                )
                divided, losses = with_entropy_mean(rows, part, train, by.own), []
                for group in self._micro_batches(trained):
                    loss, said = self._loss(group, divided, by, compared)
                    loss.backward()
                    losses.append(loss.detach())
                    if group.rollouts:
                        metrics.append(said)
                tokens += sum(len(r) for r in trained)
                found[region] = self._step(torch.stack(losses).sum(), region)
            if found:
                norms, finite = found, (any if mix is None else all)(map(math.isfinite, found.values()))
                steps, skipped = steps + finite, skipped + (not finite)
            if mix is not None:
                self.kept.gradients = mix(self.kept.gradients) if all(map(math.isfinite, found.values())) else {}
            limit = None if mix is None else self.optim.grad_clip or math.inf
            norms |= self.kept.step(self.optimizers(), self.optim.weight_decay, limit)
        for schedule in self._schedules().values() if advance else ():
            schedule.step()
        if self.ranks.world > 1:
            metrics = self.ranks.gather(on_host(metrics))
        merged, counts = merged_metrics(metrics, steps + skipped, self.expert_histogram.take())
        if self.tutor is not None:
            merged |= self.tutor.take()
        reshard(self.reference)
        histogram = added_up(self.ranks.gather([counts]))
        if self.expert_schedule is not None:
            merged |= {"grad_norm_expert": finite_or_none(norms.get("expert")), "lr_expert": rates["expert"]}
        norm = norms.get("own", next(iter(norms.values()), 0.0))
        return Update(merged, steps, skipped, norm, tokens, histogram)

    def _regions(
        self, rollouts: Sequence[Rollout], objective: tk.Objective
    ) -> list[tuple[str, Sequence[Rollout], tk.Objective]]:
        """Returns (name, rollouts, objective) of what has an optimizer or a gradient of its own."""
        if self.expert_schedule is None and not self.apart:
            return [("own", rollouts, objective)]
        expert = [expert_part(r) for r in rollouts if r.supervised and r.prefix_ids]
        of_experts = dataclasses.replace(
            objective, policy=None, clip_low=None, clip_high=None, dual_clip=None, tis_cap=None, kl_coef=0.0
        )
        return [
            ("expert", expert, of_experts),
            ("own", [own_part(r) for r in rollouts], dataclasses.replace(objective, expert=None)),
        ]

    def _schedules(self) -> dict[str, Schedule]:
        """Returns the schedules by the region whose learning rate they are."""
        return {"own": self.schedule} | ({} if self.expert_schedule is None else {"expert": self.expert_schedule})

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Returns the optimizers by the region whose gradients they step by."""
        return {region: schedule.optimizer for region, schedule in self._schedules().items()}

    def own_logprobs(self, rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
        """Returns what the model gives each rollout's own tokens, [tokens] each, at the rollouts' temperature."""
        found = self._logprobs(self.model, rollouts)
        return [row[len(row) - len(r.own_ids) :] for r, row in zip(rollouts, found, strict=True)]

    def entropies(self, rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
        """Returns the entropy of each target [len − 1] of each rollout, on the CPU; 0 outside the loss."""
        return [row.cpu() for row in self._logprobs(self.model, rollouts, entropy=True)]

    @torch.no_grad()
    def divergence(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Returns what the tutor says of rollouts that an update has prepared; {} without a token in the loss."""
        assert self.tutor is not None
        for group in self._micro_batches([r for r in rollouts if loss_tokens(r)]):
            batch = self._batch(group)
            known = self.tutor.teacher.know(group.rollouts)
            states = functools.partial(self._hidden_and_head, self.model, batch)
            hidden, head = as_forward(self.model, states)
            self.tutor.loss(hidden[batch.mask], head, group.rollouts, known, normalizer=1.0, by_sequence=False)
        return self.tutor.take()

    def _set_logprobs(self, rollouts: Sequence[Rollout], objective: tk.Objective, **how: Any) -> list[str]:
        """Gives the rollouts the log-probabilities that the loss needs beside the model's; returns their fields."""
        reference = None if self.reference is None else functools.partial(self._logprobs, self.reference)
        model = functools.partial(self._logprobs, self.model)
        return set_logprobs(rollouts, objective, model=model, reference=reference, **how)

    def state_dict(self) -> dict[str, object]:
        """Returns the state of optimizers and schedules; of a sharded model without the optimizers': see
        sharding.save_shards."""
        found: dict[str, dict[str, object]] = {}
        for region, schedule in self._schedules().items():
            found[region] = {"scheduler": schedule.state_dict()}
            if not is_sharded(self.model):
                found[region]["optimizer"] = schedule.optimizer.state_dict()
        return {**found.pop("own"), **found}

    def load_state_dict(self, state: dict, shards: Path | None = None) -> None:
        """Takes over what `state_dict` gave. shards: where the optimizers' state is, if it was a sharded model's."""
        if shards is not None:
            load_shards(shards, self.model, self.optimizers())
        for region, schedule in self._schedules().items():
            kept = state if region == "own" else state[region]
            if shards is None:
                optimizer = kept["optimizer"]
                if is_sharded(self.model):
                    optimizer = scatter_optimizer_state(optimizer, self.parameters)
                schedule.optimizer.load_state_dict(optimizer)
            schedule.resume(kept["scheduler"])

    def _micro_batches(self, rollouts: Sequence[Rollout]) -> list[Group]:
        """Returns this rank's micro-batches."""
        made = groups(rollouts, self.train.micro_batch_tokens, self.packed, self._costs(rollouts))
        return self.ranks.deal(made, Group())

    def _costs(self, rollouts: Sequence[Rollout]) -> prefix_tree.Costs | None:
        """Returns what sharing the rollouts' beginnings costs; None where the model cannot, or its layers see less than
        a rollout."""
        longest = max((len(r) for r in rollouts), default=0)
        return self.costs if longest <= prefix_tree.window(self.model) else None

    def _batch(self, group: Group) -> Batch:
        rollouts = group.rollouts
        if not rollouts:
            return filler(self.pad_id, self.model.device)
        if group.trees:
            return share(rollouts, group.trees, self.pad_id, self.model.device)
        if self.packed:
            return pack(rollouts, self.model.device)
        return collate(rollouts, self.pad_id, self.model.device)

    def _hidden_states(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        """Returns [B, T, D] beside the batch's targets, what the head would be applied to."""
        if batch.sight is not None and batch.position_ids is not None and batch.places is not None:
            return agreement.tree_states(model, batch.input_ids, batch.position_ids, batch.sight, batch.places)[None]
        told = {name: value for name, value in batch.layout.items() if name in (self.layout or ())}
        return agreement.hidden_states(model, batch.input_ids, **told)

    def _loss(
        self, group: Group, objective: tk.Objective, by: Divisors, compared: Sequence[str]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns the loss of a micro-batch and its metrics. compared: the rollouts' fields of log-probabilities that
        it needs."""
        batch = self._batch(group)
        values = {name: [target_logprobs(r, name) for r in group.rollouts] for name in compared}
        others: dict[str, Any] = {name: batch.spread(rows or [None]) for name, rows in values.items()}
        known = None if self.tutor is None else self.tutor.teacher.know(group.rollouts)
        support, reference = supports_of(batch, group.rollouts), self._of_reference(objective, batch)

        def policy_loss(hidden: torch.Tensor, head: LinearHead) -> tk.PolicyLoss:
            return tk.linear_policy_loss(
                hidden,
                head.weight,
                batch.targets,
                objective,
                advantages=batch.advantages,
                expert_mask=batch.expert_mask,
                mask=batch.mask,
                normalizer=by.own,
                expert_normalizer=by.expert,
                weight_grad=main_grad(self.model, head.weight, hidden) if support is None else None,
                support=support,
                sequence_ids=batch.sequence_ids if objective.needs_sequences else None,
                temperature=self.temperature,
                **others,
                **reference,
                **head.options,
            )

        def forward() -> tuple[tk.PolicyLoss | None, torch.Tensor | None]:
            hidden, head = self._hidden_and_head(self.model, batch)
            of_terms = policy_loss(hidden, head) if objective.parts or known is None else None
            if self.tutor is None or known is None:
                return of_terms, None
            return of_terms, self.tutor.loss(
                hidden[batch.mask],
                head,
                group.rollouts,
                known,
                normalizer=by.own,
                by_sequence=objective.reduction == "sequence_mean",
            )

        of_terms, taught = as_forward(self.model, forward)
        if of_terms is None:
            assert taught is not None
            return taught, {}
        self.expert_histogram.add(of_terms.logprobs, batch.expert_mask & batch.mask)
        return of_terms.loss if taught is None else of_terms.loss + taught, of_terms.metrics

    @torch.no_grad()
    def _of_reference(self, objective: tk.Objective, batch: Batch) -> dict[str, Any]:
        """Returns what a divergence from the reference's whole distribution takes."""
        if not objective.reference_head or self.reference is None:
            return {}
        states = functools.partial(self._hidden_and_head, self.reference, batch)
        hidden, head = as_forward(self.reference, states)
        return {"ref_hidden": hidden, "ref_weight": head.weight, "ref_bias": head.options.get("bias")}

    @torch.no_grad()
    def _logprobs(
        self, model: PreTrainedModel, rollouts: Sequence[Rollout], entropy: bool = False
    ) -> list[torch.Tensor]:
        """Returns logprobs [len − 1] of each rollout's targets; or the entropies there."""
        place = {id(rollout): i for i, rollout in enumerate(rollouts)}
        found: list[tuple[int, torch.Tensor]] = []
        for group in self._micro_batches(rollouts):
            batch = self._batch(group)
            support = supports_of(batch, group.rollouts)
            logprobs = as_forward(model, functools.partial(self._batch_logprobs, model, batch, entropy, support))
            # Across ranks a rollout is known by its place.
            rows = zip(group.rollouts, batch.rows(logprobs), strict=bool(group.rollouts))
            found += [(place[id(r)], row) for r, row in rows]
        if self.ranks.world > 1:
            found = self.ranks.gather([(i, row.cpu()) for i, row in found])
        return [row for _, row in sorted(found, key=lambda pair: pair[0])]

    def _batch_logprobs(
        self, model: PreTrainedModel, batch: Batch, entropy: bool, support: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns [B, T]; 0 outside the loss."""
        hidden, head = self._hidden_and_head(model, batch)
        targets = batch.targets.masked_fill(~batch.mask, -100)
        found = tk.linear_logprobs(
            hidden, head.weight, targets, temperature=self.temperature, entropy=entropy, support=support, **head.options
        )
        return found.logprobs if found.entropy is None else found.entropy

    def _hidden_and_head(self, model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, LinearHead]:
        """Returns the hidden states in the dtype of train.precision, in which the loss multiplies them with the
        head."""
        with compute_in(self.precision, model):
            return head_of(model).with_hidden(self._hidden_states(model, batch))

    def _step(self, loss: torch.Tensor, region: str = "own") -> float:
        """Clip and step (of two optimizers, keep the gradients until both can; what is to be mixed, unclipped); what is
        not finite changes nothing. Returns the norm before clipping, NaN where the loss is not finite."""
        limit = math.inf if self.apart else self.optim.grad_clip or math.inf
        norm = clip_gradients(self.parameters, limit, loss, self.ranks.any)
        if math.isfinite(norm) and self.expert_schedule is None and not self.apart:
            self.optimizer.step()
        elif math.isfinite(norm):
            self.kept.keep(region)
        self.optimizer.zero_grad(set_to_none=True)
        return norm
