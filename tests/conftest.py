"""Shared parts of the trainer's tests: the real tokenizer, and a tiny model with its vocabulary."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Without a GPU the Triton kernels run in Python, on CPU tensors; Triton reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Two processes with two spinning OpenMP threads each crawl on two cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


# Tests that repeat what others check: for interpreted kernels, at some 10 ms a row, they are in the slow suite.
REPEATS = {
    "test_gradcheck_in_float64",
    "test_gradcheck_of_logprobs_and_entropy_in_float64",
    "test_any_choice_of_trained_parameters",
    "test_without_old_logprobs_the_ratio_is_one_with_its_gradient",
    "test_from_logits_forms_agree_with_the_oracle",
    "test_new_terms_agree_with_the_oracle_in_every_dtype",
    "test_new_terms_under_every_head_and_a_small_budget",
    "test_gradcheck",
    "test_opcheck_of_policy_loss",
    "test_opcheck_of_token_values",
    "test_logprobs_and_entropies_are_one_graph",
}


def pytest_collection_modifyitems(items):
    interpreted = not torch.cuda.is_available()
    for item in items:
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        if interpreted and backend == "triton" and item.originalname in REPEATS:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def tokenizer():
    """SmolLM2's own, from the installed weights package."""
    from transformers import AutoTokenizer

    from trapo.model import SMOLLM2, find_weights

    weights = find_weights(SMOLLM2)
    return AutoTokenizer.from_pretrained(str(weights.parent), gguf_file=weights.name)


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory, tokenizer) -> Path:
    """A folder with a 2-layer Llama of random weights and SmolLM2's tokenizer: fast, and everything else real."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    path = tmp_path_factory.mktemp("tiny-model")
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
