"""Hugging Face models and Trainer with a fused loss: the stock loss and gradients, without the logits."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import trapo_kernels as tk

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from kernel_cases import assert_close, memory  # noqa: E402

from trapo_kernels.integrations import transformers as transformers_adapter  # noqa: E402
from trapo_kernels.integrations.transformers import fuse, linear_head, patch_causal_lm_loss  # noqa: E402

VOCAB = 101
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": {"tie_word_embeddings": False},
    "smollm2": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 8},
    "gemma2": {"final_logit_softcapping": 0.5, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"final_logit_softcapping": 0.7, "head_dim": 8, "query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 4.0, "tie_word_embeddings": False},
    "cohere": {"logit_scale": 0.3},
    "qwen3_moe": {
        "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "output_router_logits": True, "router_aux_loss_coef": 0.1,
    },
}  # fmt: skip
families = pytest.mark.parametrize("family", FAMILIES)
# One test each: their heads are linear like those above, in classes of their own.
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
ROUTED |= {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_key_value_heads": 4}
MORE_FAMILIES = {
    "mistral": {}, "phi": {}, "phi3": {}, "olmo": {}, "olmo2": {}, "smollm3": {}, "gpt_neox": {},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, "cohere2": {"logit_scale": 0.3},
    "granitemoe": {"logits_scaling": 4.0, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {**LATENT, **ROUTED},
}  # fmt: skip


def make_model(family, dtype=torch.float32, seed=0, **changes):
    torch.manual_seed(seed)
    kind = "llama" if family == "smollm2" else family
    own = {**FAMILIES, **MORE_FAMILIES}.get(family, {})
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **own, **changes})
    config._attn_implementation = config._experts_implementation = "eager"  # the others know no float64
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():  # logits of a trained model's size, so that a soft-cap bends them
        model.get_output_embeddings().weight.mul_(20)
    return model.train()


def make_batch(rows=3, length=17, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=g)
    labels = ids.masked_fill(torch.rand(rows, length, generator=g) < 0.4, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def loss_and_gradients(model, batch, **extra):
    model.zero_grad()
    out = model(**batch, **extra)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, grad in expected.items():
        assert_close(actual[name], grad, tolerance, name, floor=largest)


@pytest.mark.parametrize("count", [None, 40, torch.tensor(40)], ids=["no count", "int", "tensor"])
@families
def test_sft_has_the_loss_and_gradients_of_the_stock_model(family, count):
    model, batch = make_model(family), make_batch()
    extra = {} if count is None else {"num_items_in_batch": count}
    expected, expected_grads = loss_and_gradients(model, batch, **extra)
    patch_causal_lm_loss(model, tk.Objective.sft())
    for _ in range(2):  # the first forward also checks the head
        out, grads = loss_and_gradients(model, batch, **extra)
        assert_close(out.loss, expected.loss, 1e-5, "loss")
        assert_same_gradients(grads, expected_grads, 1e-5)
        assert out.logits is None
        assert type(out) is type(expected)


def check_fused(model, batch, **extra):
    expected, expected_grads = loss_and_gradients(model, batch, **extra)
    fuse(model)
    for _ in range(2):
        out, grads = loss_and_gradients(model, batch, **extra)
        assert_close(out.loss, expected.loss, 1e-5, "loss")
        assert_same_gradients(grads, expected_grads, 1e-5)
        assert out.logits is None


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_one_line_serves_every_family_with_a_linear_head(family):
    check_fused(make_model(family), make_batch())


def test_one_line_serves_a_multimodal_wrapper():
    image, vision = 3, {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=8, patch_size=4, **vision),
        text_config=transformers.LlamaConfig(**SMALL), image_token_index=image,
    )  # fmt: skip
    torch.manual_seed(0)
    batch = make_batch()
    batch["input_ids"].clamp_(min=image + 1)[:, 2:6] = image
    pixels = torch.randn(3, 3, 8, 8)
    check_fused(transformers.LlavaForConditionalGeneration(config).train(), batch, pixel_values=pixels)


@families
@pytest.mark.parametrize("expert", ["trsft", "dft"])
def test_other_supervised_terms_agree_with_plain_autograd_on_the_stock_logits(family, expert):
    model, batch = make_model(family, dtype=torch.float64, output_router_logits=False), make_batch()
    model.zero_grad()
    logits = model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    logp = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)[labels != -100]
    p = logp.exp()
    if expert == "dft":
        loss = (-p.detach() * logp).mean()
    else:
        loss = torch.where(p >= 0.1, -logp, 1 - math.log(0.1) - p / 0.1).mean()
    loss.backward()
    expected = {name: q.grad.clone() for name, q in model.named_parameters()}
    patched = patch_causal_lm_loss(model, tk.Objective(expert=expert, policy=None))
    out, grads = loss_and_gradients(model, batch)
    assert_close(out.loss, loss, 1e-6, "loss")  # some families widen to float32, not beyond
    assert_same_gradients(grads, expected, 1e-6)
    assert patched.metrics["tokens"] == (labels != -100).sum()


@families
def test_training_makes_no_tensor_of_the_size_of_the_logits(family):
    # A vocabulary beside which everything else is small, and a budget far below the logits.
    model, batch = make_model(family, vocab_size=20_000), make_batch(rows=4, length=64)
    logits_bytes = 4 * 64 * 20_000 * 4
    patch_causal_lm_loss(model, tk.Objective.sft())
    loss_and_gradients(model, batch)  # warm up; the first forward checks the head

    def step():
        return loss_and_gradients(model, batch)[0].loss

    with tk.budget_mb(1):
        used = memory(step)
    assert used.largest < logits_bytes / 3  # d_weight: 20,000 × 32 floats, an eighth
    stock = make_model(family, vocab_size=20_000)
    assert memory(lambda: loss_and_gradients(stock, batch)[0].loss).largest >= logits_bytes


def test_shift_labels_are_taken_as_they_are():
    model, batch = make_model("llama"), make_batch()
    expected, expected_grads = loss_and_gradients(model, batch)
    shifted = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
    patch_causal_lm_loss(model, tk.Objective.sft())
    out, grads = loss_and_gradients(model, {**batch, "shift_labels": shifted})
    assert_close(out.loss, expected.loss, 1e-5, "loss")
    assert_same_gradients(grads, expected_grads, 1e-5)


def test_evaluation_and_forwards_without_labels_are_the_stock_ones():
    model, batch = make_model("gemma2"), make_batch()
    stock = copy.deepcopy(model)
    patch_causal_lm_loss(model, tk.Objective.dft())
    unlabelled = {name: t for name, t in batch.items() if name != "labels"}
    assert torch.equal(model(**unlabelled).logits, stock(**unlabelled).logits)
    model.eval()
    stock.eval()
    assert torch.equal(model(**batch).loss, stock(**batch).loss)
    assert torch.equal(model(**batch).logits, stock(**batch).logits)
    prompt = batch["input_ids"][:1, :5]
    wanted = stock.generate(prompt, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), wanted)


def test_positional_arguments_and_tuples_work():
    model, batch = make_model("llama"), make_batch()
    expected = model(**batch).loss
    patch_causal_lm_loss(model, tk.Objective.sft())
    loss = model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"], return_dict=False)[0]
    assert_close(loss, expected, 1e-5, "loss")


def test_autocast_multiplies_in_its_dtype_and_gives_float32_gradients():
    model, batch = make_model("granite"), make_batch()
    exact, exact_grads = loss_and_gradients(copy.deepcopy(model).double(), batch)
    patch_causal_lm_loss(model, tk.Objective.sft())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, grads = loss_and_gradients(model, batch)
    assert_close(out.loss, exact.loss, 3e-2, "loss")
    assert_same_gradients(grads, exact_grads, 5e-2)
    assert all(grad.dtype == torch.float32 for grad in grads.values())


def test_a_model_that_accelerate_has_prepared_multiplies_in_its_autocast_dtype(monkeypatch):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    seen, compute = [], transformers_adapter.linear_policy_loss

    def watched(hidden, *args, **kwargs):
        seen.append(hidden.dtype)
        return compute(hidden, *args, **kwargs)

    monkeypatch.setattr(transformers_adapter, "linear_policy_loss", watched)
    model = make_model("granite")
    model.forward = accelerate.utils.convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    fuse(model)
    model(**make_batch()).loss.backward()
    assert seen == [torch.bfloat16]


def test_gradient_checkpointing_changes_nothing():
    model, batch = make_model("qwen3"), make_batch()
    patch_causal_lm_loss(model, tk.Objective.sft())
    expected, expected_grads = loss_and_gradients(model, batch)
    model.gradient_checkpointing_enable()
    out, grads = loss_and_gradients(model, batch)
    assert torch.equal(out.loss, expected.loss)
    assert_same_gradients(grads, expected_grads, 1e-6)


def test_a_frozen_decoder_still_trains_its_head():
    model, batch = make_model("llama"), make_batch()
    model.model.requires_grad_(False)
    _, expected = loss_and_gradients(model, batch)
    patch_causal_lm_loss(model, tk.Objective.sft())
    _, grads = loss_and_gradients(model, batch)
    assert list(grads) == ["lm_head.weight"]
    assert_same_gradients(grads, expected, 1e-5)


def test_no_labels_at_all_give_zero_and_not_nan():
    model, batch = make_model("llama"), make_batch()
    batch["labels"].fill_(-100)
    patch_causal_lm_loss(model, tk.Objective.sft())
    for count in (None, 0, torch.tensor(0)):
        out, grads = loss_and_gradients(model, batch, num_items_in_batch=count)
        assert out.loss == 0
        assert not any(grad.any() for grad in grads.values())


def test_patching_again_replaces_and_remove_restores():
    model, batch = make_model("llama"), make_batch()
    expected = model(**batch).loss
    patch_causal_lm_loss(model, tk.Objective.dft())
    patched = patch_causal_lm_loss(model, tk.Objective.sft())
    assert_close(model(**batch).loss, expected, 1e-5, "loss")
    patched.remove()
    out = model(**batch)
    assert torch.equal(out.loss, expected)
    assert out.logits is not None
    assert not model.model._forward_hooks


def test_a_head_that_does_something_else_is_refused_before_it_is_trained():
    model, batch = make_model("granite"), make_batch()
    stock = model.forward

    def halved(*args, logits_to_keep=0, **kwargs):  # as a family whose head divides by something we do not know
        out = stock(*args, logits_to_keep=logits_to_keep, **kwargs)
        return type(out)(**{**out, "logits": out.logits / 2})

    model.forward = halved
    patch_causal_lm_loss(model, tk.Objective.sft())
    with pytest.raises(ValueError, match="PatchedLoss: model must have a head with bias, logit scale and soft-cap"):
        model(**batch)


def test_what_cannot_be_patched_is_refused_in_one_line():
    model = make_model("llama")
    with pytest.raises(ValueError, match=r"objective must have an expert term alone.*got policy='clip'"):
        patch_causal_lm_loss(model, tk.Objective.trapo())
    with pytest.raises(ValueError, match="got expert='luffy'"):
        patch_causal_lm_loss(model, tk.Objective(expert="luffy", policy=None))
    with pytest.raises(TypeError, match="objective must be an Objective; got str"):
        patch_causal_lm_loss(model, "sft")
    model.set_output_embeddings(torch.nn.Sequential(torch.nn.Linear(32, VOCAB)))
    with pytest.raises(TypeError, match=r"the output head of LlamaForCausalLM must be nn.Linear; got Sequential"):
        patch_causal_lm_loss(model, tk.Objective.sft())
    assert "forward" not in model.__dict__


def train(model, folder, steps=4, **arguments):
    """Losses and final weights of a few real Trainer steps: variable lengths, accumulation over two micro-batches."""
    g = torch.Generator().manual_seed(5)
    data = []
    for _ in range(40):
        length = int(torch.randint(4, 20, (), generator=g))
        ids = torch.randint(3, VOCAB, (length,), generator=g)
        data.append({"input_ids": ids.tolist(), "labels": [-100, -100, *ids.tolist()[2:]]})

    def collate(rows):
        longest = max(len(row["input_ids"]) for row in rows)
        pad = {"input_ids": 0, "labels": -100}
        out = {k: torch.tensor([r[k] + [v] * (longest - len(r[k])) for r in rows]) for k, v in pad.items()}
        return {**out, "attention_mask": (out["input_ids"] != 0).long()}

    settings = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
        learning_rate=1e-2, lr_scheduler_type="constant", report_to=[], save_strategy="no", use_cpu=True, seed=3,
        disable_tqdm=True, **arguments,
    )  # fmt: skip
    trainer = transformers.Trainer(model, settings, train_dataset=data, data_collator=collate, eval_dataset=data[:4])
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, trainer


@pytest.mark.parametrize("family", ["smollm2", "qwen3", "gemma2", "granite"])
def test_trainer_steps_equal_the_stock_ones(family, tmp_path):
    stock, fused = make_model(family), make_model(family)
    patch_causal_lm_loss(fused, tk.Objective.sft())
    expected, stock_trainer = train(stock, tmp_path / "stock")
    actual, trainer = train(fused, tmp_path / "fused")
    assert actual == pytest.approx(expected, rel=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(stock_trainer.evaluate()["eval_loss"], rel=1e-3)
    for (name, a), b in zip(fused.named_parameters(), stock.parameters(), strict=True):
        # Adam's first steps are a learning rate long whatever the gradient; where that is all rounding, so is the sign.
        assert (a - b).abs().float().mean() < 1e-4, name


def test_trainer_learns_with_trsft(tmp_path):
    model, batch = make_model("smollm2"), make_batch()
    patched = patch_causal_lm_loss(model, tk.Objective(expert="trsft", alpha=1e-3, policy=None))
    before = model(**batch).loss
    _, trainer = train(model, tmp_path, steps=12)
    assert model(**batch).loss < before - 0.05
    assert patched.metrics["expert_tokens"] > 0
    trainer.save_model(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.slow
def test_two_ranks_of_fsdp2_have_the_gradients_of_one():
    script = Path(__file__).with_name("fsdp_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29534"]
    subprocess.run([*command, str(script)], check=True, timeout=400)


def test_lora_on_the_body_trains_and_on_the_head_is_refused():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, batch = make_model("llama"), make_batch()
    stock = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    patch_causal_lm_loss(model, tk.Objective.sft())
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.load_state_dict(stock.state_dict())
    expected, expected_grads = loss_and_gradients(stock, batch)
    out, grads = loss_and_gradients(adapted, batch)
    assert_close(out.loss, expected.loss, 1e-5, "loss")
    assert_same_gradients(grads, expected_grads, 1e-5)
    on_the_head = peft.get_peft_model(make_model("llama"), peft.LoraConfig(target_modules=["lm_head"])).get_base_model()
    with pytest.raises(TypeError, match=r"must be nn.Linear; got Linear"):
        patch_causal_lm_loss(on_the_head, tk.Objective.sft())


@pytest.mark.slow
def test_a_compiled_model_gives_the_same():
    model, batch = make_model("qwen3"), make_batch()
    patch_causal_lm_loss(model, tk.Objective.sft())
    expected, expected_grads = loss_and_gradients(model, batch)
    compiled = torch.compile(model, backend="eager")  # dynamo's half: no code is generated
    for _ in range(2):
        model.zero_grad()
        loss = compiled(**batch).loss
        loss.backward()
        assert_close(loss, expected.loss, 1e-5, "loss")
    assert_same_gradients({n: p.grad for n, p in model.named_parameters()}, expected_grads, 1e-5)


def test_linear_head_knows_the_transforms():
    assert linear_head(make_model("granite")).logit_scale == 0.25
    assert linear_head(make_model("cohere")).logit_scale == 0.3
    assert linear_head(make_model("gemma2")).softcap == 0.5
    assert linear_head(make_model("llama")).options == {"bias": None, "softcap": None, "logit_scale": 1.0}
