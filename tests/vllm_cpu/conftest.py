"""Real vLLM on a CPU. `make test-vllm` runs this folder in a venv of its own; elsewhere its tests skip and say why."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("vllm") is None:
        reason = "vllm is not installed here: `make test-vllm` runs this in a venv of its own"
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def vllm_model_path(tmp_path_factory, tokenizer) -> Path:
    """A 2-layer Llama with a tied head, as SmolLM2 has, and heads of a size that vLLM's CPU attention knows. Its random
    weights are large enough for varied text."""
    from tiny_models import tiny_llama

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny_llama(tokenizer, max_position_embeddings=1024, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    path = tmp_path_factory.mktemp("vllm-model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
