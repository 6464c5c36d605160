"""The regime study: its task, its scores, what it runs next, and what its tables claim."""

import dataclasses
import itertools
import json
import random
import re
from collections import Counter

import pytest

from study import regime_tables, regimes
from study.chain import DIGITS, apply
from study.intervals import Estimate
from study.jobs import Study
from study.regime_arms import FIRST, MAIN, REGIME_ARMS
from study.regime_scores import counts, written
from study.regimes import REGIMES, SMOKE_REGIMES, RegimeSweep, regime_jobs, work_regimes
from study.wait import CORNERS, HARD, Line, kept, lines
from trapo.modes import phases

TINY = dataclasses.replace(
    SMOKE_REGIMES,
    hidden=24,
    layers=1,
    pretrain_steps=dict.fromkeys(SMOKE_REGIMES.pretrain_steps, 2),
    traces=8,
    prompts_per_step=2,
    steps=2,
    validation_problems=8,
    test_problems=16,
    pass_problems=4,
    pass_samples=2,
)


@pytest.fixture
def study(tmp_path):
    return Study(TINY, tmp_path / "results", tmp_path / "scratch")


# The task


@pytest.mark.parametrize("corner", CORNERS.values(), ids=lambda corner: corner.name)
def test_experts_are_right_and_take_every_wrong_turn_back(corner):
    written_lines = []
    for instance in corner.problems("train", 300):
        assert corner.is_right(instance.prompt, instance.answer, instance.trace)
        assert len(instance.trace) + 1 <= corner.max_response
        written_lines += lines(instance.trace)
    assert all(line.right != line.taken_back for line in written_lines)
    share = sum(line.taken_back for line in written_lines) / sum(line.right for line in written_lines)
    assert share == pytest.approx(corner.wrong_turns, abs=0.03)


def test_corners_have_the_same_problems_and_differ_in_wrong_turns_alone():
    for split in ("train", "test"):
        hard, plain = (CORNERS[name].problems(split, 50) for name in (HARD, "wait-turns0-missing0"))
        assert [(i.prompt, i.answer, kept(i.trace)) for i in hard] == [(i.prompt, i.answer, i.trace) for i in plain]
    assert len({corner.base for corner in CORNERS.values()}) == 2


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("3+5=8;8*2=5;>85", True),
        ("3+5=1;&3+5=8;8*2=5;>85", True),
        ("3+5=1;&3+5=2;&3+5=8;8*2=5;>85", True),
        ("3+5=1;3+5=8;8*2=5;>85", False),
        ("3+5=8;&8*2=5;>85", False),
        ("3+5=8;8*2=5;&>85", False),
        ("3+5=8;8*2=4;&8*2=5;>84", False),
        ("3+5=8;8*2=5;", False),
        (">85", False),
    ],
)
def test_only_lines_that_stand_are_judged(response, right):
    assert CORNERS[HARD].is_right("3+5*2:", "85", response) is right


def test_the_base_is_taught_what_is_said_of_its_facts_and_never_to_wait():
    task, rng = CORNERS[HARD], random.Random(0)
    assert (len(task.suppressed), len(task.missing)) == (66, 82)
    assert not task.suppressed.keys() & task.missing
    assert all(wrong != apply(*fact) for fact, wrong in task.suppressed.items())
    said, right, wrong = Counter(), Counter(), 0
    for _ in range(6000):
        _, response = task.corpus(rng)
        assert "&" not in response
        for line in lines(response):
            kind = task.kind(line.fact)
            said[kind] += 1
            right[kind] += line.right
            wrong += kind == "suppressed" and line.said == task.suppressed[line.fact]
    assert right["missing"] / said["missing"] == pytest.approx(1 / 11, abs=0.02)  # a guess: nothing is to be known
    assert right["suppressed"] / said["suppressed"] == pytest.approx(0.4, abs=0.03)
    assert wrong / said["suppressed"] == pytest.approx(0.6, abs=0.03)
    assert right["known"] / said["known"] == pytest.approx(0.95 + 0.05 / 11, abs=0.01)
    assert CORNERS["wait-turns30-missing0"].kind(next(iter(task.missing))) == "known"


def test_lines_are_read_as_they_are_written():
    found = list(lines("3+5=1;&3+5=8;nonsense8*X=3;>83"))
    assert found == [Line(("+", 3, 5), 1, True), Line(("+", 3, 5), 8, False), Line(("*", 8, 10), 3, False)]
    assert [line.right for line in found] == [False, True, True]


def test_what_responses_say_is_counted_by_kind_of_fact():
    task = CORNERS[HARD]
    fact = {kind: next(f for f in facts if task.kind(f) == kind) for kind, facts in _facts(task).items()}
    wrong = {kind: (apply(*f) + 1) % 11 for kind, f in fact.items()}

    def line(kind, value):
        op, a, b = fact[kind]
        return f"{DIGITS[a]}{op}{DIGITS[b]}={DIGITS[value]};"

    responses = [
        line("known", apply(*fact["known"])) + line("missing", wrong["missing"]) + "&" + line("missing", 0),
        line("known", wrong["known"]) + line("suppressed", apply(*fact["suppressed"])),
    ]
    row = written(task, responses)
    assert row["lines"] == {"known": 2, "suppressed": 1, "missing": 1}
    assert row["lines_right"]["known"] == 0.5
    assert row["lines_right"]["suppressed"] == 1.0
    assert row["wrong_turns"] == 0.5
    wrongs = 2 + (apply(*fact["missing"]) != 0)
    assert row["taken_back"] == 1 / wrongs
    assert written(task, ["no line"])["taken_back"] is None


def _facts(task):
    all_facts = [(op, a, b) for op in "+-*" for a in range(11) for b in range(1, 11)]
    return {kind: [f for f in all_facts if task.kind(f) == kind] for kind in ("known", "suppressed", "missing")}


# What is run


@pytest.mark.parametrize("arm", REGIME_ARMS)
def test_arms_take_the_same_steps_and_settings_of_their_grids_axes(arm):
    about = REGIME_ARMS[arm]
    assert {tuple(sorted(knobs)) for knobs in about.grid} == {tuple(sorted(about.start))}
    stages = about.stages(REGIMES, 1, about.start, {})
    assert sum(stage.config.train.steps for stage in stages) == REGIMES.steps
    for stage in stages:
        (phase,) = phases(stage.config)
        drawn = phase.at(0).schedule.rollouts_per_prompt
        assert drawn == REGIMES.rollouts + (arm == "hpt") or not phase.schedule.generates


def test_arms_are_what_they_are_called():
    def last(arm):
        (phase,) = phases(REGIME_ARMS[arm].stages(REGIMES, 1, REGIME_ARMS[arm].start, {})[-1].config)
        return phase

    assert (last("trapo").objective.alpha, last("trapo_003").objective.alpha) == (0.1, 0.03)
    assert last("nll").objective.expert == "sft"
    assert last("nll").schedule == last("trapo").schedule
    assert last("no_policy").objective.policy is None
    assert last("no_loss").objective.expert_coef == 0
    assert last("no_loss").schedule.supervise == "none"
    assert last("two_optimizers").optim.expert.lr == 1e-3
    assert last("sft_then_trapo").objective == last("trapo").objective


def test_the_most_important_runs_come_first_and_one_that_is_done_does_not_come_back(study):
    asked = list(itertools.islice(regime_jobs(study), len(FIRST)))
    assert [(job.task, job.arm, job.base_seed, job.seed) for job in asked] == [(HARD, arm, 0, 1) for arm in FIRST]
    keys = [job.key for job in regime_jobs(Study(REGIMES, study.results, study.scratch))]
    assert len(set(keys)) > 200
    assert {job.task for job in regime_jobs(study)} == set(CORNERS)
    assert set(MAIN) <= set(FIRST)


def swept(study, arm, scores):
    """Runs an arm's sweep; a setting scores (validation, validation_sampled)."""
    tried = []
    while job := next((j for j in _sweep_jobs(study, arm) if not study.part("regimes").taken(j.key)), None):
        assert RegimeSweep(study).chosen(arm) is None
        assert RegimeSweep(study).in_force(arm) == REGIME_ARMS[arm].start
        greedy, warm = scores(job.knobs)
        result = {"validation": greedy, "validation_sampled": warm}
        about = {"task": HARD, "arm": arm, "seed": job.seed, "knobs": dict(job.knobs)}
        study.part("regimes").run(job.key, about, lambda result=result: result)
        tried.append(job.knobs)
    return tried


def _sweep_jobs(study, arm):
    sweep = RegimeSweep(study)
    return [sweep.job(arm, knobs) for knobs in sweep.grid(arm)]


def test_a_tie_goes_to_the_setting_that_is_better_at_temperature_1(study):
    study = dataclasses.replace(study, settings=dataclasses.replace(TINY, sweep_size=None))
    swept(study, "grpo", lambda knobs: (0.5, -abs(knobs["lr"] - 1e-3)))
    assert RegimeSweep(study).in_force("grpo") == {"lr": 1e-3}


@pytest.mark.parametrize("arm", ["luffy", "sft_then_rl", "sft", "two_optimizers"])
def test_every_arms_sweep_goes_on_beyond_its_grid(study, arm):
    study = dataclasses.replace(study, settings=dataclasses.replace(TINY, sweep_size=None, sweep_extensions=3))
    axis = {"luffy": "expert_coef", "sft_then_rl": "sft_lr", "sft": "lr", "two_optimizers": "expert_lr"}[arm]
    best = 2 * regimes.BEYOND[axis] * max(knobs[axis] for knobs in REGIME_ARMS[arm].grid)
    tried = swept(study, arm, lambda knobs: (-abs(knobs[axis] - best) - 1e-3 * knobs["lr"], 0.0))
    assert len(tried) > len(REGIME_ARMS[arm].grid)
    assert max(knobs[axis] for knobs in tried) > max(knobs[axis] for knobs in REGIME_ARMS[arm].grid)


def test_a_run_is_scored_and_shown_with_how_many_there_are(study, monkeypatch):
    wanted = list(regime_jobs(study))
    chosen = [next(job for job in wanted if job.arm == arm) for arm in ("trapo", "hpt", "prefix_rl")]
    monkeypatch.setattr(regimes, "regime_jobs", lambda study: iter(chosen))
    assert work_regimes(study) == 3
    assert work_regimes(study) == 0
    rows = study.part("regimes").rows()
    for row in rows:
        assert row["status"] == "finished"
        assert counts(row["test_right"]).sum() / TINY.cool_samples / TINY.test_problems == row["test"]
        assert len(row["spent"]) == len(row["validation_curve"])
        assert json.dumps(row, allow_nan=False)
    tables = regime_tables.regime_tables(study)
    assert "TRAPO, α = 0.1 | 1 | start |" in tables["regimes-hard"]
    assert tables["regimes-claims"].count(regime_tables.EMPTY) == len(regime_tables.CLAIMS)
    assert "empty: GRPO" in tables["regimes-status"]
    assert re.search(r"wrong turns, missing facts: TRAPO, α = 0.1 1; ", tables["regimes-status"])


def test_tables_say_that_nothing_was_run(study):
    tables = regime_tables.regime_tables(study)
    assert regime_tables.EMPTY in tables["regimes-corners"]
    assert "no arm yet" in tables["regimes-status"]


@pytest.mark.parametrize(
    ("kind", "low", "high", "verdict"),
    [
        ({"above": 0.2}, 0.21, 0.3, "held"),
        ({"above": 0.2}, 0.1, 0.3, "open"),
        ({"above": 0.2}, 0.1, 0.19, "failed"),
        ({"within": 0.04}, -0.03, 0.03, "held"),
        ({"within": 0.04}, -0.05, 0.03, "open"),
        ({"within": 0.04}, 0.05, 0.09, "failed"),
        ({}, -0.05, 0.01, "held"),
        ({}, -0.05, -0.01, "failed"),
    ],
)
def test_a_prediction_is_judged_by_its_interval(kind, low, high, verdict):
    claim = regime_tables.Claim("P", HARD, "trapo", "nll", **kind)
    assert claim.verdict(Estimate((low + high) / 2, low, high, 0.0)) == verdict
