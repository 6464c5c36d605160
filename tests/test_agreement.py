"""A model that does not do what the trainer takes for granted is refused in one line, or done in a slower way."""

import contextlib
import logging

import pytest
import torch
from model_types import LONG, learner, off, own_logprobs, rollout, tiny_model
from torch import nn

import trapo.learner
from trapo.batching.batch import one_copy
from trapo.config import LoraConfig
from trapo.engines.hf import HFEngine
from trapo.engines.protocol import Request
from trapo.engines.ways import WAYS
from trapo.errors import TrapoError
from trapo.models import agreement, lora, weights
from trapo.models.checkpointing import enable_checkpointing
from trapo.models.loading import head_of
from trapo_kernels.integrations.transformers import decoder_of


@contextlib.contextmanager
def logits_changed_by(model, change):
    stock = model.forward

    def changed(**kwargs):
        out = stock(**kwargs)
        out.logits = change(out.logits)
        return out

    model.forward = changed
    yield
    del model.forward


@pytest.mark.parametrize("change", [lambda z: 3 * z, lambda z: z.sinh(), lambda z: z.roll(1, -1)])
def test_logits_that_are_not_the_heads_are_refused_with_type_and_number(change):
    model = tiny_model("llama")
    with (
        logits_changed_by(model, change),
        pytest.raises(TrapoError, match=r"model type llama .* cannot be trained: its logits .* \d"),
    ):
        learner(model)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("hyperclovax", {"logits_scaling": 0.125}),
        ("granite", {"logits_scaling": 8.0}),
        ("falcon_h1", {"lm_head_multiplier": 0.02}),
        ("cohere", {"logit_scale": 0.0625}),
        ("recurrent_gemma", {"logits_soft_cap": 1.0}),
        ("gemma3_text", {"final_logit_softcapping": 1.0}),
    ],
)
def test_the_head_knows_its_familys_transform_without_being_measured(kind, settings):
    model = tiny_model(kind, **settings)
    ids = torch.tensor([LONG[0]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        found = head_of(model).logits(decoder_of(model)(input_ids=ids).last_hidden_state)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("change", [lambda z, c: z / c, lambda z, c: z * c, lambda z, c: c * torch.tanh(z / c)])
def test_a_number_of_the_configuration_that_explains_the_logits_is_found(change):
    """As a family that comes tomorrow and names it as nobody did before."""
    model = tiny_model("llama")
    model.config.new_logit_cap = 0.7
    with logits_changed_by(model, lambda z: change(z, 0.7)):
        made = learner(model)
        found = made.own_logprobs([rollout(ids) for ids in LONG])
        assert off(found, [own_logprobs(model, ids) for ids in LONG]) < 1e-4


def test_sixteen_bit_weights_agree_too():
    for kind in ("llama", "gemma2", "qwen3_moe"):
        model = tiny_model(kind).to(torch.bfloat16)
        agreement.check_model(model, "float32")
        with logits_changed_by(model, lambda z: 1.2 * z), pytest.raises(TrapoError, match="its logits"):
            agreement.check_model(model, "float32")


@pytest.mark.parametrize("kind", ["xlm", "cpmant", "bert-generation"])
def test_models_whose_tokens_see_later_ones_are_refused(kind):
    """XLM leaves out padding by itself, and so would seem causal to who looks at padding alone."""
    with pytest.raises(TrapoError, match="accepted: causal language models"):
        learner(tiny_model(kind))


def test_packing_that_lets_sequences_see_each_other_becomes_padding_and_is_said_once(caplog):
    caplog.set_level(logging.WARNING, "trapo")
    made = learner(tiny_model("opt"), "train.packing=always")
    assert not made.packed
    (line,) = [record.getMessage() for record in caplog.records if record.name == "trapo"]
    assert "train.packing: model type opt" in line
    assert learner(tiny_model("llama"), "train.packing=always").packed


def test_packed_layers_are_told_where_sequences_begin_in_every_way_they_take(monkeypatch):
    model = tiny_model("llama")
    seen = {}
    forward = type(decoder_of(model)).forward

    def spy(self, *args, **kwargs):
        seen.update(kwargs)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(decoder_of(model)), "forward", spy)
    made = learner(model, "train.packing=always", "train.micro_batch_tokens=1000")
    made.own_logprobs([rollout(ids) for ids in LONG])
    assert seen["cu_seq_lens_q"].tolist() == [0, *torch.tensor([32, 20, 6]).cumsum(0).tolist()]
    assert seen["max_length_k"] == 32
    assert seen["seq_idx"].dtype == torch.int32
    assert seen["position_ids"].shape == seen["seq_idx"].shape == (1, 58)


def test_a_dropout_that_checkpointing_would_turn_on_is_refused(monkeypatch):
    model = tiny_model("opt", dropout=0.5)
    enable_checkpointing(model)
    monkeypatch.setattr(trapo.learner, "prepare_checkpointing", lambda model: model.train())
    with pytest.raises(TrapoError, match=r"model\.gradient_checkpointing: .* model type opt"):
        learner(model, "model.gradient_checkpointing=true")


@pytest.mark.parametrize("kind", ["opt", "gpt_bigcode", "seed_oss", "falcon", "persimmon", "xglm", "gpt2"])
def test_checkpointing_is_on_and_dropout_is_off(kind):
    rates = ("dropout", "attention_dropout", "hidden_dropout", "residual_dropout", "resid_pdrop", "layerdrop")
    model = tiny_model(kind, **{name: 0.5 for name in rates if hasattr(tiny_model(kind).config, name)})
    enable_checkpointing(model)
    learner(model, "model.gradient_checkpointing=true")
    ids, calls = torch.tensor([LONG[1]]), []
    for layer in model.modules():
        if getattr(layer, "gradient_checkpointing", False):
            run = layer._gradient_checkpointing_func
            layer._gradient_checkpointing_func = lambda *a, run=run, **k: calls.append(1) or run(*a, **k)
    first, second = (decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state for _ in range(2))
    assert calls
    assert first.equal(second)


def test_generation_is_in_evaluation_mode_and_leaves_checkpointed_layers_as_they_were():
    model = tiny_model("llama")
    enable_checkpointing(model)
    learner(model, "model.gradient_checkpointing=true")
    before = [m.training for m in model.modules()]
    assert any(before)
    HFEngine(model, eos_ids=[], pad_id=1).generate([Request((9, 10), 2)], temperature=0.0, seed=0)
    assert [m.training for m in model.modules()] == before


def test_hybrids_share_prompts_and_a_cache_that_cannot_be_trusted_is_not_used(monkeypatch):
    engine = HFEngine(tiny_model("falcon_h1"), eos_ids=[], pad_id=1)
    engine.generate([Request((9, 10), 2)], temperature=0.0, seed=0)
    assert engine.way == WAYS[1]
    # As before: of two caches in a layer, one is selected from.
    monkeypatch.setattr(
        "trapo.engines.transformers_loop.select_rows", lambda cache, rows: cache.batch_select_indices(rows)
    )
    engine = HFEngine(tiny_model("falcon_h1"), eos_ids=[], pad_id=1)
    engine.generate([Request((9, 10), 2)], temperature=0.0, seed=0)
    assert engine.way == WAYS[2]


def adapted(kind, **settings):
    model = tiny_model(kind, **settings)
    lora.attach(model, LoraConfig(rank=2, alpha=8.0), base="", seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter.data, std=0.3)
    return model


def test_a_merge_that_is_another_model_is_refused_before_anything_is_written(monkeypatch):
    model = adapted("gpt2")
    list(weights.full_weights(model))
    right = lora.effective
    monkeypatch.setattr(lora, "effective", lambda layer, weight: weight + 2 * (right(layer, weight) - weight))
    with pytest.raises(TrapoError, match=r"lora: with its adapters merged, .* model type gpt2 .* by"):
        next(weights.full_weights(model))
    with pytest.raises(TrapoError, match="lora: with its adapters merged"):  # and before anything is trained
        adapted("llama")


def test_an_adapter_that_the_model_reads_past_is_seen():
    """Jamba takes the bias of dt_proj and multiplies by its weight: an adapter there is in the merged model alone."""
    model = tiny_model("jamba")
    with pytest.raises(TrapoError, match="adapters merged"):
        lora.attach(model, LoraConfig(rank=2, alpha=8.0, targets=["dt_proj"]), base="", seed=0)


def test_an_adapter_goes_on_every_layer_that_is_a_product_and_on_no_router():
    """Falcon's linear layers and Llama 4's routers are both classes of their own derived from nn.Linear."""
    falcon, llama4 = (
        [n for n, _ in adapted(k).named_modules() if n.endswith("lora_A")] for k in ("falcon", "llama4_text")
    )
    assert any("query_key_value" in name for name in falcon)
    assert llama4
    assert not any("router" in name for name in llama4)


def test_layers_that_share_a_weight_get_no_adapter():
    assert adapted("zamba")
    with pytest.raises(TrapoError, match="share their weight"):
        lora.attach(tiny_model("zamba"), LoraConfig(rank=2, targets=["q_proj"]), base="", seed=0)


def test_tensors_of_several_dtypes_go_over_in_one_copy():
    given = {
        "flags": torch.tensor([[True, False, True]]),
        "ids": torch.arange(5)[None],
        "values": torch.randn(3, 1),
        "starts": torch.tensor([0, 3], dtype=torch.int32),
        "none": torch.empty(0),
    }
    found = one_copy(given, torch.device("cpu"))
    assert found.keys() == given.keys()
    for name, value in given.items():
        assert found[name].dtype == value.dtype
        assert found[name].equal(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_refused_by_name(value):
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = value
    with pytest.raises(TrapoError, match=r"NaN or infinite \(the first: model\.layers\.1\.mlp\.up_proj\.weight\)$"):
        learner(model)
