"""This adapter is for Hugging Face transformers: train a causal LM by `model(..., labels=...)` without its logits.

    from trapo_kernels.integrations.transformers import fuse

    fuse(model)
    Trainer(model=model, ...).train()

The stock forward still does everything else. Asked for the logits of a few positions at most, it costs next to nothing
beyond the decoder; the hidden states that it made on the way go to `linear_policy_loss`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..functional import linear_policy_loss
from ..objective import Objective
from .heads import LinearHead, decoder_of, fit_head, linear_head, tolerance

__all__ = [
    "LinearHead",
    "PatchedForward",
    "PatchedLoss",
    "decoder_of",
    "fit_head",
    "fuse",
    "linear_head",
    "patch_causal_lm_loss",
]

IGNORED = -100  # the label that transformers ignores
CHECKED = 4  # positions of each sequence whose logits are compared with the head's


def fuse(model: PreTrainedModel, objective: Objective | None = None, **options: Any) -> PatchedLoss:
    """Makes `model(..., labels=...)` compute its loss in training without the logits, whatever trainer calls it.

    Args:
        model: a causal LM, or a multimodal model with one inside, whose head is a plain `nn.Linear`.
        objective: None = the stock cross-entropy, `Objective.sft()`; others as `patch_causal_lm_loss`.
        **options: as `patch_causal_lm_loss`, which says the rest: this is its short form.

    Raises:
        TypeError, ValueError: the head or the objective cannot be used; the message says why.
    """
    return patch_causal_lm_loss(model, Objective.sft() if objective is None else objective, **options)


def patch_causal_lm_loss(model: PreTrainedModel, objective: Objective, **options: Any) -> PatchedLoss:
    """Make `model(..., labels=...)` in training mode compute a supervised objective without the logits.

    `outputs.loss` is the objective over the labels (`shift_labels` where given), divided by `num_items_in_batch` where
    given, else by the number of labels; `outputs.logits` is None. Everything else is as before: forwards without
    labels, evaluation mode (the stock cross-entropy, with logits), saving, generation. The router loss of a mixture of
    experts is added as the stock forward does.

    The first training forward compares the logits of a few positions with the model's own: a factor or a soft-cap
    of its configuration that explains them is taken, and a family whose head does something else is refused.

    Args:
        model: a causal LM with an `nn.Linear` head: Llama, SmolLM2, Qwen2, Qwen3, Gemma 2 and 3, Granite, Cohere, ...
            With PEFT, FSDP2 or torch.compile: patch first, then wrap.
        objective: an expert term and no policy term: `Objective.sft()`, `Objective(expert="trsft", policy=None)`,
            `Objective.dft()`, with an entropy bonus or not.
        **options: keyword arguments of `linear_policy_loss` that stay the same: temperature, backend, ...

    Returns:
        A handle with the metrics of the last training forward, and `remove()`.

    Raises:
        TypeError, ValueError: the head or the objective cannot be used; the message says why.
    """
    caller = "patch_causal_lm_loss"
    if not isinstance(objective, Objective):
        raise TypeError(f"{caller}: objective must be an Objective; got {type(objective).__name__}")
    if not objective.supervised or objective.needs:
        reason = ", ".join(objective.needs.values()) or f"policy={objective.policy!r}"
        raise ValueError(f"{caller}: objective must have an expert term alone, and need labels alone; got {reason}")
    return PatchedLoss(model, objective, options)


class PatchedForward:
    """Is a causal LM whose forward can be asked for the hidden states under the head instead of the logits.

    Subclasses say in `forward` which calls that is; `hidden_states` then runs the model's own forward.
    """

    follows_autocast = True  # the product is in autocast's dtype where that is on, else in the weight's

    def __init__(self, model: PreTrainedModel) -> None:
        caller = type(self).__name__
        if "logits_to_keep" not in inspect.signature(type(model).forward).parameters:
            raise TypeError(f"{caller}: the forward of model must take logits_to_keep; got {type(model).__name__}")
        linear_head(model)
        self.model = model
        self._before = model.__dict__.get("forward")
        self._stock = model.forward
        self._parameters = list(inspect.signature(self._stock).parameters)
        self._hidden: Tensor | None = None
        self._autocast: dict[str, Any] = {"device_type": self.model.device.type, "enabled": False}
        self._capturing, self._checked = False, False
        self._hook = decoder_of(model).register_forward_hook(self._capture)

        @functools.wraps(self._stock)  # Trainer and generate read the signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.forward({**dict(zip(self._parameters, args, strict=False)), **kwargs})

        forward.patched = self  # type: ignore[attr-defined]
        model.forward = forward

    def remove(self) -> None:
        """Give the model back the forward that it had before."""
        self._hook.remove()
        self.model.__dict__.pop("forward", None)
        if self._before is not None:
            self.model.forward = self._before

    def forward(self, kwargs: dict[str, Any]) -> Any:
        """Calls the patched forward, every argument by its name."""
        raise NotImplementedError

    def stock(self, kwargs: dict[str, Any]) -> Any:
        """Calls the forward that was patched."""
        return self._stock(**kwargs)

    def hidden_states(self, kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Returns (what the head is applied to [B, T, D], the stock outputs).

        The first call asks for the logits of a few positions, to check the head, the others for none.
        """
        kwargs = {name: value for name, value in kwargs.items() if name not in ("labels", "logits_to_keep")}
        length = next((kwargs[n].shape[1] for n in ("input_ids", "inputs_embeds") if kwargs.get(n) is not None), 1)
        keep = torch.arange(0 if self._checked else min(CHECKED, length), device=self.model.device)
        self._capturing = True
        try:
            outputs = self._stock(**kwargs, logits_to_keep=keep)
            hidden, self._hidden = self._hidden, None
        finally:
            self._capturing = False
        assert hidden is not None  # the hook ran
        if not self._checked:
            some = hidden[:, : len(keep)].detach()
            self.in_head(some, lambda hidden, _: self._check(hidden, outputs.logits.detach()), cast=False)
            self._checked = True
        return hidden.to(self.model.get_output_embeddings().weight.device), outputs

    def in_head(self, hidden: Tensor, compute: Callable[[Tensor, LinearHead], Any], cast: bool = True) -> Any:
        """Returns compute(hidden states, head), both in the dtype of the product unless `cast` is False.

        It runs in the autocast of the decoder's last forward: accelerate enters one in the forward of a model that it
        has prepared, which ends before this begins.

        Where the head's module has hooks (FSDP2, ZeRO-3, offloading), it runs as that module's forward: only inside of
        it are the parameters whole, and only what goes through it has them gathered again for its backward.
        """

        def forward(hidden: Tensor) -> Any:
            head = linear_head(self.model)
            with torch.autocast(**self._autocast):
                if cast and self.follows_autocast:
                    hidden, head = head.with_hidden(hidden)
                elif cast:
                    hidden = hidden.to(head.weight.dtype)
                return compute(hidden, head)

        module: Any = self.model.get_output_embeddings()
        if not (module._forward_pre_hooks or module._forward_hooks):
            return forward(hidden)
        before = module.__dict__.get("forward")
        module.forward = forward
        try:
            return module(hidden)
        finally:
            del module.forward
            if before is not None:
                module.forward = before

    def _capture(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._capturing:
            self._hidden, kind = output[0], output[0].device.type
            self._autocast = {
                "device_type": kind,
                "enabled": torch.is_autocast_enabled(kind),
                "dtype": torch.get_autocast_dtype(kind),
            }

    def _check(self, hidden: Tensor, expected: Tensor) -> None:
        head = linear_head(self.model)
        head = head.cast(hidden) if self.follows_autocast else head
        error = fit_head(self.model, head, hidden.to(head.weight.dtype), expected)
        if not error <= tolerance(head.weight.dtype):
            raise ValueError(
                f"{type(self).__name__}: model must have a head with bias, logit scale and soft-cap alone; got "
                f"{type(self.model).__name__}, whose logits differ from that by {error:.3g} of the largest"
            )


class PatchedLoss(PatchedForward):
    """Is what `patch_causal_lm_loss` returns. `metrics`: of the last training forward, by the names of `tk.METRICS`."""

    def __init__(self, model: PreTrainedModel, objective: Objective, options: dict[str, Any]) -> None:
        earlier = getattr(model.forward, "patched", None)
        if isinstance(earlier, PatchedLoss):
            earlier.remove()
        super().__init__(model)
        self.objective, self.options = objective, options
        self.metrics: dict[str, Tensor] = {}

    def forward(self, kwargs: dict[str, Any]) -> Any:
        labels, targets = kwargs.get("labels"), kwargs.get("shift_labels")
        if targets is None and labels is not None:
            targets = F.pad(labels[..., 1:], (0, 1), value=IGNORED)
        if targets is None or not self.model.training:
            return self.stock(kwargs)
        count, as_tuple = kwargs.get("num_items_in_batch"), kwargs.get("return_dict") is False
        dropped = ("shift_labels", "num_items_in_batch", "return_dict")
        hidden, outputs = self.hidden_states({k: v for k, v in kwargs.items() if k not in dropped})
        targets = targets.to(hidden.device)
        loss = self.in_head(hidden, lambda hidden, head: self._loss(hidden, head, targets, count))
        if getattr(outputs, "aux_loss", None) is not None:
            loss = loss + self.model.router_aux_loss_coef * outputs.aux_loss.to(loss.device)
        outputs = type(outputs)(**{**outputs, "loss": loss, "logits": None})
        return outputs.to_tuple() if as_tuple else outputs

    def _loss(self, hidden: Tensor, head: LinearHead, targets: Tensor, count: Tensor | float | None) -> Tensor:
        if isinstance(count, Tensor):
            count = count.reshape(()).to(hidden.device)
        if count is not None:
            count = count + (count == 0)  # a batch without labels has loss 0
        options = {**head.options, **self.options}
        out = linear_policy_loss(
            hidden, head.weight, targets, self.objective, normalizer=count, ignore_index=IGNORED, **options
        )
        self.metrics = out.metrics
        return out.loss
