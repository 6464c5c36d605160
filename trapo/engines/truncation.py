"""This file samples from a part of the vocabulary and says which: what a loss needs to stay on-policy.

As transformers and vLLM do it: the logits over the temperature; the `top_k` likeliest; of these the likeliest that
together have `top_p`; of these what has at least `min_p` of the likeliest's probability. The token is drawn from what
is left, whose ids are its support (`support=` of `linear_policy_loss`).
"""

from __future__ import annotations

import dataclasses

import torch

from trapo.engines.inverse_cdf import refuse_not_finite

Support = tuple[int, ...]  # ids


@dataclasses.dataclass(frozen=True)
class Truncation:
    """Holds the three keys of `rollout`. top_k bounds how many ids a token's support has."""

    top_k: int
    top_p: float = 1.0
    min_p: float = 0.0

    def sample(
        self, logits: torch.Tensor, temperature: float, uniform: torch.Tensor
    ) -> tuple[list[int], list[Support]]:
        """Returns one token a row and its support: logits [B, V], uniform [B] float64 in [0, 1).

        Raises TrapoError for a row that is no distribution.
        """
        scores, ids = (logits.float() / temperature).topk(min(self.top_k, logits.shape[-1]), -1)
        refuse_not_finite(scores[:, 0])
        p = scores.double().softmax(-1)
        kept = (p.cumsum(-1) - p < self.top_p) & (p >= self.min_p * p[:, :1]) & (p > 0)
        sums = (p * kept).cumsum(-1)
        place = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True).squeeze(1)
        count = kept.sum(-1)  # they are the first ones: p falls
        place = torch.minimum(place, count - 1)
        tokens = ids.gather(1, place[:, None]).squeeze(1).tolist()
        rows = zip(ids.tolist(), count.tolist(), strict=True)
        return tokens, [tuple(row[:n]) for row, n in rows]
