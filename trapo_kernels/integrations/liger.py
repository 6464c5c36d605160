"""This is a drop-in for Liger's LigerFusedLinearGRPOLoss, with what that one refuses: an entropy bonus, top-entropy
masks and off-policy masks. Needs torch alone.

    - from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    + from trapo_kernels.integrations.liger import FusedLinearGRPOLoss as LigerFusedLinearGRPOLoss

Three GEMMs where the loss can be computed in one pass, four where log-probabilities must be known first;
`loss.path` says which, and why. Liger's head does four.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional import linear_logprobs, linear_policy_loss
from ..objective import Objective
from .grpo_terms import GRPOOptions, GRPOTokens, clipped_tokens, grpo_loss, masked_mean, policy_normalizer

__all__ = ["FusedLinearGRPOLoss"]

IGNORED = -100


class FusedLinearGRPOLoss(nn.Module):
    """Computes the GRPO family over a linear head.

    Args:
        beta ... vespo_lambda_neg: Liger's, with its defaults. `compiled` and `chunk_size` are accepted and mean
            nothing: nothing needs compiling, and the budget decides the chunks.
        entropy_coef: weight of the entropy bonus, the mean entropy of the tokens in the loss.
        top_entropy_quantile: only this fraction of tokens, those of highest entropy, is in the policy term and bonus.
        off_policy_mask_threshold: sequences with A < 0 whose mean log(π_engine / π) is above it are left out.
        softcap, logit_scale, backend: as in `linear_policy_loss`.

    One difference: "luspo" with terms of token length (token-level ratios, KL) sums active tokens, as TRL does; Liger's
    counts padding too.

    Raises:
        ValueError: a setting is out of its range; the message names it.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
        *,
        entropy_coef: float = 0.0,
        top_entropy_quantile: float = 1.0,
        off_policy_mask_threshold: float | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.options = GRPOOptions(
            beta=beta, epsilon_low=epsilon_low, epsilon_high=epsilon_high, loss_type=loss_type,
            max_completion_length=max_completion_length, importance_sampling_level=importance_sampling_level,
            sapo_temperature_pos=sapo_temperature_pos, sapo_temperature_neg=sapo_temperature_neg, delta=delta,
            use_bias_correction_kl=use_bias_correction_kl, vespo_k_pos=vespo_k_pos, vespo_lambda_pos=vespo_lambda_pos,
            vespo_k_neg=vespo_k_neg, vespo_lambda_neg=vespo_lambda_neg, entropy_coef=entropy_coef,
            top_entropy_quantile=top_entropy_quantile, off_policy_mask_threshold=off_policy_mask_threshold,
        )  # fmt: skip
        self.use_ref_model = use_ref_model
        self.head: dict[str, Any] = {
            "temperature": temperature, "softcap": softcap, "logit_scale": logit_scale, "backend": backend,
        }  # fmt: skip
        reason = self.options.single_pass()
        self.path = "one pass" if reason is None else f"two passes: {reason}"
        self.metrics: dict[str, Tensor] = {}  # of the last call, by name

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        sampling_per_token_logps: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Takes Liger's arguments, and the engine's log-probabilities for the off-policy mask.

        Args:
            _input: [B, T, D] hidden states; lin_weight [V, D]; bias [V].
            selected_token_ids: [B, T] int64.
            attention_mask: [B, T], 1 at the tokens that count.
            advantages: [B].
            ref_per_token_logps, or ref_input [B, T, D] with ref_weight and ref_bias: the KL term's reference.
            vllm_is_ratio: [B], [B, 1] or [B, T].

        Returns:
            The loss, and (mean KL where beta is not 0, fraction of clipped tokens).
        """
        mask = attention_mask.to(torch.float32)
        if self.use_ref_model and ref_per_token_logps is None and self.options.beta != 0:
            if ref_input is None or ref_weight is None:
                raise ValueError(
                    "FusedLinearGRPOLoss: ref_per_token_logps or ref_input and ref_weight must be given with "
                    "use_ref_model=True; got None"
                )
            with torch.no_grad():
                targets = selected_token_ids.masked_fill(mask == 0, IGNORED)
                ref_per_token_logps = linear_logprobs(ref_input, ref_weight, targets, bias=ref_bias, **self.head)[0]
        if vllm_is_ratio is not None and vllm_is_ratio.ndim == 1:
            vllm_is_ratio = vllm_is_ratio[:, None]
        inputs = {
            "mask": mask, "advantages": advantages.float(), "old_logprobs": old_per_token_logps,
            "ref_logprobs": ref_per_token_logps, "sampling_ratio": vllm_is_ratio,
            "sampling_logprobs": sampling_per_token_logps,
        }  # fmt: skip
        normalizer = policy_normalizer(self.options, mask, num_items_in_batch)
        call = self._one_pass if self.path == "one pass" else self._two_passes
        loss, self.metrics = call(_input, lin_weight, bias, selected_token_ids, inputs, normalizer)
        kl = (self.metrics["kl"],) if self.options.beta != 0 else ()
        return loss, (*kl, self.metrics["clip_ratio"])

    def _two_passes(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, inputs: dict[str, Any], count: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        o, outside = self.options, inputs["mask"] == 0
        entropy = o.entropy_coef != 0 or o.top_entropy_quantile < 1
        targets = ids.masked_fill(outside, IGNORED)
        found = linear_logprobs(hidden, weight, targets, bias=bias, entropy=entropy, **self.head)
        for name in ("old_logprobs", "ref_logprobs"):
            if inputs[name] is not None:  # what a caller padded with cannot poison anything
                inputs[name] = inputs[name].float().masked_fill(outside, 0)
        return grpo_loss(o, GRPOTokens(logprobs=found.logprobs, entropy=found.entropy, **inputs), count)

    def _one_pass(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, inputs: dict[str, Any], count: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss in one pass. Where the policy term's normalizer is not that of the entropy bonus, their
        ratio is among its weights."""
        o, mask, ref = self.options, inputs["mask"], inputs["ref_logprobs"]
        tokens, advantages = mask.sum().clamp(min=1), inputs["advantages"][:, None].expand(mask.shape)
        weights, sampled = None, inputs["sampling_ratio"]
        if o.loss_type == "grpo":
            weights, count = tokens / mask.sum(-1, keepdim=True).clamp(min=1) / count, tokens
        elif o.entropy_coef != 0:
            weights, count = tokens / count, tokens
        if sampled is not None:
            weights = sampled if weights is None else weights * sampled
        objective = Objective(
            expert=None, policy="clip", clip_low=o.epsilon_low, clip_high=o.epsilon_high, dual_clip=o.delta,
            entropy_coef=o.entropy_coef, kl_coef=0.0 if ref is None else o.beta,
        )  # fmt: skip
        out = linear_policy_loss(
            hidden, weight, ids, objective, advantages=advantages, old_logprobs=inputs["old_logprobs"],
            ref_logprobs=ref, policy_weights=None if weights is None else weights.expand(mask.shape),
            mask=mask.bool(), normalizer=count.float(), bias=bias,
            **self.head,
        )  # fmt: skip
        old = inputs["old_logprobs"]
        ratio = torch.exp(out.logprobs - (out.logprobs if old is None else old.float().masked_fill(mask == 0, 0)))
        zero = torch.zeros_like(out.loss.detach())
        return out.loss, {
            "kl": out.metrics.get("kl_ref_k3", zero),
            "clip_ratio": masked_mean(clipped_tokens(o, ratio, advantages), mask),
            "entropy": out.metrics["entropy"],
        }
