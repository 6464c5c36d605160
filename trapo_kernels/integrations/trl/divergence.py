"""This file computes the loss of TRL's DistillationTrainer by this package's divergence: gradients in the forward.

TRL projects both heads twice (three times for the Jensen-Shannon divergence), once to compute and once to
differentiate; here it is once, and once more for the student's entropy, which TRL logs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ...divergence.heads import linear_divergence
from ...functional import linear_logprobs

__all__ = ["chunked_divergence_loss"]

IGNORED = -100


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes what `_chunked_divergence_loss` of trl.trainer.distillation_trainer does, and so the
    `ChunkedDivergenceFunction` in it.

    Args:
        student_hidden_states, teacher_hidden_states: [B, K, D] and [B, K, D'], aligned to the completion tokens.
        completion_mask: [B, K], 1 where a token counts.
        beta: 0 = KL(teacher ‖ student), 1 = KL(student ‖ teacher), between them the Jensen-Shannon divergence with the
            mixture β · teacher + (1 − β) · student.
        num_items_in_batch: what the sum is divided by; None = the tokens that count.
        others: of the two heads, as TRL's.

    Returns:
        (loss, sum of the student's entropies over the tokens that count, their number).
    """
    weights = [_whole(t) for t in (student_lm_head_weight, teacher_lm_head_weight)]
    biases = [None if t is None else _whole(t) for t in (student_lm_head_bias, teacher_lm_head_bias)]
    student_hidden_states, teacher_hidden_states = map(_as_multiplied, (student_hidden_states, teacher_hidden_states))
    valid = completion_mask != 0
    student: dict[str, Any] = {
        "temperature": temperature, "softcap": student_final_logit_softcapping, "logit_scale": student_logit_scale,
    }  # fmt: skip
    kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(float(beta), "jsd")
    with maybe_gather_lm_head_ctx(weights[0], biases[0]), maybe_gather_lm_head_ctx(weights[1], biases[1]):
        loss = linear_divergence(
            student_hidden_states, weights[0], teacher_hidden_states, weights[1], bias=biases[0], ref_bias=biases[1],
            kind=kind, beta=beta if kind == "jsd" else 0.5, mask=valid, normalizer=num_items_in_batch,
            ref_options={"softcap": teacher_final_logit_softcapping, "logit_scale": teacher_logit_scale}, **student,
        ).loss  # fmt: skip
        with torch.no_grad():
            entropy = linear_logprobs(
                student_hidden_states, weights[0], torch.where(valid, 0, IGNORED), bias=biases[0], entropy=True,
                ignore_index=IGNORED, **student,
            ).entropy  # fmt: skip
    assert entropy is not None
    return loss, entropy.sum(), valid.sum()


def _whole(parameter: Tensor) -> Tensor:
    """Returns a parameter that FSDP2 shards in full, as TRL does."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _as_multiplied(hidden: Tensor) -> Tensor:
    """Returns hidden states in the dtype in which TRL multiplies: autocast's where it is on, else their own."""
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden
