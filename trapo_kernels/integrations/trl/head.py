"""This file computes TRL's fused head, `model(..., labels=labels, fused_lm_head=True)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from trl.trainer.utils import FusedCausalLMOutput

from ...foreseen import Foreseen, token_outputs
from ..transformers import IGNORED, LinearHead, PatchedForward

__all__ = ["FusedHead", "stock_settings"]

# TRL's optional fields, and the statistic that each is read off
FIELDS = {"log_sum_sq_probs": "sum_sq", "mean_logits": "mean_logit", "is_top1": "argmax_match"}

# Targets [B, T] of a forward -> the loss that their log-probabilities will go into, or None where that is not known.
Foresee = Callable[[Tensor], Foreseen | None]


def stock_settings(model: Any) -> dict[str, Any] | None:
    """Returns what TRL gave the head that it put onto a model (temperature, cast_lm_head_to_fp32, outputs), or None
    where there is no such head.

    A model that accelerate has prepared (DPO's reference, in bf16) has it below wrappers.
    """

    def is_stock(forward: Any) -> bool:
        return getattr(getattr(forward, "__code__", None), "co_name", None) == "_fused_forward"

    forward: Any = model.__dict__.get("forward")
    forward = getattr(forward, "__func__", forward)
    forward = inspect.unwrap(forward, stop=lambda f: is_stock(f) or hasattr(f, "patched"))
    if not is_stock(forward):
        return None
    found = inspect.getclosurevars(forward).nonlocals
    return {name: found[name] for name in ("temperature", "cast_lm_head_to_fp32", "outputs")}


class FusedHead(PatchedForward):
    """Computes TRL's `model(..., labels=labels, fused_lm_head=True)` here; and `model(..., fused_loss=fn)`.

    Args:
        model: the causal LM, below any PEFT wrapper.
        temperature, cast_lm_head_to_fp32, outputs: as TRL's `add_fused_lm_head`.
        backend: of the loss; None = the fastest here.

    `foresee`, where it is set, is asked in training what loss the log-probabilities of these targets [B, T] will go
    into (columns are those of the hidden states); then the gradients are made in the forward.
    """

    def __init__(
        self,
        model: Any,
        temperature: float = 1.0,
        cast_lm_head_to_fp32: bool = False,
        outputs: tuple[str, ...] = ("log_probs",),
        backend: str | None = None,
    ) -> None:
        super().__init__(model)
        self.follows_autocast = not cast_lm_head_to_fp32
        self.temperature, self.outputs, self.backend = temperature, outputs, backend
        self.foresee: Foresee | None = None

    def forward(self, kwargs: dict[str, Any]) -> Any:
        fused_loss, wanted = kwargs.pop("fused_loss", None), kwargs.pop("fused_lm_head", False)
        if fused_loss is None and not wanted:
            return self.stock(kwargs)
        labels, targets = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        count, config = kwargs.pop("num_items_in_batch", None), self.model.config.get_text_config()
        if getattr(config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        hidden, outputs = self.hidden_states({**kwargs, "use_cache": False})
        aux_loss = getattr(outputs, "aux_loss", None) if kwargs.get("output_router_logits") else None
        if fused_loss is not None:
            loss, logprobs, entropy = self.in_head(hidden, lambda hidden, head: fused_loss(hidden, head))
            return FusedCausalLMOutput(loss=loss, log_probs=logprobs, entropy=entropy, aux_loss=aux_loss)
        shifted = targets is not None
        if targets is None:
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        targets = targets.to(hidden.device)
        fields = self._fields(hidden, targets)
        fields["label_mask"] = targets != IGNORED
        if not shifted:
            fields = {name: values[:, :-1] for name, values in fields.items()}
        number = fields["label_mask"].sum().clamp(min=1) if count is None else count
        loss = -fields["log_probs"].sum() / number
        if aux_loss is not None:
            loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss.to(loss.device)
        return FusedCausalLMOutput(loss=loss, aux_loss=aux_loss, **fields)

    def _fields(self, hidden: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Returns TRL's per-token fields [B, T]."""
        names = [name for name in FIELDS if name in self.outputs]
        statistics, with_entropy = [FIELDS[name] for name in names], "entropy" in self.outputs
        training = torch.is_grad_enabled() and self.foresee is not None
        foreseen = self.foresee(targets) if training and self.foresee is not None else None

        def values(hidden: Tensor, head: LinearHead) -> tuple[Tensor, ...]:
            out = token_outputs(
                hidden, head.weight, targets, entropy=with_entropy, statistics=statistics, foreseen=foreseen,
                temperature=self.temperature, ignore_index=IGNORED, backend=self.backend, **head.options,
            )  # fmt: skip
            entropy = () if out.entropy is None else (out.entropy,)
            return (out.logprobs, *out.statistics.values(), *entropy)

        logprobs, *others = self.in_head(hidden, values)
        found = {"log_probs": logprobs, **dict(zip(names, others, strict=False))}
        if with_entropy:
            found["entropy"] = others[-1]
        if "log_sum_sq_probs" in found:
            found["log_sum_sq_probs"] = found["log_sum_sq_probs"].log().masked_fill(targets == IGNORED, 0)
        if "is_top1" in found:
            found["is_top1"] = found["is_top1"] != 0
        return found
