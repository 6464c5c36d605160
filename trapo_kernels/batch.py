"""This file gathers the tokens of a policy loss: which take part, what the objective reads of each, and what their sum
is divided by."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import stream
from .arguments import validate
from .arguments.graph import tracing
from .arguments.scalars import filled
from .backends.base import RowInputs, RowKernel, RowStats
from .chunks.selection import Selection
from .formulas.custom import function_name
from .head import Head
from .metrics import policy_metrics
from .objective import FIELDS, Objective
from .reference import TokenValues
from .statistics import Collector, check_statistics
from .tokens import Sequences, Slopes, Tokens, given

__all__ = ["Batch", "Dense", "PolicyLoss", "active_tokens", "make_batch"]


class PolicyLoss(NamedTuple):
    """Holds a loss (scalar, fp32; fp64 for fp64 inputs), its metrics (METRICS has the names), and the detached
    log-probabilities and entropies [...] it was computed from, zero at tokens that were left out."""

    loss: Tensor
    metrics: dict[str, Tensor]
    logprobs: Tensor
    entropy: Tensor


class Dense(NamedTuple):
    """Says which rows count [N] bool under torch.compile, where all of them are computed."""

    own: Tensor
    active: Tensor
    live: Tensor


@dataclass(frozen=True)
class Batch:
    """Holds everything of a policy loss but its head: per-token tensors are of the selected rows, compact [n]."""

    objective: Objective
    selection: Selection
    targets: Tensor
    expert: Tensor
    inputs: dict[str, Tensor | None]  # advantages, old_logprobs, ref_logprobs, rollout_logprobs, policy_weights
    sequences: Sequences | None
    weights: Tensor | None  # of token losses; None: all 1
    statistics: tuple[str, ...]
    normalizer: Tensor
    counts: dict[str, Tensor]
    shape: torch.Size  # of the caller's tokens
    dense: Dense | None = None
    divided: bool = False  # the gradients are: they are added to those of other calls
    expert_normalizer: Tensor | None = None  # of the expert tokens, which is among the weights; None: normalizer

    def tokens(self, values: TokenValues, at: slice | None = None) -> Tokens:
        """Returns the tokens of rows `at`, whose values these are; None: all."""

        def part(t: Tensor | None) -> Tensor | None:
            return t if t is None or at is None else t[at]

        assert values.entropy is not None
        inputs = {name: part(t) for name, t in self.inputs.items()}
        expert, own = given(part(self.expert)), None if self.dense is None else part(self.dense.own)
        inside = part(self.selection.inside)
        if inside is not None:
            expert, own = expert & inside, ~expert & inside
        return Tokens(
            values.logprobs,
            values.entropy,
            expert,
            **inputs,
            target_logits=values.target_logits,
            statistics=values.statistics,
            sequences=self.sequences,
            own=own,
        )

    def values(self, logprobs: Tensor, entropy: Tensor, *others: Tensor) -> TokenValues:
        """Returns values as `flat` gave them."""
        target, found = (others[0], others[1:]) if self.objective.reads_logit else (None, others)
        return TokenValues(logprobs, entropy, target, dict(zip(self.statistics, found, strict=True)))

    def flat(self, stats: RowStats, extras: Collector) -> tuple[Tensor, ...]:
        """Returns the values of all rows, one after the other."""
        assert stats.entropy is not None
        target = [stats.target_logits] if self.objective.reads_logit else []
        return (stats.logprobs, stats.entropy, *target, *extras.values.values())

    def slopes(self, at: slice, stats: RowStats, extras: Collector) -> Slopes:
        """Returns the slopes of the loss of rows `at`, undivided unless `divided`."""
        target = stats.target_logits if self.objective.reads_logit else None
        values = TokenValues(stats.logprobs, stats.entropy, target, extras.at(at))
        slopes, weights = self.objective.all_slopes(self.tokens(values, at)), self._slope_weights
        if weights is None:
            return slopes
        weights = weights[at]
        return Slopes(*(None if slope is None else slope * weights for slope in slopes))

    def fused(self, kernel: RowKernel) -> stream.Fused | None:
        """Returns what kernels need that compute the slopes of these terms themselves."""
        verb, terms = kernel.fused_, self.objective.fused()
        if verb is None or terms is None or self.statistics:
            return None
        if self.normalizer.dtype == torch.float64 and not kernel.fused_float64:
            return None
        weights = self._slope_weights
        if self.selection.inside is not None:
            inside = self.selection.inside.to(self.normalizer.dtype)
            weights = inside if weights is None else inside * weights
        return stream.Fused(verb, terms, RowInputs(self.expert, **self._fused_inputs(), weights=weights))

    @property
    def _slope_weights(self) -> Tensor | None:
        """Returns by what the slopes of each token are multiplied [n]; None: by 1."""
        if not self.divided:
            return self.weights
        return (
            (1 / self.normalizer).expand(self.expert.shape) if self.weights is None else self.weights / self.normalizer
        )

    def _fused_inputs(self) -> dict[str, Tensor | None]:
        """Returns the inputs as kernels take them, which know no weight of the policy term: it is put into the
        advantage, to whose size the policy term of these kernels is proportional, and whose sign it leaves alone."""
        inputs = dict(self.inputs)
        given, advantages = inputs.pop("policy_weights"), inputs["advantages"]
        if given is not None and advantages is not None and self.objective.has_policy_term:
            weighted = torch.where(given == 0, 0, advantages * given)
            inputs["advantages"] = torch.where(self.expert, advantages, weighted)
        return inputs

    def parts(self, values: TokenValues, tokens: Tokens | None = None) -> dict[str, Tensor]:
        """Returns the weighted parts of the loss per token [n]; `tokens`: of these values, for the metrics, which know
        where a part does not count: anything finite may stand there."""
        filled = tokens is None
        parts = self.objective.losses(self.tokens(values) if tokens is None else tokens, filled)
        return parts if self.weights is None else {name: part * self.weights for name, part in parts.items()}

    def token_losses(self, values: TokenValues) -> dict[str, Tensor]:
        """Returns the parts in the caller's shape [...], zero at tokens that do not count."""
        return {n: self.selection.spread(part).reshape(self.shape) for n, part in self.parts(values).items()}

    def loss(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Returns the sum of the tokens' losses, given in parts [n], over the normalizer."""
        if not parts:
            return torch.zeros_like(self.normalizer)
        return functools.reduce(torch.add, parts.values()).sum() / self.normalizer

    def result(
        self,
        loss: Tensor | None,
        values: TokenValues,
        parts: Mapping[str, Tensor] | None,
        left_out: Tensor | None = None,
    ) -> PolicyLoss:
        """Returns what the caller gets; `left_out`: the share of the gradients' mass that was, where some might be left
        out. Where loss and parts are not known yet, they are computed with the metrics, which have much in common."""
        counts = self.counts if left_out is None else {**self.counts, "grad_left_out": left_out}
        logprobs, entropy, target, statistics = values
        with torch.no_grad():
            logprobs, entropy = logprobs.detach(), given(entropy).detach()
            values = TokenValues(logprobs, entropy, None if target is None else target.detach(), statistics)
            tokens = self.tokens(values)
            parts = self.parts(values, tokens) if parts is None else parts
            metrics = policy_metrics(self.objective, tokens, parts, self.normalizer, counts)
        logprobs, entropy = (t.reshape(self.shape) for t in self.selection.spread_all(logprobs, entropy))
        return PolicyLoss(metrics["loss"] if loss is None else loss, metrics, logprobs, entropy)

    def facts(self, caller: str, inputs: Mapping[str, Tensor | None]) -> dict[str, Any]:
        """Returns what the ranks of a group must have in common of a batch, by agreement.py's names.

        Raises:
            NotImplementedError: a group cannot do the objective.
        """
        if self.statistics:
            names = ", ".join(self.statistics)
            raise NotImplementedError(f"{caller}: group must be None where statistics of a row are read; got {names}")
        if self.objective.reference_head:
            raise NotImplementedError(f"{caller}: group must be None where a reference head is read; got expert='asft'")
        fields = {name: getattr(self.objective, name) for name in FIELDS}
        others = dict(inputs)
        scales = [others.pop(name) for name in ("advantages", "policy_weights")]
        scale = [t.reshape(-1).to(self.normalizer.dtype) for t in scales if t is not None]
        divisors = [t for t in (self.normalizer, self.expert_normalizer) if t is not None]
        return {
            # The same in every process.
            "objectives": repr({name: function_name(v) if callable(v) else v for name, v in fields.items()}),
            "statistics": self.statistics,
            "normalizer": torch.stack(divisors),
            "given": sorted(name for name, t in inputs.items() if t is not None),
            "advantages and policy_weights": torch.cat(scale or [self.targets[:0]]),
            **others,
        }


def make_batch(
    caller: str,
    objective: Any,
    targets: Tensor,
    head: Head,
    *,
    vocab: int | None,
    dtype: torch.dtype,
    skip_inactive: bool,
    divisors: dict[str, float | Tensor | None],
    floats: dict[str, Tensor | None],
    masks: dict[str, Tensor | None],
    sequence_ids: Tensor | None,
    statistics: Sequence[str],
    like: str = "targets",
) -> Batch:
    """Makes the batch of these arguments of a public function, checked. `vocab` None: it is not known, targets may be
    any. `like`: the argument whose shape per-token inputs must have, for messages.

    Raises:
        TypeError, ValueError: an argument is wrong; one line names it.
    """
    if not isinstance(objective, Objective):
        raise TypeError(f"{caller}: objective must be an Objective; got {type(objective).__name__}")
    floats, masks = validate.check_token_inputs(caller, targets, floats, masks, like)
    for name in objective.needed:
        if floats[name] is None:
            raise ValueError(f"{caller}: {name} must be a tensor, which {objective.needs[name]} needs; got None")
    names = check_statistics(caller, (*objective.statistics, *check_statistics(caller, statistics)))
    validate.check_flag(caller, "skip_inactive", skip_inactive)
    validate.check_sequence_ids(caller, targets, sequence_ids, like)
    flat, active = active_tokens(targets, head, masks["mask"])
    if vocab is not None:
        validate.check_range(caller, flat, active, vocab, head.ignore_index)
    given, advantages = _expert_mask(caller, objective, masks), floats["advantages"]
    expert = torch.full_like(active, objective.supervised) if given is None else given.reshape(-1)
    if (weighted := floats["policy_weights"]) is not None:
        floats["policy_weights"] = weighted = validate.policy_weights(caller, weighted.reshape(-1), active & ~expert)
    live = _live(objective, expert, advantages, weighted)
    selection, dense = _select(objective, active, live, expert, skip_inactive)
    sequences = validate.sequences(caller, targets, sequence_ids, like) if objective.needs_sequences else None
    weights, (count, dead) = _weights(objective, active, sequences, dtype), _counts(selection, active, live)
    checked = {
        name: None if value is None else validate.divisor(caller, name, value, dtype, flat.device)
        for name, value in divisors.items()
    }
    divisor, of_experts = _divisors(objective, checked, active, expert, count, sequences, dtype)
    if of_experts is not None:
        beside = torch.where(expert, divisor / of_experts, 1)
        weights = beside if weights is None else weights * beside
    take = selection.take
    return Batch(
        objective=objective,
        selection=selection,
        targets=selection.counting(take(flat)),
        expert=take(expert) if dense is None else dense.active & expert,
        inputs={n: None if t is None else take(t.reshape(-1)).to(dtype) for n, t in floats.items()},
        sequences=sequences.map(take) if sequences and objective.coupled else None,
        weights=None if weights is None else take(weights),
        statistics=names,
        normalizer=divisor,
        counts={"tokens": count, "zero_gradient_tokens": dead},
        shape=targets.shape,
        dense=dense,
        expert_normalizer=of_experts,
    )


def _expert_mask(caller: str, objective: Objective, masks: Mapping[str, Tensor | None]) -> Tensor | None:
    """Returns the mask, and says so where there is none and only a mask could tell expert tokens from own ones."""
    mixed = objective.expert is not None and objective.expert_coef != 0 and objective.has_policy_term
    if mixed and masks["expert_mask"] is None and not tracing():
        _say_no_expert(caller)
    return masks["expert_mask"]


@functools.cache
def _say_no_expert(caller: str) -> None:
    """Says once that a mixed loss got no expert token: a mask that was forgotten looks like training."""
    warnings.warn(
        f"{caller}: objective has an expert term, and expert_mask is None: no token gets it (an objective with "
        "expert=None says the same without this line)",
        RuntimeWarning,
        stacklevel=3,
    )


def active_tokens(targets: Tensor, head: Head, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns (targets [N], which of them take part [N])."""
    flat = targets.reshape(-1)
    active = flat != head.ignore_index
    return flat, active if mask is None else active & (mask.reshape(-1) != 0)


def _select(
    objective: Objective, active: Tensor, live: Tensor | None, expert: Tensor, skip_inactive: bool
) -> tuple[Selection, Dense | None]:
    """Returns the tokens to compute of those that are `active`, first the ones that have a gradient."""
    if tracing():
        live = torch.ones_like(active) if live is None else live
        computed = active & live if skip_inactive and not objective.coupled else active
        return Selection.every(active), Dense(computed & ~expert, computed, live)
    if objective.coupled:  # its tokens stay together and in order: no others are known before all are
        return Selection.choose(active), None
    # The expert tokens of a reference head lie together, so that they need not be looked for again.
    leading = expert if objective.reference_head else None
    return Selection.choose(active, live, drop_others=skip_inactive, leading=leading), None


def _live(objective: Objective, expert: Tensor, advantages: Tensor | None, weighted: Tensor | None) -> Tensor | None:
    """Returns the tokens that can have a gradient [N]; None: all can."""
    if objective.every_token_has_gradient:
        return None
    return objective.has_gradient(expert, None if advantages is None else advantages.reshape(-1), weighted)


def _counts(selection: Selection, active: Tensor, live: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns how many tokens are `active`, and how many of those have no gradient, as far as is known."""
    if selection.counts is not None:
        return selection.counts[0], selection.counts[0] - selection.counts[1]
    count = active.sum()
    return count, torch.zeros_like(count) if live is None else (active & ~live).sum()


def _weights(objective: Objective, active: Tensor, sequences: Sequences | None, dtype: torch.dtype) -> Tensor | None:
    """Returns by what the loss of each token is multiplied [N]."""
    if objective.reduction != "sequence_mean":
        return None
    assert sequences is not None
    return 1 / sequences.total(active.to(dtype)).clamp(min=1)


def _divisors(
    objective: Objective,
    given: Mapping[str, Tensor | None],
    active: Tensor,
    expert: Tensor,
    count: Tensor,
    sequences: Sequences | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Returns what the sum of the losses is divided by, and that of expert tokens where it has another divisor."""
    divisor, of_experts = given["normalizer"], given["expert_normalizer"]
    if divisor is None:
        divisor = filled(_default_normalizer(objective, active, expert, count, sequences), dtype, active.device)
    if of_experts is None and objective.reduction == "region_mean":
        of_experts = filled((active & expert).sum().clamp(min=1), dtype, active.device)
    return divisor, of_experts


def _default_normalizer(
    objective: Objective, active: Tensor, expert: Tensor, count: Tensor, sequences: Sequences | None
) -> float | Tensor:
    if objective.reduction == "sum":
        return 1.0
    if objective.reduction == "token_mean":
        return count.clamp(min=1)
    if objective.reduction == "region_mean":
        return (active & ~expert).sum().clamp(min=1)
    assert sequences is not None
    return sequences.with_any(active).clamp(min=1)
