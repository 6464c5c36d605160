"""This folder lets TRL's trainers compute their heads and losses here.

from trapo_kernels.integrations.trl import fuse

trainer = SFTTrainer(model, args=args, train_dataset=dataset)
fuse(trainer)                                # SFT, DPO, KTO, GRPO, RLOO, distillation
trainer.train()

fuse.py         one line for a trainer that exists
head.py         TRL's fused head, computed here
divergence.py   the loss of DistillationTrainer
grpo.py         FusedGRPOTrainer: with expert tokens and objectives; settings.py: what GRPOConfig says
"""

from __future__ import annotations

from typing import Any

from .divergence import chunked_divergence_loss
from .fuse import Fused, fuse
from .grpo import FusedGRPOTrainer
from .head import FusedHead

__all__ = ["Fused", "FusedGRPOTrainer", "FusedHead", "chunked_divergence_loss", "fuse"]


def __getattr__(name: str) -> Any:
    """Imports `TrapoGRPOTrainer`, where it is asked for: it needs the package `trapo`."""
    if name == "TrapoGRPOTrainer":
        from trapo.integrations.trl import TrapoGRPOTrainer

        return TrapoGRPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
