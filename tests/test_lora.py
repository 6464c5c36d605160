"""Adapters: what is trained, what is saved, and that a run with them resumes."""

import dataclasses
import signal

import pytest
import torch
from safetensors.torch import load_file
from test_learner import rollouts
from test_resume import outcome, run

import trapo_kernels as tk
from trapo.config import LoraConfig, ModelConfig, merge_config
from trapo.engines.hf import HFEngine
from trapo.engines.protocol import Request
from trapo.errors import TrapoError
from trapo.models import lora
from trapo.models.loading import load_model
from trapo.models.weights import full_weights, writer
from trapo.trainer import make_learner

peft = pytest.importorskip("peft", reason="pip install 'trapo-kernels[lora]'")
CONFIG = LoraConfig(rank=4, alpha=8.0)


@pytest.fixture
def loaded(tiny_model_path):
    model, tokenizer = load_model(ModelConfig(path=str(tiny_model_path)))
    lora.attach(model, CONFIG, base=str(tiny_model_path), seed=0)
    return model, tokenizer


def trained(model):
    make_learner(merge_config({"optim": {"lr": 1e-2}}), model, pad_id=2).update(
        rollouts(), tk.Objective.trapo(), seed=0
    )
    make_learner(merge_config({"optim": {"lr": 1e-2}}), model, pad_id=2).update(
        rollouts(), tk.Objective.trapo(), seed=0
    )
    return model


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 23)[None]).logits


def test_adapters_train_and_base_and_head_do_not(loaded, monkeypatch):
    model, _ = loaded
    wanted = []
    loss = tk.linear_policy_loss
    monkeypatch.setattr(
        tk, "linear_policy_loss", lambda h, w, *a, **k: wanted.append(w.requires_grad) or loss(h, w, *a, **k)
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained(model)
    moved = {name for name, p in model.named_parameters() if not p.equal(before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert wanted == [False] * len(wanted)  # so that d_weight is not computed
    assert model.get_output_embeddings().weight.grad is None


def test_a_new_adapter_changes_nothing_and_its_seed_decides_it(loaded, tiny_model_path):
    plain, _ = load_model(ModelConfig(path=str(tiny_model_path)))
    torch.testing.assert_close(logits(loaded[0]), logits(plain), atol=0, rtol=0)
    other, _ = load_model(ModelConfig(path=str(tiny_model_path)))
    lora.attach(other, CONFIG, base="", seed=0)
    torch.rand(3)
    assert all(a.equal(b) for a, b in zip(loaded[0].parameters(), other.parameters(), strict=True))


def test_full_weights_are_those_of_the_model_that_peft_merges(loaded):
    model = trained(loaded[0])
    weights = {name: value.clone() for name, value in full_weights(model)}
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
    names = {n.replace(".base_layer.", "."): p for n, p in model.named_parameters() if ".lora_" not in n}
    assert weights.keys() == names.keys()
    for name, value in names.items():
        torch.testing.assert_close(weights[name], value, atol=1e-6, rtol=0)


def test_a_checkpoint_is_the_adapter_alone_and_load_model_finds_its_base(loaded, tmp_path):
    model, tokenizer = loaded[0], loaded[1]
    trained(model)
    writer(model, tokenizer, final=False)(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    again, _ = load_model(ModelConfig(path=str(tmp_path)))
    assert logits(again).equal(logits(model))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_pefts_own_loader_takes_the_adapter(loaded, tiny_model_path, tmp_path):
    model, tokenizer = loaded[0], loaded[1]
    trained(model)
    writer(model, tokenizer, final=False)(tmp_path)
    plain, _ = load_model(ModelConfig(path=str(tiny_model_path)))
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(plain, str(tmp_path))), logits(model))


def test_the_final_model_is_merged_with_the_adapter_beside_it(loaded, tmp_path):
    from transformers import AutoModelForCausalLM

    model, tokenizer = loaded[0], loaded[1]
    trained(model)
    writer(model, tokenizer, final=True)(tmp_path)
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-5)
    assert lora.is_adapter(tmp_path / "adapter")


def test_the_engine_generates_with_the_adapter(loaded, tiny_model_path):
    model = loaded[0]
    for name, p in model.named_parameters():  # random weights of this size repeat one token; such an adapter does not
        if "lora_B" in name:
            torch.nn.init.normal_(p.data, std=2.0)
    request = [Request(tuple(range(3, 23)), 8)]

    def greedy(m):
        return HFEngine(m, eos_ids=[2], pad_id=2).generate(request, temperature=0.0, seed=0)[0].token_ids

    with torch.no_grad():  # as it should be: the argmax of the adapted model's logits
        expected = model(torch.arange(3, 23)[None]).logits[0, -1].argmax()
    assert greedy(model)[0] == expected
    plain, _ = load_model(ModelConfig(path=str(tiny_model_path)))
    assert greedy(model) != greedy(plain)


@pytest.mark.parametrize(("targets", "message"), [(["nothing"], "lora.targets"), (["lm_head"], "head")])
def test_targets_that_cannot_be_are_refused(targets, message, tiny_model_path):
    model, _ = load_model(ModelConfig(path=str(tiny_model_path)))
    with pytest.raises(TrapoError, match=message):
        lora.attach(model, dataclasses.replace(CONFIG, targets=targets), base="", seed=0)


def test_a_killed_run_with_adapters_continues_to_the_same_weights(tiny_model_path, tmp_path):
    options = ("lora.rank=4", "eval.every=0", "train.steps=4")
    run(tiny_model_path, tmp_path / "whole", "none", *options)
    run(tiny_model_path, tmp_path / "killed", "step:6", *options, expect=-signal.SIGKILL)
    run(tiny_model_path, tmp_path / "killed", "none", *options)
    whole, killed = outcome(tmp_path / "whole"), outcome(tmp_path / "killed")
    assert whole[0] == killed[0]
    assert all(whole[1][name].equal(killed[1][name]) for name in whole[1])
    before = load_file(tiny_model_path / "model.safetensors")
    assert any(not value.equal(before[name]) for name, value in whole[1].items())
