"""Rollouts that are drawn while the update before them runs (rollout.ahead=1)."""

import dataclasses
import json
import signal
import threading
from pathlib import Path

import ahead_run
import forked
import pytest
import torch
from killed_run import settings, train_here
from safetensors.torch import load_file
from test_resume import outcome

from trapo import trainer
from trapo.config import load_config
from trapo.data.encode import EncodedProblem, decode_text
from trapo.data.sampling import derive_seed, load_train_set, problems_at
from trapo.errors import TrapoError
from trapo.models.loading import load_trained
from trapo.modes import phases
from trapo.modes.drawing import Ahead
from trapo.rollouts import Rollout, assign_advantages, collect
from trapo.runs.ranks import ALONE
from trapo.tools.timing import StepTimer

AHEAD = [word.format(here=Path(ahead_run.__file__)) for word in ahead_run.AHEAD]
GRPO = ["mode=grpo", "train.steps=3", "optim.schedule=constant", "optim.warmup_steps=0", "objective.entropy_coef=0"]
GRPO += ["optim.eps=1e-3", "checkpoint.every=0", "eval.every=0", "eval.before=false"]


@pytest.fixture
def engines(monkeypatch):
    """The engines that runs of this test have made."""
    made = []
    monkeypatch.setattr(trainer, "make_engine", lambda *a, **k: made.append(ahead_run.CopyEngine(*a, **k)) or made[-1])
    monkeypatch.setattr(trainer, "write_report", lambda *_: None)
    return made


def by_hand(config):
    """The weights after a run of GRPO whose rollouts are one update old, in plain torch."""
    model, tokenizer = load_trained(config.model, ALONE, "float32", check=True, change=lambda m: None)
    (phase,) = phases(config)
    problems = load_train_set(config.data, [phase], tokenizer, lambda _: None, mode="grpo", max_response_tokens=16)
    engine = ahead_run.CopyEngine(config.rollout, model, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr, eps=config.optim.eps, weight_decay=0.0)
    weights = [{name: value.clone() for name, value in model.state_dict().items()}]
    ratios = []

    def score(rollouts):
        return [trainer.Reward(ahead_run.by_length(decode_text(tokenizer, r.response_ids), ""), "ok") for r in rollouts]

    for step in range(config.train.steps):
        engine.model.load_state_dict(weights[max(step - 1, 0)])
        engine.engine.sync(engine.model)
        some = problems_at(step, problems, 2, seed=config.seed, shuffle=config.data.shuffle)
        seed = derive_seed(config.seed, "step", step)
        rollouts = collect(some, phase.schedule, engine, score, temperature=1.0, max_response_tokens=16, seed=seed)
        assign_advantages(rollouts, "all", phase.std, phase.grouping)
        tokens = sum(len(r.own_ids) for r in rollouts)
        for r in rollouts:
            ids = torch.tensor([r.problem.prompt_ids + r.own_ids])
            own = slice(len(r.problem.prompt_ids) - 1, -1)
            logps = model(input_ids=ids).logits[0, own].log_softmax(-1).gather(1, torch.tensor(r.own_ids)[:, None])
            ratio = (logps[:, 0] - torch.tensor(r.rollout_logprobs)).exp()
            ratios.append((ratio - 1).abs().max().item() if step else 0.0)
            clipped = ratio.clamp(1 - phase.objective.clip_low, 1 + phase.objective.clip_high)
            (-torch.minimum(ratio * r.advantage, clipped * r.advantage).sum() / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
    assert max(ratios) > 0.05  # else a loop without the ratios would do as well
    return weights


def test_a_run_is_the_loop_by_hand_whose_rollouts_are_one_update_old(tiny_model_path, tmp_path, engines):
    config = settings(tiny_model_path, tmp_path / "run", *AHEAD, *GRPO)
    train_here(config)
    weights = by_hand(config)
    found = load_file(tmp_path / "run" / "final" / "model.safetensors")
    before = load_file(tiny_model_path / "model.safetensors")
    for name in found:
        assert not found[name].equal(before[name])
        torch.testing.assert_close(found[name], weights[-1][name], rtol=1e-4, atol=2e-5)
    # The first step draws its own in the main thread, as the guard does; the others' are drawn aside.
    aside = [first for other, first in engines[0].seen if other]
    assert len(aside) == 2
    for drawn_with, expected in zip(aside, weights, strict=False):
        torch.testing.assert_close(drawn_with, next(iter(expected.values())), rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_truncated_importance_sampling_has_the_ratio_of_learner_and_sampler(tiny_model_path, tmp_path, engines):
    run_dir, steps = tmp_path / "run", ["train.steps=2", "optim.lr=0.1"]
    train_here(settings(tiny_model_path, run_dir, *AHEAD, *GRPO, *steps, "objective.tis_cap=100.0"))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["ratio_mean"] for row in rows] == [1, 1]
    assert rows[0]["tis_weight"] == pytest.approx(1, abs=1e-4)
    assert abs(rows[1]["tis_weight"] - 1) > 1e-3


# An optimizer step a step, so step:5 dies in the step after a checkpoint.
KILLS = ["step:5", *(pytest.param(when, marks=pytest.mark.slow) for when in ("step:4", "save:2", "log:4"))]


@pytest.fixture(scope="module")
def undisturbed(tiny_model_path, tmp_path_factory):
    return run(tiny_model_path, tmp_path_factory.mktemp("undisturbed") / "run")


def run(model, run_dir, kill_at="none", expect=0):
    done = forked.run("ahead_run:main", [model, run_dir, kill_at, *AHEAD])
    assert done.returncode == expect, done.stdout + done.stderr
    return run_dir


@pytest.mark.parametrize("kill_at", KILLS)
def test_a_killed_run_continues_with_the_rollouts_that_waited(kill_at, undisturbed, tiny_model_path, tmp_path):
    run_dir = run(tiny_model_path, tmp_path / "run", kill_at, expect=-signal.SIGKILL)
    run(tiny_model_path, run_dir)
    rows, weights, accuracy, evals = outcome(run_dir)
    expected_rows, expected_weights, expected_accuracy, expected_evals = outcome(undisturbed)
    assert (rows, accuracy, evals) == (expected_rows, expected_accuracy, expected_evals)
    assert len({row["grad_norm"] for row in rows}) == len(rows) == 6
    assert all(weights[name].equal(expected_weights[name]) for name in expected_weights)


def test_a_checkpoint_gives_rollouts_back_as_they_were(tmp_path):
    problems = [EncodedProblem(None, (1, 2, i), ()) for i in (3, 4)]
    in_prompt = dataclasses.replace(problems[1], prompt_ids=(1, 7, 8, 4))
    drawn = [
        Rollout(problems[0], 0, 0, 0.0, (), (5, 6), False, True, 0.5, advantage=-0.25, rollout_logprobs=(-0.1, -3.0)),
        Rollout(in_prompt, 1, 1, 0.5, (9,), (6,), True, False, 1.0, "error", 0.1, False, (0.3,), "no", (-1.0,)),
    ]
    ahead, found = Ahead(), Ahead()
    ahead.next = lambda: drawn
    with ahead.meanwhile(StepTimer()):
        pass
    torch.save(ahead.state_dict(), tmp_path / "state.pt")
    found.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), problems)
    assert found.drawn == drawn
    assert all(r.behind for r in found.drawn)


def test_what_fails_while_it_draws_ends_the_step_once_its_update_is_made():
    ahead, done = Ahead(), []

    def fail():
        raise TrapoError("rollout.server_url: the vLLM server does not answer")

    ahead.next = fail
    with pytest.raises(TrapoError, match="does not answer"), ahead.meanwhile(StepTimer()):
        done.append("update")
    assert done == ["update"]
    assert ahead.drawn is None


def test_an_update_that_fails_does_not_wait_for_what_is_drawn():
    ahead, release = Ahead(), threading.Event()
    ahead.next = lambda: release.wait(60)
    with pytest.raises(ValueError, match="update"), ahead.meanwhile(StepTimer()):
        raise ValueError("update")
    assert ahead.drawn is None
    assert release.wait(0) is False  # it is at it still
    release.set()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.engine=hf"], r"got 1 with rollout\.engine=hf, which generates in this process"),
        (["mode=amft", *ahead_run.SERVER], "got 1 with mode amft, whose update is more than its loss"),
        (["mode=self_distill", *ahead_run.SERVER], "got 1 with mode self_distill: a teacher's divergence"),
        (["mode=prefix_rl", *ahead_run.SERVER], r"got 1 with guidance\.find, .*; accepted: false"),
    ],
)
def test_what_cannot_be_drawn_ahead_is_refused_in_one_line(overrides, words, tmp_path):
    config = load_config("demo", [f"run_dir={tmp_path}", "rollout.ahead=1", *overrides])
    with pytest.raises(TrapoError, match=rf"^rollout\.ahead: {words}") as error:
        phases(config)
    assert "\n" not in str(error.value)


def test_several_ranks_are_refused():
    with pytest.raises(TrapoError, match=r"^rollout\.ahead: got 1 with 2 ranks, .*; accepted: 1$"):
        Ahead(True, 2)


@pytest.mark.parametrize("mode", ["grpo", "luffy", "hpt", "relift", "chord", "sft"])
def test_other_modes_may_draw_ahead(mode, tmp_path):
    phases(load_config("demo", [f"run_dir={tmp_path}", f"mode={mode}", "rollout.ahead=1", *ahead_run.SERVER]))


def test_nothing_is_drawn_ahead_unless_asked():
    ahead = Ahead()
    with ahead.meanwhile(StepTimer()):
        pass
    assert ahead.drawn is None
    assert ahead.state_dict() == {}
