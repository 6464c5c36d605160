"""This adapter gives NeMo-RL a loss function from log-probabilities, in the place of ClippedPGLossFn.

    from trapo_kernels.integrations.nemo_rl import TrapoLossFn

    loss_fn = TrapoLossFn(clip_low=0.2, clip_high=0.28)     # what setup() of nemo_rl.algorithms.grpo returns as loss_fn

Written against NeMo-RL at commit 7ea279a: the protocol of nemo_rl/algorithms/loss/interfaces.py, and the fields that
ClippedPGLossFn of loss_functions.py beside it reads. NeMo-RL puts no expert mask into its batches; "expert_mask"
[B, S] is read where your rollouts put one.
"""

from __future__ import annotations

from typing import Any

from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType, MetricNormalizer
from torch import Tensor

from ..functional import policy_loss_from_logprobs
from ..objective import Objective

__all__ = ["TrapoLossFn"]


class TrapoLossFn:
    """Is a LossFunction of NeMo-RL: token losses over the number of valid tokens of the global batch.

    Args:
        **settings: fields of Objective. Default: TrSFT on expert tokens, ratios clipped at 1 ± 0.2. With kl_coef the
            batch must have reference_policy_logprobs.

    Raises:
        ValueError: a term that needs entropies, or what a batch does not have; the message names it.
    """

    loss_type = LossType.TOKEN_LEVEL
    input_type = LossInputType.LOGPROB

    def __init__(self, **settings: Any) -> None:
        self.objective = Objective(**{"policy": "clip", "clip_low": 0.2, "clip_high": 0.2, **settings})
        if self.objective.entropy_coef:
            got = self.objective.entropy_coef
            raise ValueError(f"TrapoLossFn: entropy_coef must be 0, NeMo-RL hands on no entropies; got {got}")
        self.metric_normalizations = dict.fromkeys(
            ("loss", "loss_policy", "loss_expert", "probs_ratio", "clip_fraction"), MetricNormalizer.TOKENS
        ) | {"num_valid_samples": MetricNormalizer.NONE}

    def __call__(
        self, next_token_logprobs: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """Takes next_token_logprobs [B, S − 1]; the batch's own fields are [B, S], and their first column is left
        out."""
        inputs = {
            "old_logprobs": "prev_logprobs", "rollout_logprobs": "generation_logprobs",
            "ref_logprobs": "reference_policy_logprobs", "expert_mask": "expert_mask",
        }  # fmt: skip
        if self.objective.tis_cap is not None:  # the ratio is to this policy
            del inputs["old_logprobs"]
        given = {name: data[field][:, 1:] for name, field in inputs.items() if field in data}
        mask = (data["token_mask"][:, 1:] * data["sample_mask"][:, None]) != 0
        out = policy_loss_from_logprobs(
            next_token_logprobs, self.objective, advantages=data["advantages"][:, 1:], mask=mask,
            normalizer=global_valid_toks, **given,
        )  # fmt: skip
        m, share = out.metrics, out.metrics["own_tokens"] / global_valid_toks.clamp(min=1)
        found = {name: float(m[name]) for name in ("loss", "loss_policy", "loss_expert")}
        found["probs_ratio"] = float(m["ratio_mean"] * share)
        found["clip_fraction"] = float((m["clip_low"] + m["clip_high"]) * share)
        return out.loss, {**found, "num_valid_samples": float(data["sample_mask"].sum())}
