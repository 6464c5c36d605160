"""This folder has losses on K ids a token: `logprobs` has log-probabilities of the ids, `topk_divergence` divergences
from a teacher's top-k, whose formulas are in `topk_terms`.

`rows` is their chunk loop, `autograd` and `ops` what `trapo_kernels.autograd` and `trapo_kernels.ops` are to the other
losses, and `gathered` the few logits that a small support needs.
"""

from .logprobs import SupportLogprobs, linear_support_logprobs
from .topk_divergence import TopkDivergence, linear_topk_divergence

__all__ = ["SupportLogprobs", "TopkDivergence", "linear_support_logprobs", "linear_topk_divergence"]
