"""This adapter computes prime-rl's fused head here, with its temperature per token.

    from trapo_kernels.integrations.prime_rl_head import use_fused_head

    use_fused_head()

prime-rl imports a custom loss after it has built the model, and has no other place for code of yours; so this replaces
the forward of prime-rl's head classes, not the heads, and the module that `import_path` names can call it. What those
heads refuse, a gradient through the entropy, is there.

Imports torch alone: prime-rl is not on PyPI. Written against prime-rl at commit 559b447,
src/prime_rl/trainer/models/layers/lm_head.py and lm_head_gemma.py.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..functional import linear_logprobs

__all__ = ["fused_output", "use_fused_head"]

HEADS = {"lm_head": "FusedOutputLinear", "lm_head_gemma": "GemmaFusedOutputLinear"}


def use_fused_head() -> None:
    """Makes prime-rl's fused heads (`fused_lm_head_token_chunk_size`), those of Gemma too, compute here from here on.

    Raises:
        RuntimeError: prime-rl has its heads elsewhere.
    """
    for module, name in HEADS.items():
        try:
            head = getattr(importlib.import_module(f"prime_rl.trainer.models.layers.{module}"), name)
        except (ImportError, AttributeError):
            raise RuntimeError(
                f"use_fused_head: prime_rl.trainer.models.layers.{module} must have {name}; got another version of it"
            ) from None
        head.forward = fused_output


def fused_output(
    self: Any, hidden_states: Tensor, labels: Tensor | None = None, temperature: Tensor | None = None
) -> dict[str, Tensor]:
    """Does what the forward of prime-rl's head does: logprobs and entropy [B, T] of the labels.

    Args:
        self: the head: weight [V, D], and softcap where it is Gemma's.
        hidden_states: [B, T, D].
        labels: [B, T].
        temperature: [B, T]. One call; beside a soft-cap, which stands before the division, one for each that occurs.

    Raises:
        ValueError: no labels or no temperature.
    """
    for name, value in (("labels", labels), ("temperature", temperature)):
        if value is None:
            raise ValueError(f"{type(self).__name__}: {name} must be given; got None")
    assert labels is not None
    assert temperature is not None
    shape, hidden, targets = labels.shape, hidden_states.flatten(0, -2), labels.flatten()
    each = temperature.flatten()
    options: dict[str, Any] = {"softcap": getattr(self, "softcap", None), "entropy": True}
    if options["softcap"] is None:
        out = linear_logprobs(hidden, self.weight, targets, temperature=each, entropy=True)
        assert out.entropy is not None
        return {"logprobs": out.logprobs.float().reshape(shape), "entropy": out.entropy.float().reshape(shape)}
    found = torch.zeros(2, len(targets), dtype=torch.float32, device=hidden.device)
    values = each.unique().tolist()
    for value in values:
        rows = torch.where(each == value)[0]
        out = linear_logprobs(hidden[rows], self.weight, targets[rows], temperature=value, **options)
        assert out.entropy is not None
        found = found.index_copy(1, rows, torch.stack([out.logprobs, out.entropy]).float())
    return {"logprobs": found[0].reshape(shape), "entropy": found[1].reshape(shape)}
