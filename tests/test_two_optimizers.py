"""optim.expert: expert tokens and own tokens each have a mean, an AdamW and a learning rate of their own."""

import copy
import dataclasses
import json
import shutil
import signal

import forked
import pytest
import torch
from killed_run import settings, train_here
from rank_processes import run_ranks
from safetensors.torch import load_file
from test_learner import model, rollouts, same, updated  # noqa: F401
from test_ranks import SETTINGS, close, outcome

import trapo_kernels as tk
from trapo.config import merge_config
from trapo.errors import TrapoError
from trapo.models.optimizer import Kept
from trapo.modes import phases
from trapo.trainer import make_learner

EXACT = ["optim.grad_clip=0", "optim.eps=1e-20"]
TWO = ["optim.expert.lr=3e-3", "optim.weight_decay=0.1"]


def moved(model, *overrides, objective, sample, steps=3):  # noqa: F811
    fresh = copy.deepcopy(model)
    learner = make_learner(merge_config({"optim": {"lr": 1e-3}, "train": {"steps": steps}}, overrides), fresh, pad_id=2)
    for _ in range(steps):
        report = learner.update(sample, objective, seed=0)
    return {name: p.detach().clone() for name, p in fresh.named_parameters()}, report


def equal(a, b):
    return all(a[name].equal(b[name]) for name in a)


def test_without_an_expert_token_the_model_moves_as_under_plain_grpo(model):  # noqa: F811
    sample = [r for r in rollouts() if not r.guided]
    one, _ = moved(model, "optim.weight_decay=0.1", objective=tk.Objective.grpo(), sample=sample)
    two, report = moved(model, *TWO, objective=tk.Objective.grpo(expert="sft"), sample=sample)
    assert equal(one, two)
    assert report.metrics["grad_norm_expert"] is None


def test_without_a_policy_term_it_moves_as_under_plain_sft(model):  # noqa: F811
    alone = ["optim.lr=3e-3", "optim.schedule=linear", "optim.weight_decay=0.1"]
    sample = [dataclasses.replace(r, own_ids=()) for r in rollouts() if r.guided]
    one, _ = moved(model, *alone, objective=tk.Objective.sft(), sample=sample)
    two, _ = moved(model, *TWO, objective=tk.Objective.sft(), sample=sample)
    assert equal(one, two)


def test_both_updates_are_added_each_of_its_own_mean_from_the_same_weights(model):  # noqa: F811
    sample, objective = rollouts(), tk.Objective.trapo(expert="sft")
    both, report = moved(model, *TWO, objective=objective, sample=sample, steps=1)
    context = [dataclasses.replace(r, supervised=False) for r in sample]
    own, _ = moved(model, "optim.weight_decay=0.1", objective=tk.Objective.trapo(expert=None), sample=context, steps=1)
    traces = [dataclasses.replace(r, own_ids=()) for r in sample if r.supervised]
    expert, _ = moved(
        model, "optim.lr=3e-3", "optim.weight_decay=0.1", objective=tk.Objective.sft(), sample=traces, steps=1
    )
    for name, start in model.named_parameters():
        expected = start + (own[name] - start) + (expert[name] - start)
        torch.testing.assert_close(both[name], expected.detach(), rtol=0, atol=3e-7)
    assert not same(both, own, 1e-4)
    assert not same(both, expert, 1e-4)
    assert report.metrics["lr_expert"] == 3e-3


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_updates_are_those_of_two_adamws_of_torch_on_two_copies(decay):
    """Over some steps, in float64, to 1e-12."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.nn.Parameter(torch.randn(40, generator=generator, dtype=torch.float64))
    copies = {name: torch.nn.Parameter(theta.detach().clone()) for name in ("expert", "own")}
    rates = {"expert": 1e-2, "own": 1e-3}
    plain = {name: torch.optim.AdamW([p], lr=rates[name], weight_decay=decay) for name, p in copies.items()}
    ours = {name: torch.optim.AdamW([theta], lr=rate, weight_decay=0.0) for name, rate in rates.items()}
    kept = Kept([theta])
    for step in range(5):
        start = theta.detach().clone()
        for name in ("expert", "own") if step != 2 else ("own",):
            grad = torch.randn(40, generator=generator, dtype=torch.float64)
            theta.grad = grad.clone()
            kept.keep(name)
            theta.grad = None
            copies[name].data.copy_(start)
            copies[name].grad = grad
            plain[name].step()
        updates = sum(p.detach() - start for n, p in copies.items() if step != 2 or n == "own")
        kept.step(ours, decay)
        torch.testing.assert_close(theta.detach(), start + updates, rtol=0, atol=1e-12)


def test_the_weight_of_the_expert_term_changes_nothing_any_more(model):  # noqa: F811
    one, _ = moved(model, *TWO, *EXACT, objective=tk.Objective.trapo(), sample=rollouts())
    seven, _ = moved(model, *TWO, *EXACT, objective=tk.Objective.trapo(expert_coef=7.0), sample=rollouts())
    assert same(one, seven, 2e-5)
    plain, _ = moved(model, *EXACT, objective=tk.Objective.trapo(), sample=rollouts())
    heavy, _ = moved(model, *EXACT, objective=tk.Objective.trapo(expert_coef=7.0), sample=rollouts())
    assert not same(plain, heavy, 1e-4)


def test_a_killed_run_goes_on_with_both(tiny_model_path, tmp_path):
    options = ["optim.expert.lr=1e-2", "train.updates_per_step=1"]
    train_here(settings(tiny_model_path, tmp_path / "whole", *options))
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["lr_expert"] for row in rows] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 7.5e-3, 5e-3, 2.5e-3])
    assert all(row["grad_norm_expert"] > 0 for row in rows)
    for kill_at, code in (("log:5", -signal.SIGKILL), ("none", 0)):
        done = forked.run("killed_run:main", [tiny_model_path, tmp_path / "parts", kill_at, *options])
        assert done.returncode == code, done.stdout + done.stderr
    one, two = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("whole", "parts"))
    assert all(one[name].equal(two[name]) for name in one)


@pytest.mark.parametrize("mode", ["grpo", "sft"])
def test_a_mode_with_one_kind_of_token_has_no_use_for_two(mode):
    with pytest.raises(TrapoError, match=r"optim\.expert\.lr: an optimizer for expert tokens needs some beside own"):
        phases(merge_config({}, [f"mode={mode}", "optim.expert.lr=1e-3"]))


def test_prefixes_without_a_loss_are_context_and_in_no_mean(model):  # noqa: F811
    """The gradient is GRPO's on contexts that have the prefix, with its normaliser and its entropy bonus."""
    (phase,) = phases(merge_config({}, ["objective.expert_coef=0", "objective.entropy_coef=0.01"]))
    assert phase.schedule.supervise == "none"
    (phase,) = phases(merge_config({}, ["objective.expert=none"]))
    assert phase.schedule.supervise == "none"
    (phase,) = phases(merge_config({}, []))
    assert phase.schedule.supervise == "every"
    sample = [dataclasses.replace(r, supervised=False) for r in rollouts()]
    objective = tk.Objective.trapo(expert_coef=0.0, entropy_coef=0.01)
    found, _ = updated(model, objective=objective, sample=sample)
    moved_in = [
        dataclasses.replace(
            r,
            problem=dataclasses.replace(r.problem, prompt_ids=r.problem.prompt_ids + r.prefix_ids),
            prefix_ids=(),
        )
        for r in sample
    ]
    expected, _ = updated(model, objective=tk.Objective.trapo(expert=None, entropy_coef=0.01), sample=moved_in)
    assert same(found, expected, 2e-5)


@pytest.mark.slow
def test_two_ranks_make_one_ranks_updates_and_each_goes_on_from_the_others_checkpoint(tiny_model_path, tmp_path):
    options = ("optim.expert.lr=5e-3", "optim.expert.schedule=constant", "train.updates_per_step=1", *SETTINGS)
    for ranks in (1, 2):
        run_ranks(ranks, "train", tiny_model_path, tmp_path / f"by-{ranks}", *options)
    expected = load_file(tmp_path / "by-1" / "final" / "model.safetensors")
    plain = tmp_path / "plain"
    run_ranks(1, "train", tiny_model_path, plain, *options[2:])
    assert not same(expected, load_file(plain / "final" / "model.safetensors"), 1e-3)  # the second optimizer counts
    rows = {ranks: outcome(tmp_path / f"by-{ranks}")[0] for ranks in (1, 2)}
    for row, of_one in zip(rows[2], rows[1], strict=True):
        close(row, of_one)
    for before, after in ((1, 2), (2, 1), (2, 2)):
        run_dir = tmp_path / f"from-{before}-by-{after}"
        shutil.copytree(tmp_path / f"by-{before}", run_dir)
        (run_dir / "summary.json").unlink()
        shutil.rmtree(run_dir / "final")
        shutil.rmtree(run_dir / "checkpoints" / "step-000006")
        (out, *_) = run_ranks(after, "train", tiny_model_path, run_dir, *options, f"run_dir={run_dir}")
        assert "after step 4" in out
    for run_dir in sorted(tmp_path.glob("*by-*")):
        weights = load_file(run_dir / "final" / "model.safetensors")
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=0, msg=f"{name} of {run_dir.name}")
