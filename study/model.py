"""The study's transformer: a Llama of 0.4 M parameters over characters."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from study.task import EOS, PAD, VOCABULARY


def new_model(seed: int, *, hidden: int = 96, layers: int = 4) -> LlamaForCausalLM:
    """Returns fresh weights. Heads are 24 wide, two queries share a key."""
    heads = hidden // 24
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 2, 1),
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=hidden**-0.5,  # the default, 0.02, learns much slower at this width
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        attn_implementation="sdpa",
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)
