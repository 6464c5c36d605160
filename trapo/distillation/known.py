"""This file holds what a teacher says of tokens, and computes the divergence of the student from it.

States   the teacher's hidden states and its head: its whole distribution, never as logits
TopK     its log-probabilities of a few ids of each token, as engines give them
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

import trapo_kernels as tk
from trapo.distillation.how import Distillation
from trapo_kernels.integrations.transformers import LinearHead


class States(NamedTuple):
    hidden: torch.Tensor  # [n, D'], in the dtype that the head's product has
    head: LinearHead


class TopK(NamedTuple):
    ids: torch.Tensor  # [n, K] int64; -1: none
    logprobs: torch.Tensor  # [n, K] fp32, at temperature 1


class Found(NamedTuple):
    """Holds a loss, and detached: each token's divergence [n] in nats, and the log-mass that the student has beside the
    teacher's ids [n] (None: the teacher is known everywhere)."""

    loss: torch.Tensor
    tokens: torch.Tensor
    tail: torch.Tensor | None


def divergence(
    hidden: torch.Tensor,
    head: LinearHead,
    known: States | TopK,
    how: Distillation,
    *,
    weights: torch.Tensor | None,
    normalizer: float,
    temperature: float,
) -> Found:
    """Returns coef · Σ weights · D / normalizer over the tokens [n] of hidden [n, D], with the student's gradients.

    temperature: of student and teacher; a top-k is of temperature 1.
    """
    shared: dict[str, Any] = {
        "kind": how.kind,
        "beta": how.beta,
        "weights": weights,
        "normalizer": normalizer / how.coef,
    }
    if isinstance(known, TopK):
        top = tk.linear_topk_divergence(
            hidden, head.weight, known.ids, known.logprobs, tail=how.tail, temperature=temperature, **shared,
            **head.options,
        )  # fmt: skip
        return Found(*top)
    # Families pad the rows of their vocabularies to different numbers.
    mine, theirs = _cut(head, len(known.head.weight)), _cut(known.head, len(head.weight))
    own, others = mine.options, theirs.options
    ref_bias = others.pop("bias")
    whole = tk.linear_divergence(
        hidden, mine.weight, known.hidden, theirs.weight.detach(), ref_bias=ref_bias, ref_options=others,
        temperature=temperature, **shared, **own,
    )  # fmt: skip
    return Found(whole.loss, whole.tokens, None)


def _cut(head: LinearHead, rows: int) -> LinearHead:
    if len(head.weight) <= rows:
        return head
    return head._replace(weight=head.weight[:rows], bias=None if head.bias is None else head.bias[:rows])
