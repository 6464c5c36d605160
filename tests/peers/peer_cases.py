"""Shared parts: comparing with the peers' tolerances, and skipping with the reason where a peer is not installed."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import pytest
import torch
from torch import Tensor


def peer(module: str) -> ModuleType:
    """The peer's module, or a skip that says what is missing."""
    pytest.importorskip(module.split(".")[0], reason=f"{module.split('.')[0]} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(module)
        except ImportError as error:
            pytest.skip(f"{module} cannot be imported: {error}", allow_module_level=True)


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    """Fresh copies that collect gradients."""
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def close(actual: Tensor, expected: Tensor, atol: float, rtol: float) -> None:
    torch.testing.assert_close(actual.detach().float(), expected.detach().float(), atol=atol, rtol=rtol)


def logits_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """All logits [..., V] in float32."""
    z = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    z = z.float() * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def logprobs_and_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log π(y) [...], H [...]."""
    log_pi = logits.log_softmax(-1)
    return log_pi.gather(-1, targets[..., None]).squeeze(-1), -(log_pi.exp() * log_pi).sum(-1)
