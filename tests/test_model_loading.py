"""What cannot be loaded as it was saved is refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from model_types import tiny_model
from safetensors.torch import load_file, save_file

from trapo.config import LoraConfig, ModelConfig
from trapo.errors import TrapoError
from trapo.models import lora
from trapo.models.gguf_file import read_once
from trapo.models.loading import check_positions, find_weights, load_model


@pytest.fixture
def folder(tiny_model_path, tmp_path):
    return shutil.copytree(tiny_model_path, tmp_path / "model")


def change(folder, edit):
    path = folder / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def refusal(folder, **settings):
    with pytest.raises(TrapoError) as caught:
        load_model(ModelConfig(path=str(folder), **settings))
    message = str(caught.value)
    assert message.startswith("model.")
    assert "\n" not in message
    return message


UP = "model.layers.1.mlp.up_proj"


def test_weights_that_the_checkpoint_lacks_are_not_made_up(folder):
    change(folder, lambda w: w.pop(f"{UP}.weight"))
    assert f"{UP}.weight" in refusal(folder)
    assert "missing" in refusal(folder)


def test_several_missing_weights_are_counted(folder):
    change(folder, lambda w: [w.pop(name) for name in list(w) if "layers.1.mlp" in name])
    assert "and 2 more" in refusal(folder)


def test_a_bias_that_the_model_would_leave_out_is_refused(folder):
    change(folder, lambda w: w.update({f"{UP}.bias": torch.ones(64)}))
    assert f"{UP}.bias" in refusal(folder)


def test_layers_that_the_model_does_not_have_are_left_out(folder):
    change(folder, lambda w: w.update({"mtp.layers.0.mlp.up_proj.weight": torch.ones(2, 2)}))
    load_model(ModelConfig(path=str(folder)))


def test_weights_of_another_shape_are_refused(folder):
    change(folder, lambda w: w.update({f"{UP}.weight": torch.ones(3, 3)}))
    refusal(folder)


def test_a_tied_head_is_not_missing(folder):
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    load_model(ModelConfig(path=str(folder)))


@pytest.mark.parametrize("keep", [0, 7, 5000])
def test_a_damaged_file_is_refused(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refusal(folder)


def test_a_tokenizer_without_an_end_is_refused(folder):
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["pad_token"]
    path.write_text(json.dumps(settings))
    assert load_model(ModelConfig(path=str(folder)))[1].pad_token_id == 2
    del settings["eos_token"]
    path.write_text(json.dumps(settings))
    assert "has no end-of-sequence token" in refusal(folder)


def test_attention_is_what_the_family_has(tmp_path, tiny_model_path):
    for file in tiny_model_path.glob("token*"):
        shutil.copy(file, tmp_path)
    tiny_model("gemma2").save_pretrained(tmp_path)
    model, _ = load_model(ModelConfig(path=str(tmp_path)))
    assert model.config._attn_implementation == "eager"  # SDPA has no soft-cap
    assert "sdpa" in refusal(tmp_path, attention="sdpa").lower() or "scaled_dot" in refusal(tmp_path, attention="sdpa")
    model, _ = load_model(ModelConfig(path=str(tiny_model_path)))
    assert model.config._attn_implementation == "sdpa"


def test_a_family_without_checkpointing_is_refused(tmp_path, tiny_model_path):
    for file in tiny_model_path.glob("token*"):
        shutil.copy(file, tmp_path)
    tiny_model("ctrl").save_pretrained(tmp_path)
    assert "gradient_checkpointing" in refusal(tmp_path, gradient_checkpointing=True)


def test_learned_positions_are_a_limit_and_others_are_said(caplog):
    for kind in ("opt", "gpt2", "bloom"):
        check_positions(tiny_model(kind), 256)
    for kind in ("opt", "gpt2"):
        with pytest.raises(TrapoError, match=r"257 tokens, model type .* 256 positions"):
            check_positions(tiny_model(kind), 257)
    check_positions(tiny_model("llama"), 256)
    assert not caplog.records
    check_positions(tiny_model("llama"), 257)
    assert "257 tokens, model type llama has 256 positions" in caplog.text


@pytest.fixture
def adapter(folder, tmp_path):
    pytest.importorskip("peft", reason="pip install 'trapo-kernels[lora]'")
    model, _ = load_model(ModelConfig(path=str(folder)))
    lora.attach(model, LoraConfig(rank=2, alpha=8.0), base=str(folder), seed=0)
    lora.save_adapter(tmp_path / "adapter", model, lora.adapter_weights(model))
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "setting", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"peft_type": "LOHA"}]
)
def test_adapters_that_are_more_than_low_rank_terms_are_refused_by_name(adapter, setting):
    path = adapter / lora.CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **setting}))
    message = refusal(adapter)
    assert next(iter(setting)) in message or "LOHA" in message


def test_an_adapters_dropout_is_off(adapter):
    path = adapter / lora.CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_dropout": 0.5}))
    model, _ = load_model(ModelConfig(path=str(adapter)))
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("path", ["./typo", "../typo", "/no/typo", "~/typo", "runs/a/typo", "runs/typo/", "typo.gguf"])
def test_a_path_that_looks_local_and_is_not_there_is_looked_for_nowhere_else(path):
    assert refusal(path) == f"model.path: cannot load {path!r}: no such {'file' if '.gguf' in path else 'folder'}"


def test_an_id_of_the_hub_is_no_path():
    assert find_weights("owner/no-such_model.v2") == Path("owner/no-such_model.v2")


@pytest.mark.parametrize(("name", "times"), [("model.gguf", 1), ("model.safetensors", 2)])
def test_a_gguf_file_is_parsed_once_while_a_model_is_loaded(name, times, monkeypatch):
    gguf, made = pytest.importorskip("gguf"), []
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: made.append(path) or object())
    reader = gguf.GGUFReader
    with read_once(Path(name)):
        for _ in range(2):
            from gguf import GGUFReader  # as transformers has it

            GGUFReader(name)
    assert made == [name] * times
    assert gguf.GGUFReader is reader
