"""Rollouts from truncated distributions: what is sampled, what of it is told, and what is learnt from it."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from killed_run import settings, train_here
from test_learner import model, rollouts  # noqa: F401
from transformers.generation import logits_process as theirs

import trapo_kernels as tk
from trapo.config import merge_config
from trapo.engines.hf import HFEngine
from trapo.engines.protocol import Request
from trapo.engines.truncation import Truncation
from trapo.errors import TrapoError
from trapo.modes import phases
from trapo.trainer import make_learner


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(1, 1.0, 0.0), (7, 1.0, 0.0), (40, 0.8, 0.0), (40, 1.0, 0.2), (25, 0.9, 0.1)]
)
def test_a_support_is_what_transformers_would_leave_and_tokens_are_drawn_from_it_alone(top_k, top_p, min_p):
    torch.manual_seed(0)
    logits, temperature = 2 * torch.randn(5, 101), 0.8
    scores = theirs.TemperatureLogitsWarper(temperature)(None, logits)
    scores = theirs.TopKLogitsWarper(top_k)(None, scores)
    scores = theirs.TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    scores = theirs.MinPLogitsWarper(min_p)(None, scores) if min_p else scores
    count = 4000
    counts = torch.zeros(5, 101, dtype=torch.float64)
    for uniform in torch.arange(count, dtype=torch.float64) / count + 0.5 / count:
        tokens, supports = Truncation(top_k, top_p, min_p).sample(logits, temperature, uniform.expand(5))
        counts[torch.arange(5), torch.tensor(tokens)] += 1 / count
    assert [set(s) for s in supports] == [set(row.isfinite().nonzero().flatten().tolist()) for row in scores]
    # Evenly spaced numbers meet each token as often as it is likely, but for one at either end.
    assert (counts - scores.double().softmax(-1)).abs().max() <= 1.01 / count
    with pytest.raises(TrapoError):
        Truncation(3).sample(torch.full((1, 9), torch.nan), 1.0, torch.zeros(1, dtype=torch.float64))


def test_the_engine_tells_supports_of_rollouts_and_samples_others_from_all(model):  # noqa: F811
    engine = HFEngine(copy.deepcopy(model), eos_ids=[2], pad_id=2, batch_size=2, truncation=Truncation(5, 0.9))
    requests = [Request((5, 6, 7 + i), 6 + i, truncated=True) for i in range(5)]
    found = engine.generate(requests, temperature=1.0, seed=3)
    for completion in found:
        assert len(completion.supports) == len(completion.token_ids)
        for token, ids in zip(completion.token_ids, completion.supports, strict=True):
            assert token in ids
            assert 1 <= len(ids) <= 5
    assert found == engine.generate(requests, temperature=1.0, seed=3)
    plain = [dataclasses.replace(request, truncated=False) for request in requests]
    assert all(c.supports is None for c in engine.generate(plain, temperature=1.0, seed=3))
    assert all(c.supports is None for c in engine.generate(requests, temperature=0, seed=3))


def drawn():
    """Rollouts each of whose own tokens has three ids, itself among them."""
    return [
        dataclasses.replace(r, supports=tuple((11, token, 12 + i)[: 2 + i % 2] for i, token in enumerate(r.own_ids)))
        for r in rollouts()
    ]


@pytest.mark.parametrize("options", [["train.micro_batch_tokens=20"], ["train.packing=always"], []])
def test_an_update_is_that_of_masked_logits_and_expert_tokens_have_them_all(model, options):  # noqa: F811
    learner = make_learner(merge_config({}, [*options, "rollout.temperature=0.7"]), copy.deepcopy(model), pad_id=2)
    found, sample = [], drawn()
    learner._step = lambda loss, region: found.append([p.grad.clone() for p in learner.model.parameters()]) or 0.0
    update = learner.update(sample, tk.Objective.trapo(expert="sft", entropy_coef=0.1), seed=0)
    exact = copy.deepcopy(model).double()
    total, tokens, entropies = 0.0, 0, []
    for r in sample:
        ids = [*r.problem.prompt_ids, *r.response_ids]
        z = exact(torch.tensor([ids])).logits[0, len(r.problem.prompt_ids) - 1 : -1] / 0.7
        for place, token in enumerate(r.response_ids):
            own = place - len(r.prefix_ids)
            if own < 0 and not r.supervised:
                continue
            row = z[place] if own < 0 else z[place, list(r.supports[own])]
            log_p = row.log_softmax(0)
            at = token if own < 0 else r.supports[own].index(token)
            entropies.append(-(log_p.exp() * log_p).sum())
            total = total - log_p[at] * (1 if own < 0 else r.advantage) - 0.1 * entropies[-1]
            tokens += 1
    (total / tokens).backward()
    for a, b in zip(found[0], [p.grad for p in exact.parameters()], strict=True):
        assert (a - b).norm() <= 2e-5 * b.norm() + 1e-9
    assert update.metrics["entropy"] == pytest.approx(float(sum(e.detach() for e in entropies)) / tokens, rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["rollout.top_p=0.9"], r"rollout\.top_p: got 0\.9 without rollout\.top_k"),
        (["rollout.min_p=0.1"], r"rollout\.min_p: got 0\.1 without rollout\.top_k"),
        (["rollout.top_k=5", "rollout.top_p=1.5"], r"rollout\.top_p: got 1\.5; must be above 0 and at most 1"),
        (["rollout.top_k=5", "rollout.engine=vllm"], r"rollout\.top_k: got 5 with rollout\.engine=vllm"),
        (["rollout.top_k=5", "objective.expert=sed"], r"rollout\.top_k: objective\.expert=sed reads more of a token"),
    ],
)
def test_keys_that_do_not_go_together_are_one_line(overrides, line):
    with pytest.raises(TrapoError, match=line) as error:
        phases(merge_config({}, overrides))
    assert "\n" not in str(error.value)


def test_a_run_samples_and_learns_from_the_same_distribution(tiny_model_path, tmp_path):
    more = ["mode=grpo", "rollout.top_k=5", "rollout.top_p=0.9", "train.steps=2", "data.eval=null", "eval.every=0"]
    more += ["objective.entropy_coef=0.01", "guidance.group_size=4", "checkpoint.every=0", "train.updates_per_step=2"]
    train_here(settings(tiny_model_path, tmp_path / "run", *more))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["entropy"] <= math.log(5) for row in rows)
    assert all(0.5 < row["ratio_mean"] < 2 for row in rows)
