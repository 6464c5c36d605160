"""`fuse(trainer)` beside TRL's own trainers: every number that they log, over real steps."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from kernel_cases import assert_close

trl = pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("datasets", reason="datasets is not installed")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl_trainers import TRAINERS, letters, logs_of, make_trainer

    from trapo_kernels import foreseen
    from trapo_kernels.integrations.trl import FusedGRPOTrainer, FusedHead, chunked_divergence_loss, fuse
    from trapo_kernels.integrations.trl.head import stock_settings

pytestmark = pytest.mark.filterwarnings("ignore")
ONE_PASS = {"sft", "dft", "grpo", "distillation"}


def slow_unless(quick, names):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def teacher(tiny_model_path, tmp_path_factory):
    """The tiny model with other weights: a teacher that differs from its student."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, model = tmp_path_factory.mktemp("teacher"), AutoModelForCausalLM.from_pretrained(tiny_model_path)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(path)
    return path


def assert_same_logs(ours, stock, rel=2e-4):
    """Every logged number but times. Rewards and divergences are differences of large numbers: to 1e-5 of those."""
    assert len(ours) == len(stock)
    for a, b in zip(ours, stock, strict=True):
        assert a.keys() == b.keys()
        for key in b:
            if "time" not in key:
                assert a[key] == pytest.approx(b[key], rel=rel, abs=max(1e-5, rel / 20), nan_ok=True), key


def compare(name, path, folder, steps, rel=2e-4, **settings):
    stock = make_trainer(name, path, folder, max_steps=steps, **settings)
    expected = logs_of(stock)
    trainer = make_trainer(name, path, folder, max_steps=steps, **settings)
    fused = fuse(trainer)
    assert_same_logs(logs_of(trainer), expected, rel)
    return fused


@pytest.mark.parametrize("name", slow_unless({"sft", "dpo", "grpo", "distillation"}, TRAINERS))
def test_steps_log_what_the_stock_trainer_logs(name, tiny_model_path, teacher, tmp_path):
    fused = compare(name, tiny_model_path, tmp_path, 2, teacher=teacher)
    assert (fused.path == "one pass") == (name in ONE_PASS)  # and stayed so


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_twenty_steps_log_what_the_stock_trainer_logs(name, tiny_model_path, teacher, tmp_path):
    compare(name, tiny_model_path, tmp_path, 20, teacher=teacher)


VARIANTS = {
    "dpo, WPO weights": ("dpo", {"use_weighting": True}),
    "dpo, checkpointing": ("dpo", {"gradient_checkpointing": True}),
    "grpo, sequence ratios": ("grpo", {"importance_sampling_level": "sequence", "loss_type": "grpo"}),
    "grpo, two updates a batch": ("grpo", {"num_iterations": 2, "loss_type": "bnpo", "epsilon_high": 0.28}),
    "grpo, entropy bonus": ("grpo", {"entropy_coef": 0.05, "loss_type": "grpo"}),
    "distillation, reverse": ("distillation", {"beta": 1.0}),
    "distillation, jsd": ("distillation", {"beta": 0.3}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_settings_of_the_trainers_are_theirs(variant, tiny_model_path, teacher, tmp_path):
    name, settings = VARIANTS[variant]
    compare(name, tiny_model_path, tmp_path, 4, teacher=teacher, **settings)


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_bf16_autocast_agrees_to_its_rounding(name, tiny_model_path, tmp_path):
    fused = compare(name, tiny_model_path, tmp_path, 2, rel=2e-2, bf16=True)
    assert (fused.path == "one pass") == (name == "sft")


@pytest.mark.parametrize("name", slow_unless({"dpo"}, ["sft", "dpo"]))
def test_adapters_are_trained_and_their_base_is_the_reference(name, tiny_model_path, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=True)
    compare(name, tiny_model_path, tmp_path, 2, peft=config, learning_rate=1e-2)


def one_batch(trainer):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def gradients(trainer, batch, loss_of=None):
    trainer.model.zero_grad()
    if loss_of is None:
        trainer.compute_loss(trainer.model, dict(batch)).backward()
    else:
        loss_of(trainer.model(**batch, fused_lm_head=True)).backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


def test_one_pass_makes_its_gradients_in_the_forward(tiny_model_path, tmp_path, monkeypatch):
    trainer = make_trainer("sft", tiny_model_path, tmp_path)
    expected, batch = gradients(trainer, one_batch(trainer)), one_batch(trainer)
    fuse(trainer)
    monkeypatch.setattr(foreseen, "_recomputed", lambda *_: pytest.fail("recomputed"))
    for name, grad in gradients(trainer, batch).items():
        assert_close(grad, expected[name], 1e-5, name, floor=float(expected[name].abs().max()))


def test_another_loss_of_the_log_probabilities_has_its_own_gradients(tiny_model_path, tmp_path):
    def loss_of(outputs):  # not what SFT makes of them: weights by position, and the entropy
        weights = torch.linspace(0.1, 1, outputs.log_probs.shape[1])
        return -(outputs.log_probs * weights).sum() + 0.1 * outputs.entropy.sum()

    trainer = make_trainer("sft", tiny_model_path, tmp_path)
    batch = one_batch(trainer)
    expected = gradients(trainer, batch, loss_of)
    fused = fuse(trainer)
    for _ in range(2):  # the first is foreseen wrongly, the second not at all
        for name, grad in gradients(trainer, batch, loss_of).items():
            assert_close(grad, expected[name], 1e-5, name, floor=float(expected[name].abs().max()))
        assert fused.path == "recomputed: SFTTrainer made another loss of the log-probabilities"


def test_remove_gives_the_trainer_its_own_head_back(tiny_model_path, tmp_path):
    trainer = make_trainer("grpo", tiny_model_path, tmp_path)
    own = trainer.model.__dict__["forward"]
    fused = fuse(trainer)
    assert fuse(trainer) is not fused  # again: in the place of the first
    assert trainer.model.__dict__["forward"].patched is trainer._trapo_fused.heads[0]
    trainer._trapo_fused.remove()
    assert trainer.model.__dict__["forward"] is own
    assert not trainer.model.model._forward_hooks
    assert not {"_compute_loss", "_trapo_fused"} & set(vars(trainer))


def test_what_cannot_be_fused_is_refused_in_one_line(tiny_model_path, tmp_path):
    with pytest.raises(TypeError, match=r"trainer must be TRL's SFT, .* or DistillationTrainer.*; got object"):
        fuse(object())
    config = trl.GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, num_generations=4, per_device_train_batch_size=4)
    rows = [{"prompt": "a"}] * 4
    ours = FusedGRPOTrainer(str(tiny_model_path), reward_funcs=letters, args=config, train_dataset=_dataset(rows))
    with pytest.raises(TypeError, match=r"not fused already; got FusedGRPOTrainer"):
        fuse(ours)
    smoothed = make_trainer("sft", tiny_model_path, tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"trainer must have no label_smoother, which needs the logits; got SFTTrain"):
        fuse(smoothed)


def _dataset(rows):
    from datasets import Dataset

    return Dataset.from_list(rows)


EVERY = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.mark.parametrize("shifted", [False, True], ids=["labels", "shift_labels"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "qwen3_moe"])
def test_every_field_of_the_head_is_trls(family, shifted):
    from test_transformers import make_batch, make_model
    from trl.trainer.utils import add_fused_lm_head

    model, batch = make_model(family), make_batch()
    if family == "llama":  # logits that are equal in pairs: the first of the largest is the likeliest
        with torch.no_grad():
            model.lm_head.weight[51:] = model.lm_head.weight[:50]
            likeliest = model(batch["input_ids"]).logits.argmax(-1)
        batch["labels"][:, 1::4], batch["labels"][:, 3::4] = (
            likeliest[:, :-1:4],
            (likeliest[:, 2::4] + 51).clamp(max=100),
        )
    if shifted:
        batch["shift_labels"] = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
    add_fused_lm_head(model, temperature=0.7, outputs=EVERY)
    found = []
    for ours in (False, True):
        if ours:
            settings = stock_settings(model)
            assert settings == {"temperature": 0.7, "cast_lm_head_to_fp32": False, "outputs": EVERY}
            FusedHead(model, **settings)
        model.zero_grad()
        out = model(**batch, fused_lm_head=True, num_items_in_batch=20)
        (out.loss + (out.entropy * torch.arange(out.entropy.shape[1])).sum()).backward()
        found.append((out, {name: p.grad.clone() for name, p in model.named_parameters()}))
    (stock, expected), (ours, grads) = found
    assert ours.keys() == stock.keys()
    for name in stock:
        torch.testing.assert_close(
            ours[name], stock[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    if family == "llama":
        assert 0 < stock.is_top1.sum() < stock.label_mask.sum()
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        assert_close(grads[name], grad, 1e-5, name, floor=largest)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_divergence_is_trls_with_its_gradients(beta):
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    student = [normal(2, 5, 8).requires_grad_(), normal(37, 8).requires_grad_(), normal(37).requires_grad_()]
    teacher = [normal(2, 5, 6), normal(37, 6)]
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]])
    options = {
        "num_items_in_batch": torch.tensor(9), "student_lm_head_bias": student[2], "student_logit_scale": 0.5,
        "student_final_logit_softcapping": 3.0, "teacher_logit_scale": 0.7, "temperature": 0.9,
    }  # fmt: skip
    found = []
    for loss_of in (_chunked_divergence_loss, chunked_divergence_loss):
        loss, entropy, count = loss_of(student[0], teacher[0], student[1], teacher[1], mask, beta, **options)
        found.append((loss, entropy, count, *torch.autograd.grad(loss, student)))
    for ours, stock in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_ranks_of_fsdp2_with_a_sharded_head_have_the_gradients_of_one(tiny_model_path):
    script = Path(__file__).with_name("trl_fsdp_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29537"]
    subprocess.run([*command, str(script), str(tiny_model_path)], check=True, timeout=400)
