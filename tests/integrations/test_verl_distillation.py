"""Divergences from a teacher's top-k with its tail, in verl's registry of distillation losses."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed here: `make test-verl` runs this in a venv of its own")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from tensordict import TensorDict
    from verl.trainer.distillation import losses
    from verl.workers.config import DistillationLossConfig

    from trapo_kernels.integrations import verl as _registers
    from trapo_kernels.integrations import verl_distillation as ours

FORWARD, REVERSE = ours.MODES
V, K = 37, 5


def make(tokens=11, seed=0, spread=2.0):
    g = torch.Generator().manual_seed(seed)
    student = (spread * torch.randn(1, tokens, V, generator=g, dtype=torch.float64)).requires_grad_()
    teacher = (spread * torch.randn(1, tokens, V, generator=g, dtype=torch.float64)).log_softmax(-1)
    logprobs, ids = teacher.topk(K, -1)
    return student, logprobs, ids


def with_tail(log_pi, ids):
    """The distribution over k tokens and all others together [..., K + 1]."""
    of_ids = log_pi.exp().gather(-1, ids)
    return torch.cat([of_ids, 1 - of_ids.sum(-1, keepdim=True)], -1)


def plain(student, logprobs, ids, kind):
    q = with_tail(student.log_softmax(-1), ids)
    p = torch.cat([logprobs.exp(), 1 - logprobs.exp().sum(-1, keepdim=True)], -1)
    a, b = (p, q) if kind == FORWARD else (q, p)
    return (a * (a.log() - b.log())).sum(-1)


@pytest.mark.parametrize("block", [2**26, 4 * V * 3], ids=["one block", "blocks"])
@pytest.mark.parametrize("kind", ours.MODES)
def test_the_divergence_is_that_of_k_plus_one_classes(kind, block, monkeypatch):
    monkeypatch.setattr(ours, "BLOCK_BYTES", block)
    student, logprobs, ids = make()
    expected = plain(student, logprobs, ids, kind)
    weights = torch.linspace(0.1, 1, 11)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), student)
    logits = student.detach().float().requires_grad_()
    found = ours.topk_tail_divergence(logits, logprobs.float(), ids, kind)
    (grad,) = torch.autograd.grad((found["distillation_losses"] * weights).sum(), logits)
    torch.testing.assert_close(found["distillation_losses"].double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-4, atol=1e-6)
    assert (found["distillation_losses"] >= 0).all()
    torch.testing.assert_close(found["teacher_mass"].double(), logprobs.exp().sum(-1), rtol=1e-5, atol=1e-6)
    mass = student.log_softmax(-1).exp().gather(-1, ids).sum(-1)
    torch.testing.assert_close(found["student_mass"].double(), mass, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ours.MODES)
def test_a_teacher_without_a_tail_and_a_student_without_one_give_numbers(kind):
    student, logprobs, ids = make(spread=60.0)  # rounding leaves the k tokens a mass of 1, or of more
    logits = student.detach().float().requires_grad_()
    found = ours.topk_tail_divergence(logits, logprobs.float(), ids, kind)
    (grad,) = torch.autograd.grad(found["distillation_losses"].sum(), logits)
    assert found["distillation_losses"].isfinite().all()
    assert grad.isfinite().all()


def call(mode, strategy="fsdp", clamp=None):
    student, logprobs, ids = make()
    lengths = torch.tensor([0, 4, 11])
    data = TensorDict(
        {
            "teacher_logprobs": torch.nested.nested_tensor_from_jagged(logprobs[0].float(), lengths),
            "teacher_ids": torch.nested.nested_tensor_from_jagged(ids[0], lengths),
        },
        batch_size=[2],
    )
    config = SimpleNamespace(distillation_loss=DistillationLossConfig(loss_mode=mode, log_prob_min_clamp=clamp))
    found = losses.distillation_ppo_loss(  # as its engines call the logits processor
        config=SimpleNamespace(strategy=strategy), distillation_config=config, student_logits=student.float(),
        data=data, data_format="thd",
    )  # fmt: skip
    return found, plain(student, logprobs, ids, mode) if mode in ours.MODES else None


@pytest.mark.parametrize("kind", ours.MODES)
def test_verls_logits_processor_computes_the_mode_that_was_chosen(kind):
    found, expected = call(kind)
    torch.testing.assert_close(found["distillation_losses"].double(), expected, rtol=1e-4, atol=1e-6)
    assert losses.get_distillation_loss_settings(kind).use_topk
    assert losses.get_distillation_loss_fn(kind) is losses.compute_forward_kl_topk
    assert _registers.FusedLinearForPPO


def test_verls_own_mode_stays_its_own():
    found, _ = call("forward_kl_topk")
    student, logprobs, ids = make()
    log_q = student.float().log_softmax(-1).gather(-1, ids)
    expected = (logprobs.float().exp() * (logprobs.float() - log_q)).sum(-1)
    torch.testing.assert_close(found["distillation_losses"], expected)


def test_what_it_cannot_do_is_refused_in_one_line():
    with pytest.raises(NotImplementedError, match=r"forward_kl_topk_tail: actor.strategy must be fsdp, .*'megatron'"):
        call(FORWARD, strategy="megatron")
    with pytest.raises(ValueError, match=r"reverse_kl_topk_tail: log_prob_min_clamp must be null"):
        call(REVERSE, clamp=-10.0)
