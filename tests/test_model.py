import pytest
import torch
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

import trapo_kernels as tk
from trapo.config import ModelConfig
from trapo.errors import TrapoError
from trapo.models.loading import eos_ids, head_of, load_model

SIZES = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
FAMILIES = {
    "gemma2, soft-cap": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=3.0)),
    "granite, divided logits": lambda: GraniteForCausalLM(
        GraniteConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logits_scaling=4.0)
    ),
    "cohere2, scaled logits": lambda: Cohere2ForCausalLM(
        Cohere2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logit_scale=0.3)
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_logprobs_are_those_of_the_models_own_logits(family):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    ids = torch.randint(1, 97, (2, 6))
    with torch.no_grad():
        expected = model(ids).logits.float().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
        hidden = model.get_decoder()(ids).last_hidden_state[:, :-1]
    head = head_of(model)
    got = tk.linear_logprobs(
        hidden, head.weight, ids[:, 1:], bias=head.bias, softcap=head.softcap, logit_scale=head.logit_scale
    )
    torch.testing.assert_close(got.logprobs, expected, atol=1e-5, rtol=1e-5)


def test_freezing_takes_the_named_parameters_out_and_refuses_the_rest(tiny_model_path):
    model, _ = load_model(ModelConfig(path=str(tiny_model_path), freeze="embed_tokens"))
    assert not model.get_output_embeddings().weight.requires_grad  # tied
    assert any(p.requires_grad for p in model.parameters())
    for pattern, message in [("nothing", "matches none"), (".", "matches every"), ("(", "not a regular expression")]:
        with pytest.raises(TrapoError, match=message):
            load_model(ModelConfig(path=str(tiny_model_path), freeze=pattern))


def test_the_tokenizers_end_token_comes_first(tiny_model_path):
    model, tokenizer = load_model(ModelConfig(path=str(tiny_model_path)))
    model.generation_config.eos_token_id = [7, tokenizer.eos_token_id]
    assert eos_ids(model, tokenizer) == [tokenizer.eos_token_id, 7]


@pytest.mark.slow  # reading it takes a quarter of a minute; test_cli.py looks at a model that was trained from it
def test_smollm2_comes_from_the_installed_package_with_its_own_chat_template():
    model, tokenizer = load_model(ModelConfig())
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert "<|im_start|>" in tokenizer.chat_template
    assert getattr(model.config, "quantization_config", None) is None
