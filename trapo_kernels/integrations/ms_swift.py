"""This adapter puts supervised losses into the map of ms-swift, from the logits that its trainer hands over.

    # plugin.py
    import trapo_kernels.integrations.ms_swift

    swift sft --external_plugins plugin.py --loss_type trsft ...

Written against ms-swift at commit 3602360: `loss_map` and `BaseLoss` of swift/loss, and the call in
swift/trainers/seq2seq_trainer.py. Registers "trsft" (TRAPO's trust-region SFT, α = 0.1) and "dft". Beside the logits
nothing of their size but their gradient is made; to make no logits at all, `fuse(model, ...)` of
trapo_kernels.integrations.transformers does the same under any Hugging Face trainer.
"""

from __future__ import annotations

from typing import Any

from swift.loss import BaseLoss, loss_map
from torch import Tensor
from torch.nn import functional as F

from ..functional import policy_loss_from_logits
from ..objective import Objective

__all__ = ["DFTLoss", "TrSFTLoss"]

IGNORED = -100


class _SupervisedLoss(BaseLoss):
    objective: Objective

    def __call__(
        self,
        outputs: Any,
        labels: Tensor,
        *,
        num_items_in_batch: Tensor | int | None = None,
        loss_scale: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Takes labels [B, T] of the tokens themselves; the sum is divided by num_items_in_batch, or by their
        number."""
        name = type(self).__name__
        if loss_scale is not None:
            raise ValueError(f"{name}: loss_scale must be None (--loss_scale default); got a tensor")
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        out = policy_loss_from_logits(
            outputs.logits, targets, self.objective, normalizer=num_items_in_batch, ignore_index=IGNORED
        )
        return out.loss


class TrSFTLoss(_SupervisedLoss):
    """Computes TrSFT's loss: −log p where p is at least α, and its tangent in p below."""

    objective = Objective(expert="trsft", policy=None)


class DFTLoss(_SupervisedLoss):
    """Computes Dynamic Fine-Tuning's loss: −sg(p) log p."""

    objective = Objective.dft()


loss_map["trsft"], loss_map["dft"] = TrSFTLoss, DFTLoss
