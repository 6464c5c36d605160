"""Tiny models of random weights, in the family of SmolLM2."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(tokenizer: Any, **sizes: int) -> LlamaForCausalLM:
    """Two layers with a tied head, for SmolLM2's tokenizer and its special tokens; the same weights in every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=2, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, **sizes,
    )  # fmt: skip
    return LlamaForCausalLM(config)
