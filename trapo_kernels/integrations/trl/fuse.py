"""This file has the one line that gives a TRL trainer this package's head.

    fuse(trainer)

The trainer's own code makes the loss and everything that it logs; what changes is what its model answers to
`fused_lm_head=True`. Where the loss is one that is known before it is computed (SFT: nll, dft; GRPO: grpo, bnpo,
dr_grpo, dapo), its gradients are made in the forward: three products of the head's size. Elsewhere (DPO, KTO, RLOO,
GRPO's other losses) the backward recomputes the logits: four, as TRL's own head does. Whether the slopes that come back
are the foreseen ones is looked at in every backward (foreseen.py); where they are not, gradients are recomputed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from trl import DistillationTrainer, GRPOTrainer, SFTTrainer
from trl.trainer import distillation_trainer

from ...foreseen import Foreseen
from ...objective import Objective
from .divergence import chunked_divergence_loss
from .head import FusedHead, stock_settings
from .settings import objective_of, per_token, reduction_of, why_two_passes

__all__ = ["Fused", "fuse"]

log = logging.getLogger(__name__)

KEPT = "_trapo_fused"  # attribute of a trainer: what `fuse` returned
SUPERVISED = {"nll": Objective.sft, "dft": Objective.dft}


def fuse(trainer: Any, *, backend: str | None = None) -> Fused:
    """Makes a TRL trainer compute its head and loss with this package. Loss, gradients and logs stay the trainer's.

    Args:
        trainer: SFTTrainer, DPOTrainer, KTOTrainer, RLOOTrainer, GRPOTrainer, DistillationTrainer, a subclass of one,
            or any trainer whose model TRL's `add_fused_lm_head` was given to. With PEFT or not; call it before
            `trainer.train()`.
        backend: "torch", "cpu", "triton", ...; None = the fastest here. See `backends()`.

    Returns:
        A handle: `path` says how gradients are made, `remove()` gives the trainer its own head back.

    Raises:
        TypeError: a trainer that has no fused head of TRL's, or whose head is not a plain `nn.Linear`.
        ValueError: SFT with label smoothing or a compute_loss_func, which need the logits.
    """
    earlier = getattr(trainer, KEPT, None)
    if isinstance(earlier, Fused):
        earlier.remove()
    if isinstance(trainer, DistillationTrainer):
        fused: Fused = FusedDistillation(trainer)
    else:
        fused = FusedTrainer(trainer, backend)
    setattr(trainer, KEPT, fused)
    return fused


class Fused:
    """Is what `fuse` returns. `path`: "one pass", or "recomputed: " and why."""

    path: str

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._wrapped: str | None = None

    def remove(self) -> None:
        """Give the trainer back what it had before."""
        if self._wrapped is not None:
            vars(self.trainer).pop(self._wrapped, None)
        vars(self.trainer).pop(KEPT, None)

    def _wrap(self, name: str, around: Callable[..., Any]) -> None:
        """Replaces a method of the trainer by `around(method, *arguments)`."""
        method = getattr(self.trainer, name)
        self._wrapped = name
        setattr(self.trainer, name, lambda *args, **kwargs: around(method, *args, **kwargs))


class FusedTrainer(Fused):
    """Is a trainer whose model answers `fused_lm_head=True`, and its reference model with it."""

    def __init__(self, trainer: Any, backend: str | None) -> None:
        super().__init__(trainer)
        models = [m for m in (_base(trainer, "model"), _base(trainer, "ref_model")) if m is not None]
        found = [(model, settings) for model in models if (settings := stock_settings(model)) is not None]
        if len(found) < max(1, len(models)):
            raise TypeError(
                "fuse: trainer must be TRL's SFT, DPO, KTO, RLOO, GRPO or DistillationTrainer, not fused already; got "
                f"{type(trainer).__name__}"
            )
        _check_logits_unused(trainer)
        # A reference is asked what the policy is: one path, so that equal weights give equal bits.
        self.heads = [
            FusedHead(model, backend=backend, **{**given, "outputs": found[0][1]["outputs"]}) for model, given in found
        ]
        self._inputs: dict[str, Any] | None = None
        self.path = self._foresee()

    def remove(self) -> None:
        super().remove()
        for head in reversed(self.heads):
            head.remove()

    def _foresee(self) -> str:
        """Tells the model's head what loss comes, and returns the path."""
        trainer, head = self.trainer, self.heads[0]
        if isinstance(trainer, GRPOTrainer):
            reason = why_two_passes(trainer)
            if reason is not None:
                return f"recomputed: {reason}"
            self._wrap("_compute_loss", self._with_inputs)
            self._objective, head.foresee = objective_of(trainer), self._of_grpo
        elif isinstance(trainer, SFTTrainer) and trainer.args.loss_type in SUPERVISED:
            self._objective, head.foresee = SUPERVISED[trainer.args.loss_type](), self._of_sft
        else:
            return f"recomputed: the loss of {type(trainer).__name__} is known when the log-probabilities are"
        return "one pass"

    def _missed(self) -> None:
        self.path = f"recomputed: {type(self.trainer).__name__} made another loss of the log-probabilities"
        self.heads[0].foresee = None
        log.warning("fuse: gradients are %s", self.path)

    def _of_sft(self, targets: Tensor) -> Foreseen:
        return Foreseen(self._objective, missed=self._missed)

    def _with_inputs(self, compute: Callable[..., Any], model: Any, inputs: dict[str, Any]) -> Any:
        self._inputs = inputs
        try:
            return compute(model, inputs)
        finally:
            self._inputs = None

    def _of_grpo(self, targets: Tensor) -> Foreseen | None:
        inputs, trainer = self._inputs, self.trainer
        # Tokens that are scored, and are not in TRL's loss: of tools, and of the experts of grpo.py.
        if inputs is None or "tool_mask" in inputs or "expert_mask" in inputs:
            return None
        mask, prompt = inputs["completion_mask"].bool(), inputs["prompt_ids"].shape[1]
        if targets.shape != (mask.shape[0], prompt + mask.shape[1]):  # virtual tokens of PEFT's prompt learning
            return None
        weights, _ = reduction_of(trainer, inputs, mask)
        given = {
            "advantages": per_token(inputs["advantages"], mask), "policy_weights": weights,
            "old_logprobs": inputs.get("old_per_token_logps"), "ref_logprobs": inputs.get("ref_per_token_logps"),
        }  # fmt: skip
        # Column t of the hidden states predicts token t + 1.
        padded = {name: F.pad(t, (prompt - 1, 1)) for name, t in given.items() if t is not None}
        return Foreseen(self._objective, padded, self._missed)


class FusedDistillation(Fused):
    """Is TRL's DistillationTrainer with this package's divergence."""

    path = "one pass"

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self._wrap("_compute_loss", self._with_divergence)

    def _with_divergence(self, compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        own = distillation_trainer._chunked_divergence_loss
        distillation_trainer._chunked_divergence_loss = chunked_divergence_loss
        try:
            return compute(*args, **kwargs)
        finally:
            distillation_trainer._chunked_divergence_loss = own


def _base(trainer: Any, name: str) -> Any:
    """Returns a model of the trainer without what wraps it, or None."""
    model = getattr(trainer, name, None)
    if model is None:
        return None
    model = trainer.accelerator.unwrap_model(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check_logits_unused(trainer: Any) -> None:
    for name in ("compute_loss_func", "label_smoother"):
        if getattr(trainer, name, None) is not None:
            raise ValueError(f"fuse: trainer must have no {name}, which needs the logits; got {type(trainer).__name__}")
