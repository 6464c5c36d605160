"""The study's harness (study): its tasks, its engine, its bookkeeping, and one tiny run from end to end."""

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from study import plots, summary
from study.ablations import CONDITIONS, RETUNED, TRAPO_VARIANTS
from study.arms import ARMS
from study.base import base_model, base_path, digest, make_base
from study.engine import StudyEngine
from study.evaluate import packed, unpacked
from study.intervals import estimate
from study.jobs import Study, Sweep, changes_nothing, jobs, work
from study.loop import RandomPrefixProblem, Run, execute
from study.model import new_model
from study.results import Results
from study.settings import FULL, SMOKE
from study.task import EOS, PAD, encode, encoded, tasks
from trapo.engines.hf import HFEngine
from trapo.engines.protocol import Request
from trapo.modes import phases

TINY = dataclasses.replace(
    SMOKE,
    tasks=("chain",),
    hidden=24,
    layers=1,
    pretrain_steps={"chain": 2},
    traces=8,
    prompts_per_step=2,
    steps=4,
    validate_every=2,
    sweep_size=1,
    seeds=(1,),
    validation_problems=8,
    test_problems=16,
    test_samples=1,
    pass_problems=2,
    pass_samples=4,
)


@pytest.fixture(params=["chain", "countdown"])
def task(request):
    return tasks()[request.param]


@pytest.fixture
def model():
    """Random weights, sharpened so that greedy choices are not near ties."""
    model = new_model(0, hidden=48, layers=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model.eval()


def study(path, settings=TINY):
    return Study(settings, path / "results", path / "scratch")


def requests(task, limit=30):
    rng = random.Random(2)
    prompts = [encode(task.sample(rng, n).prompt) for n in task.lengths * 3]
    return [Request(p, limit) for p in [*prompts, *prompts[:2]]] + [Request(prompts[0] + encode("3+"), 5)]


def test_greedy_tokens_are_those_of_transformers(model, task):
    ours = StudyEngine(model, eos_id=EOS, pad_id=PAD, batch_size=4)
    theirs = HFEngine(model, eos_ids=[EOS], pad_id=PAD, batch_size=4)
    asked = requests(task)
    assert ours.generate(asked, temperature=0.0, seed=0) == theirs.generate(asked, temperature=0.0, seed=0)


def test_finished_rows_may_be_dropped_without_changing_the_others(model, task, monkeypatch):
    engine = StudyEngine(model, eos_id=EOS, pad_id=PAD)
    results = []
    for share in (0.0, 1.0):
        monkeypatch.setattr("study.engine.SHRINK_AT", share)
        results.append(engine.generate(requests(task), temperature=0.0, seed=0))
    assert results[0] == results[1]
    assert any(c.finished for c in results[0])
    assert not all(c.finished for c in results[0])


def test_samples_follow_the_models_distribution_and_the_seed(model):
    context, n = encode("3+4:"), 4000
    engine = StudyEngine(model, eos_id=EOS, pad_id=PAD, batch_size=n)
    asked = [Request(context, 1)] * n
    drawn = engine.generate(asked, temperature=2.0, seed=1)
    assert drawn == engine.generate(asked, temperature=2.0, seed=1)
    assert drawn != engine.generate(asked, temperature=2.0, seed=2)
    p = (model(input_ids=torch.tensor([context])).logits[0, -1] / 2).softmax(-1)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in drawn]), minlength=len(p))
    assert ((counts / n - p).abs() <= 4.5 * (p * (1 - p) / n).sqrt() + 1e-3).all()


# Arms and runs


@pytest.mark.parametrize("arm", ARMS)
def test_each_arm_trains_and_is_scored(arm):
    knobs = {**ARMS[arm].grid[0], "sft_lr": 1e-3, "sft_batch": 1, "split": 0.5}
    model = new_model(0, hidden=24, layers=1)
    row = execute(Run(TINY, tasks()["chain"], model, arm, knobs, seed=1), with_passes=True)
    assert row["steps"] == TINY.steps
    assert [step for step, _ in row["validation_curve"]] == [0, 2, 4]
    assert unpacked(row["test_right"], TINY.test_problems).mean() == row["test"]
    assert row["trained_tokens"] > 0 or arm in (
        "grpo",
        "micro_groups",
    )  # a base that is never right teaches them nothing
    assert (row["generated_tokens"] > 0) == (arm != "sft")
    assert json.dumps(row, allow_nan=False)


def test_all_arms_with_rollouts_draw_the_same_number_of_them():
    for name, arm in ARMS.items():
        knobs = {**arm.grid[0], "sft_lr": 1e-3, "sft_batch": 1, "split": 0.5}
        stages = arm.stages(FULL, 1, knobs, {})
        assert sum(stage.config.train.steps for stage in stages) == FULL.steps
        for stage in stages:
            (phase,) = phases(stage.config)
            if phase.schedule.generates:
                assert phase.schedule.rollouts_per_prompt == FULL.rollouts, name
                assert stage.config.train.prompts_per_step == FULL.prompts_per_step


def test_grids_are_of_equal_size_but_for_sft():
    assert {name: len(arm.grid) for name, arm in ARMS.items()} == {n: 12 if n == "sft" else 6 for n in ARMS}


def test_every_variant_is_a_configuration_with_as_many_rollouts_a_step():
    for variant in [*TRAPO_VARIANTS.values(), *CONDITIONS.values()]:
        (stage,) = ARMS["trapo_paper"].stages(FULL, 1, {"lr": 1e-4, "expert_coef": 1.0}, variant.overrides)
        (phase,) = phases(stage.config)
        drawn = stage.config.train.prompts_per_step * phase.schedule.rollouts_per_prompt
        assert drawn == FULL.prompts_per_step * FULL.rollouts


def test_a_variant_that_is_the_arm_itself_is_not_run_again():
    knobs = {"lr": 1e-4, "expert_coef": 1.0}
    same = [n for n, v in TRAPO_VARIANTS.items() if changes_nothing(FULL, "trapo_paper", knobs, v)]
    assert same == ["expert_coef=1.0"]
    assert not any(changes_nothing(FULL, "trapo_paper", knobs, v) for v in CONDITIONS.values())


def test_random_prefixes_have_all_lengths():
    problem = encoded(tasks()["chain"], tasks()["chain"].problems("train", 1))[0]
    problem = RandomPrefixProblem(problem.problem, problem.prompt_ids, problem.traces)
    lengths = {len(problem.prefix(None, 0, random.Random(i))) for i in range(400)}
    assert lengths == set(range(1, len(problem.traces[0].token_ids) + 1))


def test_a_run_is_the_same_again_and_keeps_its_best_weights():
    rows = [
        execute(Run(TINY, tasks()["chain"], new_model(0, hidden=24, layers=1), "trapo_paper", {"lr": 1e-3}, seed=1))
        for _ in range(2)
    ]
    for row in rows:
        del row["cpu_seconds"], row["cpu_seconds_train"]
    assert rows[0] == rows[1]
    run = Run(TINY, tasks()["chain"], new_model(0, hidden=24, layers=1), "sft", {"lr": 1e-3, "batch": 1}, seed=1)
    run.validated = [(0, 0.5)]
    first = {k: v.clone() for k, v in run.best.items()}
    run.train()
    assert max(v for _, v in run.validated) == 0.5 or run.validated[0][1] < 0.5
    assert all(torch.equal(first[k], run.best[k]) for k in first)  # nothing beat 0.5


# Bookkeeping


def test_finished_and_failed_runs_stay_and_are_not_repeated(tmp_path):
    table = Results(tmp_path, "sweep", TINY, tmp_path / "locks")
    assert table.run("a", {"arm": "sft"}, lambda: {"validation": 0.5})
    assert not table.run("a", {"arm": "sft"}, lambda: pytest.fail("ran twice"))
    assert table.run("b", {"arm": "grpo"}, lambda: 1 / 0)
    assert not table.run("b", {"arm": "grpo"}, lambda: pytest.fail("ran twice"))
    a, b = json.loads((tmp_path / "sweep.json").read_text())["runs"]
    assert (a["status"], a["validation"], a["attempts"]) == ("finished", 0.5, 1)
    assert (b["status"], b["error"]) == ("failed", "ZeroDivisionError: division by zero")


def test_a_started_run_is_in_the_table_and_an_interrupted_one_starts_again(tmp_path):
    table = Results(tmp_path, "sweep", TINY, tmp_path / "locks")

    def interrupted():
        assert table.rows()[0]["status"] == "running"
        assert table.taken("a")
        assert not table.run("a", {}, lambda: pytest.fail("two at once"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        table.run("a", {}, interrupted)
    assert not table.taken("a")
    assert table.run("a", {}, lambda: {"validation": 1.0})
    assert [(r["status"], r["attempts"]) for r in table.rows()] == [("finished", 2)]


def test_settings_are_chosen_by_validation_alone_and_only_when_the_sweep_is_complete(tmp_path):
    s = study(tmp_path, dataclasses.replace(TINY, sweep_size=3))
    assert not list(jobs(s, "sweep"))  # without a base model there is nothing to tune
    base_path(s.results, "chain").parent.mkdir(parents=True)
    base_path(s.results, "chain").touch()
    table = s.part("sweep")
    todo = [job for job in jobs(s, "sweep") if job.arm == "sft"]
    for job, score in zip(todo, (0.1, 0.3), strict=False):
        table.run(job.key, {"task": "chain"}, lambda score=score: {"validation": score})
    assert Sweep(s).chosen("chain", "sft") is None
    assert not any(job.arm == "sft_then_rl" for job in jobs(s, "sweep"))
    assert not list(jobs(s, "arms"))
    table.run(todo[2].key, {"task": "chain"}, lambda: {"validation": 0.2})
    assert Sweep(s).chosen("chain", "sft") == todo[1].knobs
    assert {j.knobs["sft_lr"] for j in jobs(s, "sweep") if j.arm == "sft_then_rl"} == {todo[1].knobs["lr"]}


def swept(s: Study, arm: str, score) -> list[dict]:
    """The settings that an arm's sweep tries, in order, when a run at some settings scores `score(settings)`."""
    base_path(s.results, "chain").parent.mkdir(parents=True)
    base_path(s.results, "chain").touch()
    tried = []
    while job := next((j for j in jobs(s, "sweep") if j.arm == arm and not s.part("sweep").taken(j.key)), None):
        assert Sweep(s).chosen("chain", arm) is None
        tried.append(job.knobs)
        s.part("sweep").run(job.key, {"task": "chain"}, lambda job=job: {"validation": score(job.knobs)})
    assert score(Sweep(s).chosen("chain", arm)) == max(map(score, tried))
    return tried


@pytest.mark.parametrize(("peak", "beyond"), [(1e-4, []), (3e-4, [2]), (6e-4, [2, 4]), (1.0, [2, 4, 8])])
def test_a_sweep_goes_on_while_the_highest_learning_rate_is_the_best(tmp_path, peak, beyond):
    s = study(tmp_path, dataclasses.replace(TINY, sweep_size=6, sweep_extensions=3))
    tried = swept(s, "grpo", lambda knobs: -abs(knobs["lr"] - peak))
    assert tried[:6] == list(ARMS["grpo"].grid)
    assert [round(knobs["lr"] / 3e-4) for knobs in tried[6:]] == beyond


def test_a_sweep_goes_on_in_expert_coef_too(tmp_path):
    s = study(tmp_path, dataclasses.replace(TINY, sweep_size=6, sweep_extensions=4))
    tried = swept(s, "luffy", lambda knobs: -abs(knobs["lr"] - 2e-3) - abs(knobs["expert_coef"] - 4))
    beyond = [(knobs["lr"], knobs["expert_coef"]) for knobs in tried[6:]]
    assert beyond == [(2e-3, 1), (4e-3, 1), (2e-3, 4), (4e-3, 4)]
    s = study(tmp_path / "inside", s.settings)
    assert swept(s, "luffy", lambda knobs: -abs(knobs["lr"] - 3e-4) - knobs["expert_coef"]) == list(ARMS["luffy"].grid)


def test_a_condition_that_is_tuned_anew_has_its_own_winner(tmp_path):
    s = study(tmp_path, dataclasses.replace(TINY, sweep_size=2, sweep_extensions=0))
    base_path(s.results, "chain").parent.mkdir(parents=True)
    base_path(s.results, "chain").touch()
    while job := next((j for j in jobs(s, "sweep") if not s.part("sweep").taken(j.key)), None):
        score = job.knobs.get("batch", 1) * (1 if job.name else -1)  # in part 2 the smaller batch is the better one
        s.part("sweep").run(job.key, {"task": "chain"}, lambda score=score: {"validation": score})
    knobs = {(j.arm, j.name): j.knobs for j in jobs(s, "ablations")}
    anew = RETUNED["50 traces"]["sft"][1]
    assert anew["batch"] == 4
    assert knobs["sft", "50 traces"] == anew
    assert knobs["sft", "long problems only (sparse reward)"] == ARMS["sft"].grid[0]
    assert knobs["sft_then_rl", "50 traces"]["sft_lr"] == anew["lr"]
    assert knobs["grpo", "50 traces"] == Sweep(s).chosen("chain", "grpo")


def test_bits_survive_packing():
    right = np.random.default_rng(0).random(1021) < 0.3
    assert (unpacked(packed(right), 1021) == right).all()


def test_intervals_of_known_cases():
    same = estimate(np.full((3, 50), 0.25))
    assert (same.mean, same.low, same.high, same.seed_std) == pytest.approx((0.25, 0.25, 0.25, 0.0))
    rng = np.random.default_rng(0)
    problems = estimate((rng.random((1, 1000)) < 0.3).astype(float))
    assert problems.high - problems.low == pytest.approx(2 * 1.96 * (0.3 * 0.7 / 1000) ** 0.5, rel=0.1)
    # Seeds that differ much more than problems do: the interval must show it.
    seeds = estimate(np.repeat(np.array([[0.1], [0.3], [0.5], [0.7], [0.9]]), 1000, axis=1))
    assert seeds.high - seeds.low > 0.35


def test_tables_fill_the_marked_regions_and_no_others():
    page = "a\n<!-- begin:base -->\nold\n<!-- end:base -->\nb\n"
    assert plots.fill(page, {"base": "new"}) == "a\n<!-- begin:base -->\nnew\n<!-- end:base -->\nb\n"
    with pytest.raises(ValueError, match="'base' is no region"):
        plots.fill(page, {})


def test_the_page_has_only_marks_that_are_filled(tmp_path):
    page = (plots.ROOT / "docs/study.md").read_text()
    plots.fill(page, plots.regions(study(tmp_path, FULL), []))


def test_a_tiny_study_runs_from_base_to_tables_and_resumes(tmp_path):
    s = study(tmp_path)
    make_base(s.settings, s.results, tasks()["chain"], s.part("pretrain"))
    base = digest(base_model(s.settings, s.results, tasks()["chain"]))
    swept = work(s, "sweep")
    assert swept == len(ARMS) + sum(map(len, RETUNED.values()))
    assert work(s, "sweep") == 0
    assert work(s, "arms") == len(ARMS)
    rows = s.part("arms").rows()
    assert {row["status"] for row in rows} == {"finished"}
    assert {row["base"] for row in rows} == {base}
    assert not any("test" in row for row in s.part("sweep").rows())
    text = summary.arms_table(s, "chain")
    assert all(arm.label in text for arm in ARMS.values())
    assert plots.draw_arms(s, __import__("matplotlib.figure", fromlist=["Figure"]).Figure())


@pytest.mark.slow
def test_the_smoke_study_runs_from_its_command(tmp_path):
    command = [sys.executable, "-m", "study", "all", "--smoke", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for part in ("exact", "pretrain", "sweep", "arms", "ablations", "smollm", "regimes"):
        rows = json.loads((tmp_path / f"{part}.json").read_text())["runs"]
        assert rows
        assert {row["status"] for row in rows} == {"finished"}, part
    assert (tmp_path / "study.md").exists()
