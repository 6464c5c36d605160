"""Modes amft and bridge make the updates that their formulas say, held against float64 written out by hand."""

import copy
import dataclasses
import json
import signal

import forked
import pytest
import torch
from killed_run import settings, train_here
from rich.console import Console
from safetensors.torch import load_file
from test_learner import model  # noqa: F401

from trapo import trainer
from trapo.config import merge_config
from trapo.data.encode import EncodedProblem, Trace
from trapo.data.problem import Problem
from trapo.errors import TrapoError
from trapo.models import lora
from trapo.modes import phases
from trapo.rollouts import Rollout
from trapo.runs.ranks import Ranks
from trapo.tools.timing import StepTimer
from trapo.trainer import make_learner

EPS = 1e-4  # of AdamW: with less, entries that are nothing but rounding would move by the learning rate


def rollouts(seed, rewards=(1.0, 0.0, 0.0), trace=True):
    """One prompt with own rollouts, whose mean reward is their baseline, and its trace."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n):
        return tuple(torch.randint(3, 40000, (n,), generator=generator).tolist())

    expert = Trace(ids(6), ())
    text = Problem(str(seed), ({"role": "user", "content": "?"},), "1", (), "test")
    problem = EncodedProblem(text, ids(4), (expert,))
    mean = sum(rewards) / len(rewards)
    made = [
        Rollout(problem, 0, 0, 0.0, (), ids(3 + i), False, True, reward, "ok", reward - mean)
        for i, reward in enumerate(rewards)
    ]
    if trace:
        made.append(Rollout(problem, 0, 1, 1.0, expert.token_ids, (), True, True))
    return made


def rows_of(net, sample, expert):
    """[(log-probabilities, entropies, advantage)] of the own tokens, or of the trace's."""
    found = []
    for r in sample:
        if bool(r.prefix_ids) == expert:
            whole = torch.tensor([r.problem.prompt_ids + r.response_ids])
            log_p = net(whole).logits[0, :-1].log_softmax(-1)
            chosen = log_p.gather(-1, whole[0, 1:, None])[:, 0]
            start = len(r.problem.prompt_ids) - 1
            found.append((chosen[start:], -(log_p.exp() * log_p).sum(-1)[start:], r.advantage))
    return found


def losses(net, sample):
    """(L_RL, L_SFT or None, H) with everything by hand."""
    own, traces = rows_of(net, sample, False), rows_of(net, sample, True)
    rl = -sum((a * (p - p.detach()).exp()).sum() for p, _, a in own) / sum(len(p) for p, _, _ in own)
    sft = -torch.cat([p for p, _, _ in traces]).mean() if traces else None
    return rl, sft, float(torch.cat([h for _, h, _ in own]).mean().detach())


def gradients(loss, parameters):
    return torch.autograd.grad(loss, parameters, allow_unused=True)


class Adam:
    """AdamW without decay, for a list of float64 tensors."""

    def __init__(self, like, lr):
        self.lr, self.t = lr, 0
        self.m, self.v = [torch.zeros_like(p) for p in like], [torch.zeros_like(p) for p in like]

    def __call__(self, values, grads):
        self.t += 1
        for p, g, m, v in zip(values, grads, self.m, self.v, strict=True):
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            p.data.sub_(self.lr * (m / (1 - 0.9**self.t)) / ((v / (1 - 0.999**self.t)).sqrt() + EPS))


def clipped(grads, limit=1.0):
    norm = sum((g * g).sum() for g in grads) ** 0.5
    return [g * min(1.0, limit / float(norm)) for g in grads]


def dot(a, b):
    return float(sum((x * y).sum() for x, y in zip(a, b, strict=True)))


def learn(phase, learner, sample, again=None):
    update = phase.update(sample, learner, 0, StepTimer(), again or (lambda: []))
    return update, phase.memory.after(sample, learner, 0)


# AMFT --------------------------------------------------------------------------------------------------------------

AMFT = ["mode=amft", f"optim.eps={EPS}", "hybrid.meta_lr=0.1", "hybrid.entropy_lr=0.05"]


def amft(model, *overrides):  # noqa: F811
    config = merge_config({"optim": {"lr": 1e-3}}, [*AMFT, *overrides])
    (phase,) = phases(config)
    net = copy.deepcopy(model)
    return phase, make_learner(config, net, pad_id=2, phase=phase), net


def test_amft_moves_weights_and_mu_as_its_formula_in_float64(model):  # noqa: F811
    phase, learner, net = amft(model)
    other = copy.deepcopy(model).double()
    values = list(other.parameters())
    adam, mu, target, direction = Adam(values, 1e-3), 0.8, None, None
    for seed in (1, 1, 2):
        sample = rollouts(seed)
        rl, sft, entropy = losses(other, sample)
        of_rl, of_sft = gradients(rl, values), gradients(sft, values)
        target = entropy if target is None else target
        cosine = 0.0
        if direction is not None:
            cosine = dot(of_rl, direction) / (dot(of_rl, of_rl) * dot(direction, direction)) ** 0.5
        mu = min(max(mu + 0.1 * cosine + 0.05 * (target - entropy), 0.05), 0.95)
        direction = [e - o for e, o in zip(of_sft, of_rl, strict=True)]
        adam(values, clipped([(1 - mu) * o + mu * e for o, e in zip(of_rl, of_sft, strict=True)]))
        update, shown = learn(phase, learner, sample)
        assert shown == pytest.approx({"mu": mu, "meta_gradient": cosine}, abs=2e-6)
        assert (update.optimizer_steps, update.skipped_steps) == (1, 0)
    assert mu != pytest.approx(0.8, abs=1e-3)  # the same prompt twice: the gradients know each other
    for (name, p), q, start in zip(net.named_parameters(), values, model.parameters(), strict=True):
        torch.testing.assert_close(p.detach().double() - start, q.detach() - start, rtol=0, atol=2e-6, msg=name)
    assert (
        max(float((p - q).detach().abs().max()) for p, q in zip(net.parameters(), model.parameters(), strict=True))
        > 1e-4
    )


def test_amfts_meta_gradient_is_the_derivative_of_the_next_rewards_by_mu(model):  # noqa: F811
    """Of J at θ − lr · ((1 − μ) ∇L_RL + μ ∇L_SFT), by differences: its sign says which way μ should go."""
    other, lr, h = copy.deepcopy(model).double(), 1e-2, 0.1
    values, start = list(other.parameters()), [p.detach().clone() for p in other.parameters()]
    rl, sft, _ = losses(other, rollouts(1))
    of_rl, of_sft = gradients(rl, values), gradients(sft, values)
    objective = []
    for mu in (0.5 - h, 0.5, 0.5 + h):
        for p, s, o, e in zip(values, start, of_rl, of_sft, strict=True):
            p.data.copy_(s - lr * ((1 - mu) * o + mu * e))
        found = rows_of(other, rollouts(2), False)
        count = sum(len(p) for p, _, _ in found)
        objective.append(sum((a * p).sum() for p, _, a in found) / count)  # of −L_RL, by the gradient of log p
        if mu == 0.5:
            of_next = gradients(-objective[-1], values)
    by_difference = float(objective[2] - objective[0]) / (2 * h)
    direction = [e - o for e, o in zip(of_sft, of_rl, strict=True)]
    assert lr * dot(of_next, direction) == pytest.approx(by_difference, rel=2e-3)  # norms of Llama's are in float32
    phase, *_ = amft(model)
    phase.memory.direction = direction
    phase.memory._mix(0.0, {"own": list(of_next)})
    scale = (dot(of_next, of_next) * dot(direction, direction)) ** 0.5
    assert phase.memory.shown["meta_gradient"] == pytest.approx(by_difference / lr / scale, rel=2e-3)


def test_amfts_mu_stays_within_its_bounds_and_its_ends_are_rl_and_sft(model):  # noqa: F811
    for mix, expected in (("0", "rl"), ("1", "sft")):
        ends = (f"hybrid.mix={mix}", "hybrid.low=0", "hybrid.high=1", "hybrid.meta_lr=0", "hybrid.entropy_lr=0")
        phase, learner, net = amft(model, *ends, "optim.grad_clip=0")
        learn(phase, learner, rollouts(1))
        config = merge_config({"optim": {"lr": 1e-3}}, [f"optim.eps={EPS}", "optim.grad_clip=0"])
        (plain,) = phases(merge_config({}, ["mode=grpo" if expected == "rl" else "mode=sft"]))
        alone = copy.deepcopy(model)
        sample = [r for r in rollouts(1) if bool(r.prefix_ids) == (expected == "sft")]
        make_learner(config, alone, pad_id=2).update(sample, plain.objective, seed=0)
        for p, q in zip(net.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=2e-7)
    phase, learner, _ = amft(model, "hybrid.low=0.3", "hybrid.high=0.6")
    assert phase.memory.mu == 0.6
    phase.memory._mix(-1e9, {})
    assert phase.memory.mu == 0.3


# BRIDGE ------------------------------------------------------------------------------------------------------------

BRIDGE = ["mode=bridge", "lora.rank=5", f"optim.eps={EPS}", "optim.expert.schedule=constant"]


def bridge(model, *overrides):  # noqa: F811
    pytest.importorskip("peft", reason="pip install 'trapo-kernels[lora]'")
    config = merge_config({"optim": {"lr": 1e-3, "expert": {"lr": 3e-3}}}, [*BRIDGE, *overrides])
    (phase,) = phases(config)
    net = copy.deepcopy(model)
    lora.attach(net, config.lora, base="", seed=0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # an untrained B is 0, and A has no gradient then
        for name, p in net.named_parameters():
            if ".lora_B." in name:
                p.copy_(0.05 * torch.randn(p.shape, generator=generator))
    return phase, make_learner(config, net, pad_id=2, phase=phase), net


def adapter(net):
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def theta_of(name, tensor):
    """The part of the first 3 of 5 ranks, and that of the others."""
    return (tensor[:3], tensor[3:]) if ".lora_A." in name else (tensor[:, :3], tensor[:, 3:])


def test_bridge_moves_both_adapters_and_the_copy_as_its_formula_in_float64(model):  # noqa: F811
    share = 0.3
    phase, learner, net = bridge(model, f"hybrid.mix={share}")
    other = copy.deepcopy(net).double()
    names, values = zip(*adapter(other).items(), strict=True)
    start = {name: p.detach().clone() for name, p in adapter(net).items()}
    theta, w = zip(*(theta_of(n, p.data) for n, p in zip(names, values, strict=True)), strict=True)
    hat = [t.clone() for t in theta]
    of_theta, of_w, of_hat = Adam(theta, 1e-3), Adam(w, 3e-3), Adam(hat, 1e-3)

    def halves(loss):
        grads = gradients(loss, values)
        return zip(*(theta_of(n, g) for n, g in zip(names, grads, strict=True)), strict=True)

    for seed in (1, 2, 3):
        sample, alone = rollouts(seed), rollouts(seed + 10, rewards=(0.0, 1.0, 1.0), trace=False)
        rl, sft, _ = losses(other, sample)
        rl_theta, rl_w = halves(rl)
        sft_theta, sft_w = halves(sft)
        kept = [t.clone() for t in theta]
        for t, h in zip(theta, hat, strict=True):
            t.copy_(h)
        hat_theta, hat_w = halves(losses(other, alone)[0])
        for t, k in zip(theta, kept, strict=True):
            t.copy_(k)
        of_theta(theta, clipped([(1 - share) * o + share * e for o, e in zip(rl_theta, sft_theta, strict=True)]))
        of_w(
            w,
            clipped([(1 - share) * e + share * (o - a) for e, o, a in zip(sft_w, rl_w, hat_w, strict=True)]),
        )
        of_hat(hat, clipped(hat_theta))
        _, shown = learn(phase, learner, sample, lambda alone=alone: alone)
        assert shown["reward_alone"] == pytest.approx(2 / 3)
        assert shown["rl_gain"] == pytest.approx(-1 / 3)
    moved = {"theta": 0.0, "w": 0.0, "hat": 0.0}
    for name, value, h, copied in zip(names, values, hat, phase.memory.alone, strict=True):
        mine, began = theta_of(name, adapter(net)[name].detach().double()), theta_of(name, start[name])
        expected = (*theta_of(name, value.detach()), h)
        found = (*mine, theta_of(name, copied.detach().double())[0])
        for part, a, b, s in zip(moved, found, expected, (*began, began[0]), strict=True):
            torch.testing.assert_close(a - s, b - s, rtol=0, atol=2e-6, msg=f"{part} of {name}")
            moved[part] = max(moved[part], float((a - s).abs().max()))
    assert min(moved.values()) > 1e-4
    frozen = {n: p for n, p in net.named_parameters() if not p.requires_grad}
    assert all(p.equal(dict(other.named_parameters())[n].float()) for n, p in frozen.items())


@pytest.mark.parametrize(("share", "plain_mode"), [("0", "grpo"), ("1", "sft")])
def test_the_ends_of_bridge_with_w_frozen_are_rl_and_sft_on_theta(model, share, plain_mode):  # noqa: F811
    phase, learner, net = bridge(model, f"hybrid.mix={share}", "optim.expert.lr=1e-30", "optim.grad_clip=0")
    start = {name: p.detach().clone() for name, p in adapter(net).items()}
    learn(phase, learner, rollouts(1), lambda: rollouts(9, trace=False))
    _, plain, alone = bridge(model, "optim.grad_clip=0", "hybrid.mix=0.5")
    (of_mode,) = phases(merge_config({}, [f"mode={plain_mode}"]))
    sample = [r for r in rollouts(1) if bool(r.prefix_ids) == (plain_mode == "sft")]
    plain.begin(dataclasses.replace(plain.optim, expert=merge_config({}).optim.expert), 100)
    plain.update(sample, of_mode.objective, seed=0)
    for name, p in adapter(net).items():
        (theta, w), (expected, _) = theta_of(name, p), theta_of(name, adapter(alone)[name])
        torch.testing.assert_close(theta, expected, rtol=0, atol=2e-7, msg=name)
        assert w.equal(theta_of(name, start[name])[1])


def test_while_the_copy_is_theta_nothing_is_gained_and_w_does_not_move_for_it(model):  # noqa: F811
    phase, learner, net = bridge(model, "hybrid.mix=1")
    start = {name: p.detach().clone() for name, p in adapter(net).items()}
    sample = rollouts(1)
    _, shown = learn(phase, learner, sample, lambda: sample)
    assert (shown["gain_gradient"], shown["rl_gain"]) == (0.0, 0.0)
    assert all(theta_of(n, p)[1].equal(theta_of(n, start[n])[1]) for n, p in adapter(net).items())
    _, shown = learn(phase, learner, rollouts(2), lambda: rollouts(2))  # θ̂ went its own way by now
    assert shown["gain_gradient"] > 0


# Whole runs --------------------------------------------------------------------------------------------------------

RUNS = {"amft": ["mode=amft"], "bridge": ["mode=bridge", "lora.rank=4", "optim.expert.lr=1e-2"]}
SMALL = ["train.updates_per_step=1", "guidance.group_size=4"]
# A reward that some rollouts of random weights get, so that there is something to learn from.
REWARD = "def even(text, answer):\n    return float(len(text) % 2 == 0)\n"


def options(mode, folder):
    (folder / "reward.py").write_text(REWARD)
    return [*RUNS[mode], *SMALL, f"reward.function={folder / 'reward.py'}:even"]


@pytest.mark.slow  # a run of a real loop, and the same killed on its way
@pytest.mark.parametrize("mode", RUNS)
def test_a_killed_run_goes_on_with_what_the_mode_remembers(mode, tiny_model_path, tmp_path):
    if mode == "bridge":
        pytest.importorskip("peft", reason="pip install 'trapo-kernels[lora]'")
    more = options(mode, tmp_path)
    train_here(settings(tiny_model_path, tmp_path / "whole", *more))
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    if mode == "amft":
        assert rows[0]["mu"] == 0.8
        assert len({row["mu"] for row in rows}) == len(rows)
    else:
        assert (rows[0]["rl_gain"], rows[0]["gain_gradient"]) == (0.0, 0.0)
        assert all(row["gain_gradient"] > 0 for row in rows[1:])
    for kill_at, code in (("log:5", -signal.SIGKILL), ("none", 0)):
        done = forked.run("killed_run:main", [tiny_model_path, tmp_path / "parts", kill_at, *more])
        assert done.returncode == code, done.stdout + done.stderr
    one, two = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("whole", "parts"))
    assert all(one[name].equal(two[name]) for name in one)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mode=bridge"], r"lora\.rank: mode bridge learns two adapters, half of the ranks each: at least 2, got 0"),
        (["mode=bridge", "lora.rank=4", "optim.weight_decay=0.1"], r"optim\.weight_decay: mode bridge .*; 0, got 0\.1"),
        (["mode=amft", "train.updates_per_step=2"], r"train\.updates_per_step: mode amft .* must be 1, got 2"),
        (["mode=amft", "hybrid.mix=1.5"], r"hybrid\.mix: got 1\.5; must be <= 1"),
        (["mode=chord", "hybrid.high=1.5"], r"hybrid\.high: got 1\.5; must be <= 1"),
        (["mode=prefix_rft", "hybrid.keep=2"], r"hybrid\.keep: got 2\.0; must be <= 1"),
        (["mode=grpo", "hybrid.meta_lr=0.1"], r"hybrid\.meta_lr: only amft reads it; got mode grpo"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_line(overrides, message):
    with pytest.raises(TrapoError, match=message) as error:
        merge_config({}, overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", RUNS)
def test_several_ranks_are_refused_before_a_model_is_loaded(mode, tmp_path):
    config = settings(tmp_path / "no-model", tmp_path / "run", *RUNS[mode], *SMALL)
    refused = f"^mode: {mode} is for one process; got 2 ranks$"
    with pytest.raises(TrapoError, match=refused):
        trainer._train(config, Console(quiet=True), Ranks(0, 2), restart_finished=False, accept_changed=False)
    assert not (tmp_path / "run").exists()
