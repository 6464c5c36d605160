"""This adapter gives verl distillation from a teacher's top-k, with the tail that verl leaves out, forward and reverse.

    distillation.distillation_loss.loss_mode=forward_kl_topk_tail     # or reverse_kl_topk_tail

verl's `forward_kl_topk` sums over the teacher's k tokens alone, so that neither distribution has mass 1: the divergence
can be negative (verl cuts it at 0), and nothing keeps the student from mass elsewhere. Here all other tokens are one
class more, the tail, with probability 1 − Σ on both sides; the student's is summed by itself. Where verl hands over the
student's logits (its logits processor), they are read in blocks of tokens whose values the backward computes again:
beside the logits' gradient nothing of their size stays.

Imported by verl.py. FSDP engines alone: Megatron's logits are parts of a vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from verl.trainer.distillation import losses
from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size, slice_input_tensor

__all__ = ["MODES", "topk_tail_divergence"]

MODES = ("forward_kl_topk_tail", "reverse_kl_topk_tail")
BLOCK_BYTES = 2**26  # of fp32 logits at a time
STRATEGIES = ("fsdp", "fsdp2", "veomni")
# A teacher's log-probabilities are rounded, and so is what they leave: less is read as this much.
LEAST_TAIL = torch.finfo(torch.float32).eps

_of_verl = losses.compute_topk_loss


def topk_tail_divergence(logits: Tensor, teacher_logprobs: Tensor, teacher_ids: Tensor, kind: str) -> dict[str, Tensor]:
    """Computes a divergence over the teacher's top k tokens and the tail, for each token, in nats.

    Args:
        logits: of the student [..., V].
        teacher_logprobs, teacher_ids: [..., K], K < V, different ids in a row.
        kind: "forward_kl_topk_tail", KL(teacher ‖ student), or "reverse_kl_topk_tail".

    Returns:
        verl's "distillation_losses" (differentiable in the logits), "student_mass" and "teacher_mass" [...].
    """
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    rows = max(1, BLOCK_BYTES // (4 * vocab))
    parts = [t.reshape(-1, t.shape[-1]).split(rows) for t in (logits, teacher_logprobs, teacher_ids)]
    blocks = [checkpoint(_block, *block, kind, use_reentrant=False) for block in zip(*parts, strict=True)]
    found = [torch.cat(values).reshape(shape) for values in zip(*blocks, strict=True)]
    return dict(zip(("distillation_losses", "student_mass", "teacher_mass"), found, strict=True))


def _block(z: Tensor, log_p: Tensor, ids: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the divergence, the student's mass on the ids and the teacher's [n]."""
    z, log_p = z.float(), log_p.float()
    log_z = z.logsumexp(-1)
    log_q = z.gather(-1, ids) - log_z[:, None]
    log_tail = z.scatter(-1, ids, -torch.inf).logsumexp(-1) - log_z
    p = log_p.exp()
    tail = (1 - p.sum(-1)).clamp(min=LEAST_TAIL)
    if kind == MODES[0]:
        value = (p * (log_p - log_q)).sum(-1) + tail * (tail.log() - log_tail)
    else:
        value = (log_q.exp() * (log_q - log_p)).sum(-1) + log_tail.exp() * (log_tail - tail.log())
    return value, log_q.detach().exp().sum(-1), p.sum(-1)


def compute_topk_loss(
    config: Any, distillation_config: Any, data: Any, student_logits: Tensor, data_format: str
) -> dict[str, Tensor]:
    """Returns verl's function of this name, which computes `forward_kl_topk` whatever the mode; ours for our modes."""
    mode = distillation_config.distillation_loss.loss_mode
    if mode not in MODES:
        return _of_verl(config, distillation_config, data, student_logits, data_format)
    if config.strategy not in STRATEGIES:
        raise NotImplementedError(f"{mode}: actor.strategy must be {', '.join(STRATEGIES)}; got {config.strategy!r}")
    if distillation_config.distillation_loss.log_prob_min_clamp is not None:
        raise ValueError(f"{mode}: log_prob_min_clamp must be null, for no probability is left out; got a number")
    logprobs, ids = (data[name].values().unsqueeze(0) for name in ("teacher_logprobs", "teacher_ids"))
    if get_ulysses_sequence_parallel_world_size() > 1:
        logprobs, ids = slice_input_tensor(logprobs, dim=1), slice_input_tensor(ids, dim=1)
    return topk_tail_divergence(student_logits, logprobs, ids, mode)


losses.compute_topk_loss = compute_topk_loss
if MODES[0] not in losses.DISTILLATION_LOSS_REGISTRY:
    losses.register_distillation_loss(losses.DistillationLossSettings(names=list(MODES), use_topk=True))(
        losses.compute_forward_kl_topk
    )
