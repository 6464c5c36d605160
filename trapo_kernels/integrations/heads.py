"""This file finds the output head of a transformers causal LM as trapo_kernels takes it, and makes sure of it.

What a configuration says of its logits is a convention of each family: Granite divides by `logits_scaling`, HyperCLOVA
X multiplies by it. So `linear_head` reads the names that are known, and `fit_head` decides by the model's own logits of
a few positions; what it finds is kept with the model and is what `linear_head` gives from then on.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

__all__ = ["LinearHead", "decoder_of", "fit_head", "head_error", "linear_head"]

# By what a configuration's number changes the logits: multiplied by it, or divided.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier")  # Cohere, Falcon-H1
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite and MiniCPM 3, Inkling
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
INVERTED = {"hyperclovax": "logits_scaling"}  # families that do the opposite with a name that others gave its meaning
MEASURED = "_trapo_logit_transform"  # attribute of a model: (logit_scale, softcap) of `fit_head`


class LinearHead(NamedTuple):
    """Is a language-model head as trapo_kernels takes it: z = softcap · tanh(logit_scale · (h Wᵀ + b) / softcap)."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float

    @property
    def options(self) -> dict[str, Any]:
        """Returns the keyword arguments of `linear_policy_loss` and `linear_logprobs`."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}

    def cast(self, hidden: Tensor) -> LinearHead:
        """Returns the head in the dtype in which the stock forward multiplies: autocast's where it is on."""
        dtype = self._product_dtype(hidden)
        bias = None if self.bias is None else self.bias.to(dtype)
        return self._replace(weight=self.weight.to(dtype), bias=bias)

    def _product_dtype(self, hidden: Tensor) -> torch.dtype:
        device = hidden.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype

    def with_hidden(self, hidden: Tensor) -> tuple[Tensor, LinearHead]:
        """Returns the hidden states in the dtype in which the stock forward multiplies, and the head as the fused
        losses want it.

        An fp32 head stays as it is beside 16-bit hidden states: the losses multiply in 16 bits all the same, and its
        gradient is never rounded to them.
        """
        head = self if self.weight.dtype == torch.float32 else self.cast(hidden)
        return hidden.to(self._product_dtype(hidden)), head

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns what the model's own forward makes of hidden [..., D], in its dtype [..., V]."""
        z = F.linear(hidden, self.weight, self.bias) * self.logit_scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def linear_head(model: PreTrainedModel) -> LinearHead:
    """Returns the output head of a causal LM, with the logit transforms of the families that have them.

    Raises:
        TypeError: its output head is not a plain `nn.Linear` (a quantised layer, for instance).
    """
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        raise TypeError(
            f"linear_head: the output head of {type(model).__name__} must be nn.Linear; got {type(linear).__name__}"
        )
    scale, softcap = getattr(model, MEASURED, None) or _declared(model.config)
    return LinearHead(linear.weight, linear.bias, softcap, scale)


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Returns the module that turns token ids into the hidden states under the head. Some families' `get_decoder` gives
    a model that has the head itself, such as Llama 4's."""
    decoder: Any = model.get_decoder()
    while getattr(decoder, "get_output_embeddings", lambda: None)() is not None:
        names = ("language_model", "model", "transformer", "decoder", getattr(decoder, "base_model_prefix", "model"))
        inner = [getattr(decoder, name) for name in names if isinstance(getattr(decoder, name, None), nn.Module)]
        if not inner:
            raise TypeError(f"decoder_of: {type(model).__name__} has no decoder below its head")
        decoder = inner[0]
    return decoder


@torch.no_grad()
def fit_head(model: PreTrainedModel, head: LinearHead, hidden: Tensor, logits: Tensor) -> float:
    """Find what lies between head and logits by hidden states [..., D] and the model's own logits of them [..., V].

    Tried are what the configuration says by the names that are known, and every number in it that is named like a
    factor of logits, multiplied by or divided by, under every one that is named like a cap. `linear_head(model)` gives
    what fits from then on. head: `linear_head(model)`, cast to the dtype of the product, as hidden is.

    Returns:
        `head_error` of it. Where nothing fits, what the known names say is kept, and its error returned.
    """
    bound = tolerance(head.weight.dtype)
    declared = head_error(head, hidden, logits)
    if declared <= bound:
        return declared
    for softcap in _softcaps(model.config):
        for scale in _scales(model.config):
            error = head_error(head._replace(softcap=softcap, logit_scale=scale), hidden, logits)
            if error <= bound:
                setattr(model, MEASURED, (scale, softcap))
                return error
    return declared


@torch.no_grad()
def head_error(head: LinearHead, hidden: Tensor, logits: Tensor) -> float:
    """Returns the largest difference of the head's logits from the model's own, as a share of the largest of those."""
    if hidden.shape[-1] != head.weight.shape[1]:  # there is something between decoder and head
        return math.inf
    expected = logits.double()
    error = (head.logits(hidden).double() - expected).abs().max()
    return float(error / expected.abs().max().clamp(min=1e-30))


def tolerance(dtype: torch.dtype) -> float:
    """Returns the tolerance of `head_error`. Both sides make the same product; 16-bit logits are rounded to 2^-8 or
    2^-11 of their size."""
    return 1e-4 if dtype in (torch.float32, torch.float64) else 2e-2


def _declared(config: Any) -> tuple[float, float | None]:
    """Returns (logit scale, soft-cap), by the names of the families that have them."""
    text, scale = config.get_text_config(), 1.0
    for name in (*MULTIPLIERS, *DIVISORS):
        value = getattr(text, name, None)
        if not isinstance(value, (int, float)) or not value:
            continue
        multiplies = (name in MULTIPLIERS) != (INVERTED.get(text.model_type) == name)
        scale *= value if multiplies else 1.0 / value
    softcap = next((getattr(text, name) for name in SOFTCAPS if getattr(text, name, None)), None)
    return scale, softcap


def _scales(config: Any) -> list[float]:
    """Returns what may multiply the logits: numbers of the configuration that are named so, or one through them."""
    named = [v for n, v in _numbers(config).items() if n in MULTIPLIERS + DIVISORS or re.search("logit|lm_head", n)]
    return [1.0, *named, *(1.0 / value for value in named)]


def _softcaps(config: Any) -> list[float | None]:
    """Returns every number of the configuration that is named like a cap, and None."""
    return [*(value for name, value in _numbers(config).items() if "cap" in name), None]


def _numbers(config: Any) -> dict[str, float]:
    found = vars(config.get_text_config()).items()
    return {n: float(v) for n, v in found if isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0}
