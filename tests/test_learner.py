"""One update on a tiny model: what must change it and what must not."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import trapo_kernels as tk
from trapo.config import merge_config
from trapo.data.encode import EncodedProblem
from trapo.data.problem import Problem
from trapo.errors import TrapoError
from trapo.models.checkpointing import enable_checkpointing
from trapo.models.optimizer import clip_gradients, lr_factor
from trapo.report.metrics import ProbabilityHistogram, merged_metrics, on_host
from trapo.rollouts import Rollout
from trapo.trainer import make_learner


@pytest.fixture(scope="module")
def model(tiny_model_path):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)


def rollouts():
    """Two prompts: one with mixed rewards and a guided rollout, one whose rollouts were all right."""
    generator = torch.Generator().manual_seed(1)

    def ids(n):
        return tuple(torch.randint(3, 40000, (n,), generator=generator).tolist())

    out = []
    for group, advantages in enumerate([(0.5, -0.5, 0.25, -0.25), (0.0, 0.0, 0.0, 0.0)]):
        text = Problem(str(group), ({"role": "user", "content": "?"},), "1", (), "test")
        problem = EncodedProblem(text, ids(4 + group), ())
        for i, advantage in enumerate(advantages):
            guided = group == 0 and i == 3
            prefix = ids(3) if guided else ()
            own = ids(2 + i)
            out.append(
                Rollout(
                    problem, group, i, 0.5 * guided, prefix, own, guided, True, float(advantage > 0), "ok", advantage
                )
            )
    return out


def updated(model, *overrides, objective=None, sample=None, steps=1):
    """(parameters after the update, what the update reported) on a copy of the model."""
    fresh = copy.deepcopy(model)
    learner = make_learner(merge_config({"optim": {"lr": 1e-3}}, overrides), fresh, pad_id=2)
    for _ in range(steps):
        report = learner.update(sample or rollouts(), objective or tk.Objective.trapo(), seed=0)
    return {name: p.detach().clone() for name, p in fresh.named_parameters()}, report


def same(a, b, tolerance=1e-6):
    return all(torch.allclose(a[name], b[name], atol=tolerance, rtol=0) for name in a)


@pytest.mark.parametrize("budget", [10, 4096])
def test_expert_tokens_are_counted_by_probability(model, budget):
    sample = rollouts()
    extra = [dataclasses.replace(r, prefix_ids=r.prefix_ids or (5, 6, 7), supervised=False) for r in sample[:1]]
    _, report = updated(model, f"train.micro_batch_tokens={budget}", sample=sample + extra)
    (guided,) = [r for r in sample if r.supervised]
    ids = torch.tensor([guided.problem.prompt_ids + guided.response_ids])
    start, end = len(guided.problem.prompt_ids), len(guided.problem.prompt_ids) + len(guided.prefix_ids)
    with torch.no_grad():
        p = model(ids).logits[0, start - 1 : end - 1].softmax(-1)[torch.arange(end - start), ids[0, start:end]]
    expected, _ = np.histogram(p.numpy(), bins=20, range=(0, 1))
    assert report.expert_histogram == expected.tolist()
    assert sum(report.expert_histogram) == len(guided.prefix_ids)


def test_the_histogram_puts_each_probability_into_its_bin_and_starts_anew_each_step():
    histogram = ProbabilityHistogram()
    assert histogram.take().tolist() == []
    probabilities = torch.tensor([[0.0, 0.049, 0.051, 1.0], [0.999, 0.5, 0.3, 0.3]])
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    histogram.add(probabilities.log(), mask)
    histogram.add(probabilities.log(), mask)
    counts = histogram.take().tolist()
    assert {i: n for i, n in enumerate(counts) if n} == {0: 4, 1: 2, 10: 2, 19: 4}
    histogram.add(probabilities.log(), torch.zeros_like(mask))
    assert merged_metrics([], 1, histogram.take()) == ({}, [])


def test_numbers_of_micro_batches_come_to_the_host_as_they_are():
    made = [{"tokens": torch.tensor(2**40 + 1), "loss": torch.tensor(0.1)}, {}, {"loss": torch.tensor(float("nan"))}]
    found = on_host(made)
    assert [of_batch.keys() for of_batch in found] == [of_batch.keys() for of_batch in made]
    for of_batch, expected in zip(found, made, strict=True):
        for name, value in of_batch.items():
            assert value.dtype == expected[name].dtype
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0, equal_nan=True)
    assert on_host([]) == []


@pytest.mark.parametrize("reduction", ["sequence_mean", "sum"])
def test_a_reduction_is_over_the_global_batch_however_it_is_cut(model, reduction):
    objective = tk.Objective.trapo(reduction=reduction)
    one, report_one = updated(model, "train.micro_batch_tokens=10000", objective=objective)
    many, report_many = updated(model, "train.micro_batch_tokens=12", objective=objective)
    assert report_one.grad_norm == pytest.approx(report_many.grad_norm, rel=1e-5)
    assert same(one, many, 2e-5)


def test_reductions_divide_by_tokens_by_sequences_or_by_nothing(model):
    (rollout,) = sample = rollouts()[:1]
    norms = {
        name: updated(model, sample=sample, objective=tk.Objective.trapo(reduction=name))[1].grad_norm
        for name in ("token_mean", "sequence_mean", "sum")
    }
    assert norms["sequence_mean"] == pytest.approx(norms["token_mean"], rel=1e-5)
    assert norms["sum"] == pytest.approx(norms["token_mean"] * len(rollout.own_ids), rel=1e-5)
    # A second sequence with as many tokens and no gradient halves both means.
    twice = [rollout, dataclasses.replace(rollout, advantage=0.0)]
    for name, share in (("token_mean", 0.5), ("sequence_mean", 0.5), ("sum", 1.0)):
        norm = updated(model, sample=twice, objective=tk.Objective.trapo(reduction=name))[1].grad_norm
        assert norm == pytest.approx(share * norms[name], rel=1e-5)


def imitate(logprobs):
    return -logprobs


def drift(logprobs, ref_logprobs):
    return (logprobs - ref_logprobs) ** 2


def test_a_policy_term_of_the_users_is_trained_on_without_an_advantage(model):
    sample = [r for r in rollouts() if r.advantage == 0.0]
    assert updated(model, sample=sample)[1].grad_norm == 0.0
    assert updated(model, sample=sample, objective=tk.Objective(policy=imitate))[1].grad_norm > 0.0


def test_a_policy_term_of_the_users_gets_the_references_log_probabilities(model):
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.get_decoder().layers[0].mlp.up_proj.weight.mul_(2)
    norms = []
    for reference in (model, moved):
        fresh = copy.deepcopy(model)
        learner = make_learner(merge_config({"optim": {"lr": 1e-3}}), fresh, pad_id=2, reference=reference)
        norms.append(learner.update(rollouts(), tk.Objective(expert=None, policy=drift), seed=0).grad_norm)
    assert norms[0] < 1e-4 < norms[1]


@pytest.mark.parametrize("normalizer", ["tokens", "regions", "constant"])
def test_how_rollouts_are_cut_into_micro_batches_does_not_change_the_update(model, normalizer):
    # SGD-sized comparison: Adam's first step is a sign, so gradients are compared through the norm and the result.
    one, report_one = updated(model, "train.micro_batch_tokens=10000", f"train.normalizer={normalizer}")
    many, report_many = updated(model, "train.micro_batch_tokens=12", f"train.normalizer={normalizer}")
    assert report_one.grad_norm == pytest.approx(report_many.grad_norm, rel=1e-5)
    assert report_one.metrics == pytest.approx(report_many.metrics, rel=1e-4, abs=1e-6)
    assert same(one, many, 2e-5)


def test_the_update_changes_the_model(model):
    after, report = updated(model)
    assert report.optimizer_steps == 1
    assert not same(dict(model.named_parameters()), after)


def test_skipping_rollouts_without_gradient_saves_tokens_and_changes_nothing(model):
    skipped, short = updated(model, "train.skip_inactive=true")
    whole, long = updated(model, "train.skip_inactive=false")
    assert short.trained_tokens < long.trained_tokens
    assert short.grad_norm == pytest.approx(long.grad_norm, rel=1e-5)
    assert same(skipped, whole, 2e-5)


def test_an_entropy_bonus_gives_every_rollout_a_gradient(model):
    _, report = updated(model, objective=tk.Objective.trapo(entropy_coef=0.01))
    assert report.trained_tokens == sum(len(r) for r in rollouts())


def test_nothing_to_learn_takes_no_optimizer_step(model):
    sample = [r for r in rollouts() if r.group == 1]
    after, report = updated(model, sample=sample)
    assert report.optimizer_steps == 0
    assert same(dict(model.named_parameters()), after, 0.0)


def test_several_updates_on_one_batch_use_the_old_policys_logprobs(model):
    objective = tk.Objective.grpo()
    _, report = updated(model, "train.updates_per_step=2", "optim.lr=0.01", objective=objective)
    assert report.optimizer_steps == 2
    assert report.metrics["ratio_mean"] != pytest.approx(1.0, abs=1e-4)
    _, single = updated(model, "optim.lr=0.01", objective=objective)
    assert single.metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-6)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(model):
    sample = rollouts()
    sample[0].advantage = float("inf")
    after, report = updated(model, sample=sample)
    assert (report.optimizer_steps, report.skipped_steps) == (0, 1)
    assert same(dict(model.named_parameters()), after, 0.0)


def test_a_kl_term_pulls_towards_the_reference(model):
    reference = copy.deepcopy(model).requires_grad_(False)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p in moved.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    learner = make_learner(merge_config({"optim": {"lr": 1e-3}}), moved, pad_id=2, reference=reference)
    sample = [r for r in rollouts() if r.group == 1]  # A = 0: the KL term is all there is
    first = learner.update(sample, tk.Objective.grpo(kl_coef=1.0), seed=0).metrics
    for _ in range(20):
        last = learner.update(sample, tk.Objective.grpo(kl_coef=1.0), seed=0).metrics
    assert 0 < last["loss_kl"] < first["loss_kl"]


def test_a_frozen_head_is_left_alone(tiny_model_path, model):
    fresh = copy.deepcopy(model)
    fresh.get_output_embeddings().weight.requires_grad_(False)
    before = fresh.get_output_embeddings().weight.clone()
    make_learner(merge_config({"optim": {"lr": 1e-3}}), fresh, pad_id=2).update(
        rollouts(), tk.Objective.trapo(), seed=0
    )
    assert fresh.get_output_embeddings().weight.equal(before)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.8536, 0.5, 0.1464]),
    ],
)
def test_the_learning_rate_warms_up_from_above_zero_and_then_follows_its_schedule(schedule, expected, model):
    config = merge_config({}, [f"optim.schedule={schedule}", "optim.warmup_steps=2", "optim.lr=1", "train.steps=6"])
    assert [lr_factor(step, config.optim, 6) for step in range(6)] == pytest.approx(expected, abs=1e-4)
    learner = make_learner(config, copy.deepcopy(model), pad_id=2)
    assert learner.lr == pytest.approx(1 / 3)
    learner.update([], tk.Objective.trapo(), seed=0)
    assert learner.lr == pytest.approx(2 / 3)


def test_training_16_bit_weights_is_refused(model):
    with pytest.raises(TrapoError, match=r"model\.dtype: training needs float32"):
        make_learner(merge_config({}), copy.deepcopy(model).bfloat16(), pad_id=2)


def test_gradient_checkpointing_recomputes_and_gives_the_same_update(model):
    plain, _ = updated(model)
    fresh = copy.deepcopy(model)
    fresh.config.attention_dropout = 0.5
    enable_checkpointing(fresh)
    config = merge_config({"optim": {"lr": 1e-3}}, ["model.gradient_checkpointing=true"])
    learner = make_learner(config, fresh, pad_id=2)
    calls = []
    layer = fresh.get_decoder().layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    report = learner.update(rollouts(), tk.Objective.trapo(), seed=0)
    assert report.optimizer_steps == 1
    assert len(calls) == 2  # forward, and again in backward
    assert same(plain, dict(fresh.named_parameters()))


def with_logprobs(model, shift):
    """The rollouts as an engine samples them whose log-probabilities are the model's own + shift."""
    sample = rollouts()
    learner = make_learner(merge_config({}), copy.deepcopy(model), pad_id=2)
    for rollout, logprobs in zip(sample, learner.own_logprobs(sample), strict=True):
        rollout.rollout_logprobs = tuple((logprobs + shift).tolist())
    return sample


def test_importance_weights_of_an_engine_that_agrees_change_nothing(model):
    plain, report = updated(model)
    weighted, weighted_report = updated(
        model, objective=tk.Objective.trapo(tis_cap=2.0), sample=with_logprobs(model, 0)
    )
    assert weighted_report.metrics["tis_weight"] == pytest.approx(1.0, abs=1e-5)
    assert weighted_report.grad_norm == pytest.approx(report.grad_norm, rel=1e-4)
    assert same(plain, weighted, 2e-5)


@pytest.mark.parametrize(("shift", "weight"), [(0.7, 0.5), (-0.7, 2.0), (-3.0, 2.5)])  # e^−0.7, e^0.7, capped
def test_tokens_are_weighted_by_what_the_engine_gave_them_up_to_the_cap(shift, weight, model):
    import math

    objective = tk.Objective.trapo(tis_cap=2.5)
    _, report = updated(model, objective=objective, sample=with_logprobs(model, shift))
    assert report.metrics["tis_weight"] == pytest.approx(min(math.exp(-shift), 2.5), rel=1e-4)
    assert report.metrics["tis_weight"] == pytest.approx(weight, rel=0.01)


def test_importance_weights_without_the_engines_logprobs_are_refused(model):
    with pytest.raises(TrapoError, match=r"objective\.tis_cap: the engine gave no log-probabilities"):
        updated(model, objective=tk.Objective.trapo(tis_cap=2.0))


def gradient(model, objective, *overrides):
    """Of the whole update on the rollouts above, as one vector."""
    learner = make_learner(merge_config({}, overrides), copy.deepcopy(model), pad_id=2)
    kept = []
    learner._step = lambda loss, region: kept.append([p.grad.flatten() for p in learner.parameters]) or 0.0
    learner.update(rollouts(), objective, seed=0)
    return torch.cat(kept[0])


def plain_sums(model):
    """Σ over the whole batch of the loss of expert tokens and of the policy loss of own tokens, each with its number of
    tokens, and Σ of the entropy of either, from the model's own logits."""
    expert, own, of_experts, of_own = [], [], [], []
    for r in rollouts():
        ids = torch.tensor([r.problem.prompt_ids + r.response_ids])
        log_p = model(ids).logits[0, :-1].log_softmax(-1)
        chosen = log_p.gather(-1, ids[0, 1:, None])[:, 0]
        first, middle = len(r.problem.prompt_ids) - 1, len(r.problem.prompt_ids) + len(r.prefix_ids) - 1
        expert.append(-chosen[first:middle])
        own.append(-r.advantage * (chosen[middle:] - chosen[middle:].detach()).exp())
        entropy = -(log_p.exp() * log_p).sum(-1)
        of_experts.append(entropy[first:middle])
        of_own.append(entropy[middle:])
    sums = [(torch.cat(parts).sum(), torch.cat(parts).numel()) for parts in (expert, own)]
    return [*sums, (torch.cat(of_experts).sum(), torch.cat(of_own).sum())]


@pytest.mark.parametrize("normalizer", ["regions", "region_mean", "constant"])
def test_expert_and_own_tokens_and_the_entropy_bonus_have_means_of_their_own(model, normalizer):
    reduction = "region_mean" if normalizer == "region_mean" else "token_mean"
    objective = tk.Objective.trapo(expert="sft", expert_coef=0.7, entropy_coef=0.05, reduction=reduction)
    chosen = "tokens" if normalizer == "region_mean" else normalizer
    overrides = [f"train.normalizer={chosen}", "train.normalizer_constant=64"]
    found = gradient(model, objective, *overrides)
    plain = copy.deepcopy(model)
    (expert, n_expert), (own, n_own), (of_experts, of_own) = plain_sums(plain)
    assert min(n_expert, n_own) > 0
    entropy = of_experts / n_expert + of_own / n_own
    if normalizer == "constant":
        entropy = (of_experts + of_own) / (n_expert + n_own)
        n_expert = n_own = 64
    loss = 0.7 * expert / n_expert + own / n_own - 0.05 * entropy
    grads = torch.autograd.grad(loss, [p for p in plain.parameters() if p.requires_grad])
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in grads]), rtol=1e-4, atol=1e-7)


def test_micro_batches_add_the_heads_gradient_in_place_where_it_is_multiplied_in_16_bits(model, monkeypatch):
    options = ("train.precision=bfloat16", "train.micro_batch_tokens=8", "train.share_prefixes=never")
    calls, real = [], tk.linear_policy_loss

    def seen(hidden, weight, *args, **kwargs):
        assert kwargs["weight_grad"] is weight.grad
        assert hidden.dtype == torch.bfloat16
        calls.append(weight.grad.data_ptr())
        return real(hidden, weight, *args, **kwargs)

    monkeypatch.setattr(tk, "linear_policy_loss", seen)
    added, report = updated(model, *options)
    assert len(calls) > 1
    assert len(set(calls)) == 1
    assert report.optimizer_steps == 1

    def handed_over(*args, **kwargs):
        kwargs["weight_grad"] = None
        return real(*args, **kwargs)

    monkeypatch.setattr(tk, "linear_policy_loss", handed_over)
    expected, other = updated(model, *options)
    assert report.grad_norm == pytest.approx(other.grad_norm, rel=1e-2)
    for name, weight in model.named_parameters():
        moved, wanted = added[name] - weight, expected[name] - weight
        assert torch.nn.functional.cosine_similarity(moved.flatten(), wanted.flatten(), 0) > 0.98, name


@pytest.mark.parametrize("limit", [1e-7, 1e-3, 0.5, 0.9995, 1.0, 1.0005, 2.0, math.inf])
def test_gradients_are_clipped_to_the_bit_as_by_torch_and_left_alone_within_the_limit(limit):
    def weights(scale=1.0):
        made = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 5), (7,), (2, 2))]
        generator = torch.Generator().manual_seed(0)
        for p in made[:2]:  # the last has no gradient
            p.grad = torch.randn(p.shape, generator=generator)
        norm = torch.nn.utils.get_total_norm([p.grad for p in made[:2]])
        for p in made[:2]:
            p.grad.mul_(scale / norm)
        return made

    ours, torchs = weights(), weights()
    versions = [p.grad._version for p in ours[:2]]
    norm = clip_gradients(ours, limit)
    assert norm == float(torch.nn.utils.clip_grad_norm_(torchs, limit))
    assert all(a.grad.equal(b.grad) for a, b in zip(ours[:2], torchs[:2], strict=True))
    assert (versions == [p.grad._version for p in ours[:2]]) == (limit > 1.01)


def test_gradients_that_are_not_finite_are_left_alone():
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([1.0, math.inf, 2.0])
    assert clip_gradients([p], 1.0) == math.inf
    assert p.grad.tolist() == [1.0, math.inf, 2.0]
