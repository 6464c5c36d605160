"""Mode sft_then_rl is an SFT run followed by an RL run from its model, bit for bit; SFT may end by itself."""

import json
import signal

import forked
import pytest
import torch
from killed_run import base, settings, train_here
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import trapo_kernels as tk
from trapo.config import merge_config
from trapo.data.sampling import load_eval_set
from trapo.errors import TrapoError
from trapo.evaluation.likelihood import likelihood, trace_likelihood
from trapo.modes import cut_at_plateau, phases
from trapo.modes.phase import plateau

SFT = {"lr": 3e-2, "schedule": "cosine", "prompts_per_step": 3}
BOTH = ["mode=sft_then_rl", "train.sft_steps=2", "train.steps=5", *(f"sft.{k}={v}" for k, v in SFT.items())]


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def both(tiny_model_path, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("both") / "run"
    train_here(settings(tiny_model_path, run_dir, *BOTH, "checkpoint.keep=9", "checkpoint.every=1"))
    return run_dir


def test_it_is_an_sft_run_and_then_a_grpo_run_from_its_model_bit_for_bit(both, tiny_model_path, tmp_path):
    alone = ["mode=sft", "train.steps=2", "optim.lr=3e-2", "optim.schedule=cosine", "train.prompts_per_step=3"]
    train_here(settings(tiny_model_path, tmp_path / "sft", *alone))
    train_here(settings(tmp_path / "sft" / "final", tmp_path / "grpo", "mode=grpo", "train.steps=3"))
    one, two = (load_file(path / "final" / "model.safetensors") for path in (both, tmp_path / "grpo"))
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)
    found = [(row["phase"], row["lr"], row["grad_norm"]) for row in rows_of(both)]
    apart = [(row["phase"], row["lr"], row["grad_norm"]) for run in ("sft", "grpo") for row in rows_of(tmp_path / run)]
    assert found == apart
    assert [phase for phase, *_ in found] == ["sft"] * 2 + ["grpo"] * 3
    assert len({lr for _, lr, _ in found}) == 5


def test_the_optimizer_has_no_past_where_rl_begins(both):
    def moments(step):
        state = torch.load(both / "checkpoints" / f"step-{step:06d}" / "trainer_state.pt", weights_only=True)
        return state["learner"]["optimizer"]["state"]

    assert moments(1)
    assert not moments(2)
    assert moments(3)


@pytest.mark.parametrize(
    "kill_at", ["save:2", *(pytest.param(when, marks=pytest.mark.slow) for when in ("save:1", "log:3", "save:3"))]
)
def test_a_killed_run_continues_across_the_switch(kill_at, both, tiny_model_path, tmp_path):
    arguments = [tiny_model_path, tmp_path / "run"]
    every = [*BOTH, "checkpoint.every=1"]
    done = forked.run("killed_run:main", [*arguments, kill_at, *every])
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    done = forked.run("killed_run:main", [*arguments, "none", *every])
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (load_file(path / "final" / "model.safetensors") for path in (both, tmp_path / "run"))
    assert all(one[name].equal(two[name]) for name in one)


def test_what_sft_does_not_say_is_as_in_optim_and_train(tiny_model_path):
    first, second = phases(merge_config({}, ["mode=sft_then_rl", "train.sft_steps=3", "optim.lr=1e-3"]))
    assert (first.optim, first.prompts_per_step) == (second.optim, second.prompts_per_step)
    first, second = phases(merge_config({}, [*BOTH, "optim.lr=1e-3", "train.prompts_per_step=16"]))
    assert (first.optim.lr, first.optim.schedule, first.prompts_per_step) == (3e-2, "cosine", 3)
    assert (second.optim.lr, second.optim.schedule, second.prompts_per_step) == (1e-3, "constant", 16)


@pytest.mark.parametrize(
    "own",
    ["clip_low=0.1", "clip_high=0.3", "dual_clip=3", "policy=gspo", "policy_coef=0.5", "kl_coef=0.01"],
)
def test_keys_about_own_tokens_are_of_the_rl_phase(own):
    overrides = ["mode=sft_then_rl", "train.sft_steps=3", f"objective.{own}"]
    first, second = phases(merge_config({}, overrides))
    assert (first.objective, first.overruled) == (tk.Objective.sft(), ())
    assert second.objective == phases(merge_config({}, ["mode=grpo", f"objective.{own}"]))[0].objective
    assert second.objective != tk.Objective.grpo()


def test_keys_about_expert_tokens_are_of_the_sft_phase_and_those_of_all_tokens_of_both():
    keys = ["objective.expert=trsft", "objective.alpha=0.2", "objective.entropy_coef=0.01"]
    first, second = phases(merge_config({}, ["mode=sft_then_rl", "train.sft_steps=3", *keys]))
    assert first.objective == tk.Objective.sft(expert="trsft", alpha=0.2, entropy_coef=0.01)
    assert second.objective == tk.Objective.grpo(entropy_coef=0.01)


@pytest.mark.parametrize(
    ("values", "end"),
    [
        ([4.0, 3.0, 2.0, 1.9, 1.5, 1.4, 1.3], None),  # it falls
        ([4.0, 3.0, 2.0, 1.99, 1.985, 1.98], 50),  # flat: 1.98 is no 2% below 2.0
        ([4.0, 2.0, 2.1, 2.3, 2.6, 1.0], 40),  # it rises
        ([4.0, 2.0, 2.1, 2.3, 1.9, 1.95, 1.95, 1.95], 70),  # a late fall counts
        ([2.0, 2.0, 2.0], None),  # too few to say
        ([2.0, 1.96, 1.96, 1.96], None),  # by just 2%
    ],
)
def test_the_plateau_of_a_curve(values, end):
    assert plateau({10 * i: value for i, value in enumerate(values)}) == end


def test_a_plan_is_cut_where_the_plateau_is_and_rl_gets_the_steps_that_are_left():
    auto = ["mode=sft_then_rl", "train.sft_steps=auto", "train.steps=90", "data.eval=x.jsonl", "eval.every=10"]
    plan = phases(merge_config({}, auto))
    assert [(phase.name, phase.steps) for phase in plan] == [("sft", 89), ("grpo", 1)]
    flat = dict.fromkeys((0, 10, 20, 30, 40), 2.0)
    assert [(p.name, p.steps) for p in cut_at_plateau(plan, flat)] == [("sft", 30), ("grpo", 60)]
    assert cut_at_plateau(plan, {0: 2.0}) == plan
    whole = phases(merge_config({}, [*auto, "train.sft_steps=20"]))
    assert cut_at_plateau(whole, flat) == whole


def test_sft_ends_by_itself_in_a_run_and_after_an_interruption_at_the_same_step(tiny_model_path, tmp_path):
    # A learning rate that changes nothing: the held-out traces get no likelier, and three evaluations after the first
    # it is over.
    auto = ["mode=sft_then_rl", "train.sft_steps=auto", "sft.lr=1e-9", "sft.schedule=constant", "eval.every=1"]
    shown = train_here(settings(tiny_model_path, tmp_path / "run", *auto))
    assert "the phase grpo begins" in shown
    assert [row["phase"] for row in rows_of(tmp_path / "run")] == ["sft"] * 3 + ["grpo"] * 3
    arguments = [tiny_model_path, tmp_path / "again"]
    done = forked.run("killed_run:main", [*arguments, "log:5", *auto])
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    done = forked.run("killed_run:main", [*arguments, "none", *auto])
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("run", "again"))
    assert all(one[name].equal(two[name]) for name in one)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.sft_steps=100"], r"train\.sft_steps: mode sft_then_rl needs auto, or 1 <= sft_steps"),
        (["train.sft_steps=soon"], r"train\.sft_steps: got soon; must be a whole number above 0 or auto"),
        (["train.sft_steps=0"], r"train\.sft_steps: got 0; must be a whole number above 0 or auto"),
        (["train.sft_steps=auto"], r"train\.sft_steps: auto .* needs data\.eval and eval\.every"),
        (
            ["train.sft_steps=auto", "data.eval=x", "eval.every=2", "sft.schedule=linear"],
            r"train\.sft_steps: auto needs sft\.schedule=constant, .* got linear",
        ),
        (["mode=grpo", "sft.lr=1e-4"], r"sft\.lr: only mode sft_then_rl has SFT steps; got mode grpo"),
    ],
)
def test_a_phase_without_an_end_and_keys_of_no_phase_are_refused(overrides, message):
    with pytest.raises(TrapoError, match=message) as error:
        merge_config({}, ["mode=sft_then_rl", *overrides])
    assert "\n" not in str(error.value)


def test_the_likelihood_of_traces_is_that_of_transformers_and_is_in_every_evaluation(both, tiny_model_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    data = merge_config(base(tiny_model_path, both)).data
    problems = load_eval_set(data, AutoTokenizer.from_pretrained(tiny_model_path), print)
    total, count = 0.0, 0
    for problem in problems:
        for trace in problem.traces:
            ids = torch.tensor([problem.prompt_ids + trace.token_ids])
            labels = ids.clone()
            labels[:, : len(problem.prompt_ids)] = -100
            with torch.no_grad():
                total += float(model(ids, labels=labels).loss) * len(trace.token_ids)
            count += len(trace.token_ids)
    found = trace_likelihood(model, problems, "float32")
    assert found == (pytest.approx(total / count, rel=1e-5), count)
    evaluations = [json.loads(path.read_text()) for path in sorted((both / "eval").glob("*.json"))]
    assert evaluations[0]["trace_nll"] == pytest.approx(found.nll, rel=1e-6)
    assert evaluations[-1]["trace_nll"] < found.nll  # it has learnt some of them
    assert {e["trace_tokens"] for e in evaluations} == {count}


def test_a_text_without_a_prompt_counts_from_its_second_token(tiny_model_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    ids = [5, 9, 11, 200]
    with torch.no_grad():
        expected = float(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss)
    found = likelihood(model, [((), ids), ((), ids[:1])], "float32")
    assert found == (pytest.approx(expected, rel=1e-5), 3)
    assert likelihood(model, [], "float32") is None
