"""Random Llamas for the stages. On a CPU, which only shows that a stage works, all of them have one tiny size."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["random_llama"]

_ON_A_CPU = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def random_llama(device: str, on_a_gpu: dict[str, int], **options: Any) -> LlamaForCausalLM:
    """Returns a Llama with a tied head, of the given sizes on a GPU and of tiny ones elsewhere, made on the current
    device."""
    sizes = on_a_gpu if device == "cuda" else _ON_A_CPU
    return LlamaForCausalLM(LlamaConfig(**sizes, **options, tie_word_embeddings=True))
