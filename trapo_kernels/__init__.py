"""This package computes policy losses over huge vocabularies: exact gradients, and never the `[tokens, vocab]` logits.

import trapo_kernels as tk

out = tk.linear_policy_loss(hidden, lm_head.weight, targets, tk.Objective.trapo(),
                            advantages=advantages, expert_mask=expert_mask)
out.loss.backward()
"""

__version__ = "0.2.0.dev0"

from .backends.dispatch import Backend, backends, default_backend, set_backend
from .chunks.budget import budget_mb, get_budget_mb, set_budget_mb
from .divergence import Divergence, linear_divergence
from .functional import (
    PolicyLoss,
    TokenLogprobs,
    linear_logprobs,
    linear_policy_loss,
    linear_statistics,
    logprobs_from_logits,
    policy_loss_from_logits,
    policy_loss_from_logprobs,
)
from .metrics import METRICS, Metric, merge_metrics
from .module import TrapoLoss
from .objective import Objective
from .statistics import sed_threshold
from .support import SupportLogprobs, TopkDivergence, linear_support_logprobs, linear_topk_divergence
from .terms import EXPERT_TERMS, POLICY_TERMS, Term
from .tokens import Sequences, Tokens
from .verify import verify

__all__ = [
    "EXPERT_TERMS",
    "METRICS",
    "POLICY_TERMS",
    "Backend",
    "Divergence",
    "Metric",
    "Objective",
    "PolicyLoss",
    "Sequences",
    "SupportLogprobs",
    "Term",
    "TokenLogprobs",
    "Tokens",
    "TopkDivergence",
    "TrapoLoss",
    "__version__",
    "backends",
    "budget_mb",
    "default_backend",
    "get_budget_mb",
    "linear_divergence",
    "linear_logprobs",
    "linear_policy_loss",
    "linear_statistics",
    "linear_support_logprobs",
    "linear_topk_divergence",
    "logprobs_from_logits",
    "merge_metrics",
    "policy_loss_from_logits",
    "policy_loss_from_logprobs",
    "sed_threshold",
    "set_backend",
    "set_budget_mb",
    "verify",
]
