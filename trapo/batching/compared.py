"""This file gives rollouts the log-probabilities that a loss compares the trained model's with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

import trapo_kernels as tk
from trapo.batching.batch import target_logprobs
from trapo.errors import TrapoError
from trapo.rollouts import Rollout
from trapo.settings.objective import expert_reads, reads_behaviour
from trapo.tools.timing import StepTimer

Logprobs = Callable[[Sequence[Rollout]], list[torch.Tensor]]  # [len − 1] of each rollout's targets


def set_logprobs(
    rollouts: Sequence[Rollout],
    objective: tk.Objective,
    *,
    updates: int,
    timer: StepTimer,
    model: Logprobs,
    reference: Logprobs | None,
) -> list[str]:
    """Gives the rollouts what the loss of so many updates needs; returns the names of their fields."""
    own, compared, behaviour = [r for r in rollouts if r.own_ids], [], reads_behaviour(objective)
    # Those of expert tokens are the model's own here, where the term (LCO-KLD) does not want their writer's.
    of_expert = "old_logprobs" in expert_reads(objective) and not behaviour
    # Truncated importance sampling has a weight of its own for it.
    behind = any(r.behind for r in own) and "rollout_logprobs" not in objective.needs
    with_old = rollouts if of_expert else [] if behind else own
    for rollout in rollouts:
        rollout.old_logprobs = rollout.ref_logprobs = None
    # After the first update the policy is no longer the one that generated.
    if with_old and (updates > 1 or behaviour or behind):
        with timer.part("logprobs"):
            for rollout, row in zip(with_old, model(with_old), strict=True):
                rollout.old_logprobs = row
        compared = ["old_logprobs"]
    if behind:
        compared = [_set_sampled(own)]
    if behaviour:
        compared = [_set_behaviours(rollouts)]
    if "ref_logprobs" in objective.needs and reference is not None:
        with timer.part("logprobs"):
            for rollout, row in zip(rollouts, reference(rollouts), strict=True):
                rollout.ref_logprobs = row
        compared.append("ref_logprobs")
    if "rollout_logprobs" in objective.needs and own:
        _refuse_unsampled(own, "objective.tis_cap")
        compared.append("rollout_logprobs")
    return compared


def _set_behaviours(rollouts: Sequence[Rollout]) -> str:
    """Gives the prefixes of rollouts what the traces' writer gave their tokens; returns the name of the field."""
    for rollout in rollouts:
        _set_behaviour(rollout)
    return "old_logprobs"


def _set_behaviour(rollout: Rollout) -> None:
    size, start = len(rollout.prefix_ids), len(rollout.problem.prompt_ids) - 1
    if rollout.old_logprobs is None:
        rollout.old_logprobs = torch.zeros(len(rollout) - 1)
    for trace in rollout.problem.traces if size else ():
        if trace.behaviour is not None and trace.token_ids[:size] == rollout.prefix_ids:
            rollout.old_logprobs[start : start + size] = torch.tensor(trace.behaviour[:size])
            return


def _set_sampled(rollouts: Sequence[Rollout]) -> str:
    """Gives own tokens of rollouts the log-probabilities that they were sampled with; returns the name of the field."""
    _refuse_unsampled(rollouts, "rollout.ahead")
    for rollout in rollouts:
        sampled = target_logprobs(rollout, "rollout_logprobs")
        assert sampled is not None
        start = len(sampled) - len(rollout.own_ids)
        if rollout.old_logprobs is None:
            rollout.old_logprobs = sampled
        else:
            rollout.old_logprobs[start:] = sampled[start:].to(rollout.old_logprobs.device)
    return "old_logprobs"


def _refuse_unsampled(rollouts: Sequence[Rollout], key: str) -> None:
    """Raises TrapoError where the engine gave no log-probabilities of its tokens."""
    if any(rollout.rollout_logprobs is None for rollout in rollouts):
        raise TrapoError(f"{key}: the engine gave no log-probabilities; accepted rollout.engine: vllm, vllm_server")
