"""Does the engine generate with the learner's weights? Asked after every weight sync, on a few tokens.

A sync that goes wrong is silent: text stays fluent and rewards move slowly. So a few rollouts of the step are begun
again with the new weights, and the engine's log-probabilities of what it samples are compared with the learner's own
(`trapo_kernels.linear_logprobs` on its hidden states). Contexts are those of rollouts that were just generated: they
are the ones whose cached prefixes would be stale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

import trapo_kernels as tk
from trapo.data.encode import EncodedProblem
from trapo.engines.protocol import Engine, Request
from trapo.errors import TrapoError
from trapo.models.agreement import hidden_states
from trapo.models.loading import head_of
from trapo.models.sharding import as_forward
from trapo.rollouts import Rollout
from trapo.runs.ranks import ALONE, Ranks
from trapo.settings.groups import RolloutConfig

# The learner's log-probabilities of each rollout's own tokens, [tokens] each.
Scorer = Callable[[Sequence[Rollout]], list[torch.Tensor]]

SEQUENCES = 4
# Mean |difference| in nats. Engines in fp32 differ by 1e-5 (docs/vllm.md). For 16-bit ones there is no measurement of
# ours: rounding alone makes some 1e-2.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}


class AgreementGuard:
    """Compares about `rollout.guard_tokens` tokens; with 0 it does nothing, nor with an engine that gives no
    log-probabilities (hf, which runs the learner's own module). dtype: the learner's, where rollout.dtype is None.
    ranks: all check together; where each has an engine of its own, each of those is asked for as many tokens, and the
    worst one decides."""

    def __init__(self, config: RolloutConfig, dtype: str, ranks: Ranks = ALONE) -> None:
        self.engines = ranks.world if config.engine == "vllm" else 1
        self.tokens = config.guard_tokens if config.engine != "hf" else 0
        self.temperature = config.temperature
        self.tolerance = config.guard_tolerance or max(TOLERANCE[dtype], TOLERANCE[config.dtype or dtype])

    def check(self, engine: Engine, rollouts: Sequence[Rollout], score: Scorer, *, seed: int) -> float | None:
        """Returns the mean |engine − learner| in nats a token, of several engines the largest; None when nothing was
        compared. Raises TrapoError above the tolerance."""
        probes = self._begin_again(engine, rollouts, seed) if self.tokens else []
        if not probes:
            return None
        each = len(probes) // self.engines
        own, means = score(probes), []
        for i in range(0, len(probes), each):
            sampled = torch.cat([torch.tensor(probe.rollout_logprobs) for probe in probes[i : i + each]])
            difference = (torch.cat([logprobs.cpu() for logprobs in own[i : i + each]]) - sampled).abs()
            means.append(float(difference.mean()))
            if not means[-1] <= self.tolerance:  # NaN too
                which = f"the engine of rank {i // each}" if self.engines > 1 else "the engine"
                raise TrapoError(
                    f"rollout.guard_tolerance: {which} does not generate with the learner's weights: after a weight "
                    f"sync they disagree by {means[-1]:.2g} nats a token (mean of {len(difference)}, largest "
                    f"{float(difference.max()):.2g}); accepted: {self.tolerance:g}"
                )
        return max(means)

    def _begin_again(self, engine: Engine, rollouts: Sequence[Rollout], seed: int) -> list[Rollout]:
        """Returns the rollouts with the longest contexts (they fill blocks of a prefix cache), with new own tokens;
        those of one engine after those of another, as `Ranks.share` hands requests out."""
        contexts = {r.problem.prompt_ids + r.prefix_ids: r for r in rollouts if r.own_ids or not r.finished}
        longest = sorted(contexts, key=len)[-SEQUENCES:]
        each = math.ceil(self.tokens / max(len(longest), 1))
        requests = [Request(context, each) for _ in range(self.engines) for context in longest]
        completions = engine.generate(requests, temperature=self.temperature, seed=seed) if requests else []
        return [
            dataclasses.replace(contexts[request.context], own_ids=c.token_ids, rollout_logprobs=c.logprobs)
            for request, c in zip(requests, completions, strict=True)
        ]


def unanswered(problems: Sequence[EncodedProblem]) -> list[Rollout]:
    """Returns the rollouts that are not begun yet: what the guard asks before anything was generated."""
    return [Rollout(problem, i, 0, 0.0, (), (), False, False) for i, problem in enumerate(problems)]


def plain_scorer(model: PreTrainedModel, temperature: float) -> Scorer:
    """Returns a Scorer where there is no learner: one forward of the model per rollout; of a sharded model on all ranks
    alike."""

    @torch.no_grad()
    def score(rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
        return as_forward(model, lambda: _score(rollouts))

    def _score(rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
        head, found = head_of(model), []
        for rollout in rollouts:
            ids = torch.tensor([rollout.problem.prompt_ids + rollout.response_ids], device=model.device)
            hidden = hidden_states(model, ids)
            own = slice(-len(rollout.own_ids) - 1, -1)
            targets = ids[0, -len(rollout.own_ids) :]
            found.append(
                tk.linear_logprobs(
                    hidden[0, own], head.weight, targets, temperature=temperature, **head.options
                ).logprobs
            )
        return found

    return score
