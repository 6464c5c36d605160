"""Computing what rollouts begin with once changes what an update costs, and nothing else of it."""

import copy
import dataclasses

import pytest
import torch
from model_types import tiny_model
from test_learner import rollouts, same, updated
from transformers import AutoModelForCausalLM

import trapo_kernels as tk
from trapo.batching import groups
from trapo.config import merge_config
from trapo.models.loading import enable_checkpointing
from trapo.models.prefix_tree import Costs
from trapo.trainer import make_learner


@pytest.fixture(scope="module")
def model(tiny_model_path):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)


def sample():
    """Six rollouts of one prompt, two with expert prefixes that begin alike, two the same; and one of another."""
    first, *rest = rollouts()
    prompt = tuple(range(100, 112))
    problem = dataclasses.replace(first.problem, prompt_ids=prompt)
    own = [(40, 41, 42), (43, 44), (40, 41), (40, 41), (45, 46, 47, 48), (49,)]
    prefix = [(), (), (), (), (30, 31, 32, 33), (30, 31)]
    made = [
        dataclasses.replace(
            first,
            problem=problem,
            prefix_ids=p,
            own_ids=o,
            ratio=0.5 * bool(p),
            supervised=bool(p),
            advantage=0.3 - 0.2 * i,
        )
        for i, (p, o) in enumerate(zip(prefix, own, strict=True))
    ]
    return [made[4], rest[0], *made[:4], made[5]]


def both(model, *overrides, **options):
    options.setdefault("sample", sample())
    shared = updated(model, "train.share_prefixes=auto", "optim.eps=1e-3", *overrides, **options)
    apart = updated(model, "train.share_prefixes=never", "optim.eps=1e-3", *overrides, **options)
    return shared, apart


def ran(model, *overrides):
    """Tokens that went through the model in one update."""
    fresh, seen = copy.deepcopy(model), []
    learner = make_learner(merge_config({"optim": {"lr": 1e-3}}, list(overrides)), fresh, pad_id=2)
    fresh.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    learner.update(sample(), tk.Objective.trapo(), seed=0)
    return sum(seen)


@pytest.mark.parametrize(
    "objective",
    [tk.Objective.trapo(entropy_coef=0.01), tk.Objective.gspo(expert="trsft"), tk.Objective.luffy()],
    ids=["token by token", "by sequence", "luffy"],
)
@pytest.mark.parametrize("budget", [20, 4096])
def test_sharing_does_not_change_the_update(model, objective, budget):
    (shared, report), (apart, expected) = both(model, f"train.micro_batch_tokens={budget}", objective=objective)
    assert report.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    assert report.metrics == pytest.approx(expected.metrics, rel=1e-4, abs=1e-6)
    assert report.expert_histogram == expected.expert_histogram
    assert same(shared, apart, 1e-6)


def test_what_is_shared_runs_once(model):
    # 12 of the prompt, 4 of the prefixes, own tokens but the last of each: 40 41 once, 43, 45 46 47.
    trees = 12 + 4 + 2 + 1 + 3
    alone = len(rollouts()[1]) - 1
    assert ran(model) == trees + alone
    assert ran(model, "train.share_prefixes=never") > 2 * ran(model)


def test_several_updates_on_one_batch_find_their_old_logprobs(model):
    (shared, report), (apart, expected) = both(
        model, "train.updates_per_step=2", "optim.lr=0.01", objective=tk.Objective.grpo()
    )
    assert report.metrics == pytest.approx(expected.metrics, rel=1e-4, abs=1e-6)
    assert same(shared, apart, 1e-5)


def test_eager_attention_and_gradient_checkpointing_share_too(model):
    plain = copy.deepcopy(model)
    expected, _ = updated(plain, "train.share_prefixes=never", "optim.eps=1e-3", sample=sample())
    for kind in ("eager", "checkpointing"):
        fresh = copy.deepcopy(model)
        overrides = ["optim.eps=1e-3", "model.gradient_checkpointing=" + str(kind == "checkpointing").lower()]
        if kind == "eager":
            fresh.set_attn_implementation("eager")
        else:
            enable_checkpointing(fresh)
        found, _ = updated(fresh, *overrides, sample=sample())
        assert same(found, expected, 1e-6), kind


def test_a_kl_reference_gets_the_same_logprobs(model):
    reference = copy.deepcopy(model).requires_grad_(False)
    found = []
    for sharing in ("auto", "never"):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p in moved.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
        config = merge_config({"optim": {"lr": 1e-3}}, [f"train.share_prefixes={sharing}"])
        learner = make_learner(config, moved, pad_id=2, reference=reference)
        found.append(learner.update(sample(), tk.Objective.grpo(kl_coef=0.5), seed=0).metrics)
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)
    assert found[0]["loss_kl"] > 0


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gpt_oss"])
def test_sliding_layers_see_as_far_back_as_in_a_row(kind):
    windowed = tiny_model(kind, sliding_window=8)
    shared, apart = (
        make_learner(merge_config({}, [f"train.share_prefixes={sharing}"]), windowed, pad_id=2).own_logprobs(
            small_ids(sample())
        )
        for sharing in ("auto", "never")
    )
    for found, expected in zip(shared, apart, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    made = make_learner(merge_config({}), windowed, pad_id=2)
    assert any(group.trees for group in made._micro_batches(small_ids(sample())))


def small_ids(rollouts):
    """The same for vocabularies of 64."""

    def fold(ids):
        return tuple(t % 50 + 10 for t in ids)

    problems = [dataclasses.replace(r.problem, prompt_ids=fold(r.problem.prompt_ids)) for r in rollouts]
    return [dataclasses.replace(r, problem=p, own_ids=fold(r.own_ids)) for r, p in zip(rollouts, problems, strict=True)]


def test_rollouts_longer_than_a_layers_window_of_columns_are_not_shared():
    short = small_ids(sample())
    long = [dataclasses.replace(r, own_ids=r.own_ids * 9) for r in short]
    learner = make_learner(merge_config({}), tiny_model("gpt_neo", window_size=24), pad_id=2)
    assert any(group.trees for group in learner._micro_batches(short))
    assert not any(group.trees for group in learner._micro_batches(long))


def test_a_family_that_takes_no_mask_says_so_and_computes_prompts_anew(caplog):
    learner = make_learner(merge_config({}), tiny_model("mamba"), pad_id=2)
    assert learner.costs is None
    learner = make_learner(merge_config({}), tiny_model("bloom"), pad_id=2)  # its distances are columns
    assert learner.costs is None
    (line,) = [r.message for r in caplog.records if "bloom" in r.message]
    assert "train.share_prefixes" in line


def test_groups_hold_each_rollout_once_within_the_budget():
    everything = [*sample(), *rollouts()]
    for budget in (1, 20, 50, 4096):
        for costs in (None, Costs(0.0), Costs(1e-3)):
            made = groups(everything, budget, False, costs)
            members = [id(r) for group in made for r in group.rollouts]
            assert sorted(members) == sorted(map(id, everything))
            assert all(sum(group.trees) in (0, len(group.rollouts)) for group in made)


def test_nothing_to_share_is_cut_as_before():
    alone = [r for i, r in enumerate(rollouts()) if i in (0, 4)]
    assert groups(alone, 4096, False, Costs(0.0)) == groups(alone, 4096, False, None)
