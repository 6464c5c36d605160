"""Modes that mix imitation with RL do what their papers say, on scripted rollouts and a tiny model."""

import copy
import dataclasses
import json
import math
import random
import signal
import statistics

import forked
import pytest
import torch
from killed_run import settings, train_here
from safetensors.torch import load_file
from test_learner import model, same  # noqa: F401

import trapo_kernels as tk
from trapo.config import merge_config
from trapo.data.encode import EncodedProblem, Trace
from trapo.data.problem import Problem
from trapo.engines.protocol import Completion
from trapo.errors import TrapoError
from trapo.modes import MODES, phases
from trapo.modes.draws import Binomial, Uniform
from trapo.modes.memory import ShortestPrefixes
from trapo.modes.phase import cosine
from trapo.rewards import Reward
from trapo.rollouts import Rollout, assign_advantages, collect
from trapo.trainer import make_learner, train_step

TRACE = Trace((11, 12, 13, 14, 15, 16, 17, 18, 19, 2), ())


def problem(name="p", traces=(TRACE,)):
    text = Problem(name, ({"role": "user", "content": "?"},), "1", (), "test")
    return EncodedProblem(text, (5, 6, 7), traces)


class Script:
    """An engine whose responses are three tokens; a scorer that finds the first `right` rollouts of a prompt right."""

    def __init__(self, right):
        self.right, self.seen = right, {}

    def generate(self, requests, *, temperature, seed):
        return [Completion((21, 22 + i % 5, 23), True) for i, _ in enumerate(requests)]

    def rest(self):
        pass

    def score(self, rollouts):
        out = []
        for r in rollouts:
            count = self.seen[r.group] = self.seen.get(r.group, 0) + 1
            out.append(Reward(float(count <= self.right or not r.own_ids), "ok"))
        return out


def plan(*overrides):
    (phase,) = phases(merge_config({}, overrides))
    return phase


def draw(phase, right, problems=None, seed=0):
    script = Script(right)
    return collect(
        problems or [problem()],
        phase.schedule,
        script,
        script.score,
        temperature=1.0,
        max_response_tokens=30,
        seed=seed,
    )


def gradient(model, objective, rollouts):  # noqa: F811
    learner = make_learner(merge_config({}), copy.deepcopy(model), pad_id=2)
    found = [torch.zeros(sum(p.numel() for p in learner.parameters))]
    learner._step = lambda loss, region: found.append(torch.cat([p.grad.flatten() for p in learner.parameters])) or 0.0
    learner.update(rollouts, objective, seed=0)
    return found[-1]


# HPT ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("right", [0, 1, 4, 8])
def test_hpt_is_sft_on_the_trace_of_an_unsolved_prompt_and_rl_on_the_others(model, right):  # noqa: F811
    phase = plan("mode=hpt")
    rollouts = draw(phase, right)
    assign_advantages(rollouts, "all", phase.std, phase.grouping)
    trained = [r for r in rollouts if r.trained]
    if right == 0:
        (trace,) = trained
        assert (len(rollouts), trace.prefix_ids, trace.own_ids) == (9, TRACE.token_ids, ())
        expected = gradient(model, plan("mode=sft").objective, trained)
    else:
        assert (len(rollouts), len(trained)) == (8, 8)
        assert not any(r.guided for r in rollouts)
        rl = [dataclasses.replace(r, advantage=r.reward - right / 8) for r in rollouts]
        expected = gradient(model, tk.Objective(expert=None, policy="unclipped"), rl)
    assert (expected.norm() > 0) == (right < 8)
    torch.testing.assert_close(gradient(model, phase.objective, trained), expected, rtol=1e-4, atol=2e-7)


def test_hpts_gate_is_how_many_right_rollouts_are_too_few():
    gated = plan("mode=hpt", "hybrid.gate=2")
    assert [len([r for r in draw(gated, right) if r.trained]) for right in (0, 2, 3)] == [1, 1, 8]
    with pytest.raises(TrapoError, match=r"hybrid\.gate: got 8; with 8 rollouts"):
        plan("mode=hpt", "hybrid.gate=8")


# Lengths of prefixes -------------------------------------------------------------------------------------------------


def test_ufts_hint_is_a_binomial_share_whose_mean_falls_by_a_cosine_and_then_is_nothing():
    phase = plan("mode=uft", "train.steps=500")
    assert [phase.at(step).shown["hint_share"] for step in (0, 150, 300, 301, 499)] == pytest.approx(
        [0.95, 0.5, 0.05, 0.0, 0.0]
    )
    rng = random.Random(0)
    for p in (0.95, 0.3):
        draws = [Binomial(5, p)(None, rng) for _ in range(100_000)]
        assert statistics.mean(draws) == pytest.approx(p, abs=0.01)
        assert {round(5 * x, 9) for x in draws} <= {0, 1, 2, 3, 4, 5}
    drawn = draw(phase.at(0), 8)
    assert len({r.prefix_ids for r in drawn}) == 1
    assert [r.supervised for r in drawn] == [True] + [False] * 7
    assert (phase.objective.expert, phase.objective.expert_coef) == ("sft", 0.001)
    assert not any(r.prefix_ids for r in draw(phase.at(400), 8))


def test_prefix_rfts_lengths_begin_at_the_high_end_and_spread_to_the_low_one():
    phase = plan("mode=prefix_rft", "train.steps=100")

    def lengths(step):
        group = phase.at(step).schedule.micro_groups[1]
        return group.draw

    assert lengths(0) == Uniform(0.95, 0.95)
    assert lengths(100) == Uniform(pytest.approx(0.05), 0.95)
    assert [g.size for g in phase.schedule.micro_groups] == [7, 1]
    fixed = plan("mode=prefix_rft", "hybrid.high=0.4", "hybrid.low=0.4").at(70)
    (guided,) = [r for r in draw(fixed, 8) if r.guided]
    assert guided.prefix_ids == TRACE.token_ids[:4]


def test_prefix_rft_learns_the_most_uncertain_fifth_of_a_prefix_with_its_rollouts_advantage(model):  # noqa: F811
    phase = plan("mode=prefix_rft", "hybrid.high=0.9", "hybrid.low=0.9", "hybrid.keep=0.25").at(0)
    rollouts = draw(phase, 3)
    assign_advantages(rollouts, "all", phase.std, phase.grouping)
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(50)  # so that no two entropies are as good as equal
    learner = make_learner(merge_config({}), copy.deepcopy(model), pad_id=2)
    phase.weigh(rollouts, learner)
    (guided,) = [r for r in rollouts if r.guided]
    ids = torch.tensor([guided.problem.prompt_ids + guided.response_ids])
    with torch.no_grad():
        log_p = model(ids).logits[0, :-1].log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)[2 : 2 + len(guided.prefix_ids)]
    kept = entropy >= entropy.quantile(0.75)
    assert 0 < kept.sum() < 4
    assert guided.prefix_advantages == pytest.approx((guided.advantage * kept).tolist())
    # The gradient is that of the policy term on the kept tokens, written out.
    fresh = copy.deepcopy(model)
    chosen = fresh(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[2:, 0]
    weights = torch.cat([torch.tensor(guided.prefix_advantages), torch.full((len(guided.own_ids),), guided.advantage)])
    loss = -(weights * (chosen - chosen.detach()).exp()).sum() / len(chosen)
    expected = torch.autograd.grad(loss, list(fresh.parameters()))
    found = []
    learner._step = lambda loss, region: found.extend(p.grad.clone() for p in learner.parameters) or 0.0
    learner.update([guided], phase.objective, seed=0)
    for actual, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, plain, rtol=1e-4, atol=1e-7)


# CHORD and SRFT ------------------------------------------------------------------------------------------------------


def test_chords_mu_falls_by_a_cosine_and_mixes_two_means():
    phase = plan("mode=chord")
    found = [phase.at(step).objective for step in (0, 100, 200, 900)]
    assert [o.expert_coef for o in found] == pytest.approx([0.9, 0.475, 0.05, 0.05])
    assert [o.policy_coef for o in found] == pytest.approx([0.1, 0.525, 0.95, 0.95])
    assert {o.reduction for o in found} == {"region_mean"}
    rollouts = draw(phase.at(0), 4)
    assign_advantages(rollouts, "all", phase.std, phase.grouping)
    assert [len(r.prefix_ids) for r in rollouts] == [0] * 8 + [len(TRACE.token_ids)]
    assert rollouts[-1].advantage == 0  # no part of the group
    assert sum(r.advantage for r in rollouts) == pytest.approx(0)
    phi = plan("mode=chord", "objective.expert=chord", "hybrid.high=0.1", "hybrid.low=0.1").at(7).objective
    assert (phi.expert, phi.expert_coef) == ("chord", 0.1)


def test_srft_weighs_by_a_sequences_mean_entropy(model):  # noqa: F811
    phase = plan("mode=srft")
    rollouts = draw(phase, 3)
    learner = make_learner(merge_config({}), copy.deepcopy(model), pad_id=2)
    phase.weigh(rollouts, learner)
    for r in (rollouts[0], rollouts[5], rollouts[7]):
        ids = torch.tensor([r.problem.prompt_ids + r.response_ids])
        with torch.no_grad():
            log_p = model(ids).logits[0, :-1].log_softmax(-1)
        h = float(-(log_p.exp() * log_p).sum(-1)[2:].mean())
        if r.guided:
            assert r.prefix_advantages == pytest.approx([0.5 * math.exp(-h)] * len(r.prefix_ids), rel=1e-4)
        else:
            assert r.advantage == pytest.approx(0.1 * math.exp(h) if r.reward else -1.0, rel=1e-4)
    assert rollouts[7].guided


# PrefixRL and POPE ---------------------------------------------------------------------------------------------------


def test_prefix_rls_prefixes_are_context_and_a_prefix_makes_another_prompt():
    phase = plan("mode=prefix_rl", "guidance.find=false")
    assert phase.schedule.supervise == "none"
    hard = draw(phase, 0)
    assert [len(r.prefix_ids) for r in hard] == [0] * 4 + [5] * 4
    assert not any(r.supervised for r in hard)
    assert len(draw(phase, 1)) == 4  # one was right: the prompt needs no prefix
    for r, reward in zip(hard, [0, 0, 0, 0, 1, 0, 0, 0], strict=True):
        r.reward = reward
    assign_advantages(hard, "all", False, phase.grouping)
    assert [r.advantage for r in hard] == [0] * 4 + [0.75] + [-0.25] * 3


def test_bisection_finds_the_shortest_prefix_that_helps_in_four_draws():
    found = ShortestPrefixes()
    one = problem()

    def rollout(ratio):
        return Rollout(one, 0, 1, ratio, (1,), (2,), False, True, reward=float(ratio >= 0.37))

    for _ in range(4):
        ratio = found(one, random.Random(0))
        found.after([rollout(ratio), rollout(ratio)], None, 0)
    low, high = found.bounds["p"]
    assert low < 0.37 <= high
    assert high - low == 1 / 16
    again = ShortestPrefixes()
    again.load_state_dict(json.loads(json.dumps(found.state_dict())), {})
    assert again == found
    mixed = [dataclasses.replace(rollout(0.5), reward=reward) for reward in (0.0, 1.0)]
    found.after(mixed, None, 0)
    assert found.bounds["p"] == [low, high]  # neither too hard nor too easy


# ReLIFT --------------------------------------------------------------------------------------------------------------


def run_relift(model, buffer, lr, steps=3):  # noqa: F811
    """After some steps on two prompts, one of which always fails: (weights, metrics of the last step, memory)."""
    config = merge_config({"optim": {"lr": 1e-3}}, ["mode=relift", f"hybrid.buffer={buffer}", f"optim.expert.lr={lr}"])
    (phase,) = phases(config)
    fresh = copy.deepcopy(model)
    learner = make_learner(config, fresh, pad_id=2, phase=phase)
    for seed in range(steps):
        script = Script(3)
        script.seen = {0: 3}
        _, update = train_step(
            [problem("hard"), problem("easy")], phase, script, script.score, learner,
            baseline="all", temperature=1.0, max_response_tokens=30, seed=seed,
        )  # fmt: skip
    return {name: p.detach().clone() for name, p in fresh.named_parameters()}, update.metrics, phase.memory


def test_relift_without_a_learning_rate_of_sft_is_rl_alone(model):  # noqa: F811
    with_sft, metrics, _ = run_relift(model, 1, 1e-30)
    alone, _, _ = run_relift(model, 1000, 1e-30)
    assert metrics["sft_updates"] == 1
    assert same(with_sft, alone, 0)
    learnt, _, _ = run_relift(model, 1, 1e-3)
    assert not same(learnt, alone, 1e-4)


def test_relift_makes_as_many_sft_steps_as_its_queue_is_full(model):  # noqa: F811
    _, metrics, memory = run_relift(model, 2, 1e-3, steps=5)
    assert (metrics["queued"], metrics["sft_updates"]) == (1.0, 0.0)  # of five failures two steps were made
    assert [p.name for p in memory.waiting] == ["hard"]


def test_relifts_queue_survives_an_interruption(tiny_model_path, tmp_path):
    options = ["mode=relift", "hybrid.buffer=5", "train.updates_per_step=1"]
    train_here(settings(tiny_model_path, tmp_path / "whole", *options))
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["queued"] for row in rows] == [2, 4, 1, 3, 0, 2]  # the model is never right
    assert [row["sft_updates"] for row in rows] == [0, 0, 1, 0, 1, 0]
    for kill_at, code in (("log:5", -signal.SIGKILL), ("none", 0)):
        done = forked.run("killed_run:main", [tiny_model_path, tmp_path / "parts", kill_at, *options])
        assert done.returncode == code, done.stdout + done.stderr
    one, two = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("whole", "parts"))
    assert all(one[name].equal(two[name]) for name in one)


# Keys ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mode=grpo", "hybrid.gate=1"], r"hybrid\.gate: only hpt reads it; got mode grpo"),
        (["mode=hpt", "hybrid.high=1"], r"hybrid\.high: only uft, prefix_rft, chord, amft reads it; got mode hpt"),
        (["guidance.find=true"], r"guidance\.find: only mode prefix_rl looks for prefixes; got mode trapo"),
    ],
)
def test_keys_of_another_mode_are_refused(overrides, message):
    with pytest.raises(TrapoError, match=message):
        merge_config({}, overrides)


def test_a_curve_that_rises_is_refused():
    with pytest.raises(TrapoError, match=r"hybrid\.high: got 0\.2 with hybrid\.low=0\.5; they must be 0 <= low"):
        plan("mode=chord", "hybrid.high=0.2", "hybrid.low=0.5")
    assert cosine(0.9, 0.1, 10, 10) == pytest.approx(0.1)
    assert set(MODES) >= {"hpt", "relift", "uft", "prefix_rft", "prefix_rl", "chord", "srft"}
