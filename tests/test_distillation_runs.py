"""What a run with a teacher refuses, and what it does."""

import json
import math

import pytest
from killed_run import settings, train_here
from test_distillation import learner_of
from test_learner import model  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer

from trapo.config import merge_config
from trapo.data.encode import encode_problems
from trapo.data.loading import load_problems
from trapo.distillation import Distillation
from trapo.distillation.making import make_tutor
from trapo.errors import TrapoError
from trapo.modes import phases


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["mode=distill"], "distill.teacher: mode distill needs a model's path, .*; got null"),
        (["mode=distill", "distill.teacher=current"], "distill.teacher: mode distill needs .*; got current"),
        (["mode=self_distill", "distill.teacher=columns"], "takes current or initial; got 'columns'"),
        (["distill.kind=jsd"], "distill.kind: only distill and self_distill read it; got mode trapo"),
        (["mode=self_distill", "distill.tail=drop"], "distill.tail: only a server or columns as distill.teacher"),
        (["mode=distill", "distill.teacher=x", "distill.top_k=3"], "distill.top_k: only a server"),
        (["mode=distill", "distill.teacher=columns", "distill.dtype=float32"], "distill.dtype: only a teacher with"),
        (["mode=distill", "distill.teacher=x", "distill.beta=0.3"], "distill.beta: only distill.kind=jsd or mixed"),
        (["mode=self_distill", "distill.beta=1.0"], "distill.beta: got 1.0; must be above 0 and below 1"),
        (["mode=self_distill", "distill.template=a {prompt}"], "must have {prompt} and {trace} in it"),
        (["mode=distill", "distill.teacher=x", "distill.template='{prompt}{trace}'"], "only mode self_distill reads"),
        (["mode=self_distill", "optim.expert.lr=0.1"], "optim.expert.lr: mode self_distill has one optimizer"),
        (["mode=self_distill", "train.sft_steps=3"], "train.sft_steps: only mode sft_then_rl"),
    ],
)
def test_keys_of_a_teacher_that_do_not_go_together_are_one_line(overrides, line):
    with pytest.raises(TrapoError, match=line) as error:
        merge_config({}, overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "count"),
    [([], 1), (["guidance.group_size=3"], 3), (["guidance.sizes=[2, 1]"], 3), (["objective.policy=clip"], 8)],
)
def test_a_prompt_has_one_rollout_unless_more_are_asked_for(overrides, count):
    (phase,) = phases(merge_config({}, ["mode=self_distill", *overrides]))
    assert phase.schedule.rollouts_per_prompt == count
    assert phase.needs_traces
    with pytest.raises(TrapoError, match=r"^objective\.policy: got clip; it compares rollouts, of which there is one"):
        phases(merge_config({}, ["mode=self_distill", "guidance.group_size=1", "objective.policy=clip"]))


def test_a_top_k_is_of_temperature_one(model, tokenizer):  # noqa: F811
    learner = learner_of(model, "rollout.temperature=0.7")
    with pytest.raises(TrapoError, match=r"^rollout\.temperature: got 0\.7; a teacher's top-k is of temperature 1"):
        make_tutor(Distillation("columns", "jsd"), learner, tokenizer, [], merge_config({}).model)


def test_a_teacher_of_another_vocabulary_is_refused(model, tokenizer, tiny_model_path, tmp_path):  # noqa: F811
    learner = learner_of(model)
    other = AutoTokenizer.from_pretrained(tiny_model_path)
    other.add_tokens(["<new>"])
    AutoModelForCausalLM.from_pretrained(tiny_model_path).save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    how = Distillation(str(tmp_path), "jsd")
    with pytest.raises(TrapoError, match=r"another vocabulary than model\.path; .* is id 49152, '<new>'"):
        make_tutor(how, learner, tokenizer, [], merge_config({}).model)
    with pytest.raises(TrapoError, match=r"^distill\.teacher: model\.path: cannot load"):
        make_tutor(Distillation("/no/such", "jsd"), learner, tokenizer, [], merge_config({}).model)


RUN = (
    "objective.entropy_coef=null",
    "train.steps=3",
    "train.updates_per_step=1",
    "checkpoint.every=2",
    "guidance.group_size=4",
)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_teaches_itself_and_says_what_that_did(tiny_model_path, tmp_path):
    more = ["mode=self_distill", "distill.teacher=initial", "distill.kind=forward_kl", "distill.check_every=1"]
    more += ["optim.lr=1e-4", "data.eval=null", "eval.every=0"]
    said = train_here(settings(tiny_model_path, tmp_path / "run", *RUN, *more))
    assert "without effect" not in said
    found = rows(tmp_path / "run")
    assert len(found) == 3
    assert all(0 < row["divergence_after"] < row["divergence"] for row in found)
    assert all(row["distilled_tokens"] == row["generated_tokens"] for row in found)
    assert {row["phase"] for row in found} == {"self_distill"}
    saved = json.loads((tmp_path / "run" / "inputs.json").read_text())["files"]
    assert "model.path" in saved


def test_a_run_learns_from_columns_of_its_data(tiny_model_path, tokenizer, tmp_path):
    problems = load_problems("task://word_problems?split=train&n=4&seed=1")
    encoded, _ = encode_problems(problems, tokenizer, max_prompt_tokens=300, max_trace_tokens=300)
    with (tmp_path / "train.jsonl").open("w") as file:
        for problem, ids in zip(problems, encoded, strict=True):
            count = len(ids.traces[0].token_ids)
            row = {"topk_ids": [[5, 6]] * count, "topk_logprobs": [[math.log(0.75), math.log(0.25)]] * count}
            text = {"prompt": problem.prompt[-1]["content"], "answer": problem.answer, "trace": problem.traces[0]}
            file.write(json.dumps({**text, **row}) + "\n")
    more = [f"data.train={tmp_path / 'train.jsonl'}", "mode=distill", "distill.teacher=columns"]
    more += ["rollout.max_response_tokens=300", "distill.kind=forward_kl", "data.eval=null", "eval.every=0"]
    train_here(settings(tiny_model_path, tmp_path / "run", *RUN, *more))
    found = rows(tmp_path / "run")
    assert found[0]["divergence"] > found[1]["divergence"] > found[2]["divergence"]
    assert found[0]["generated_tokens"] == 0
    assert found[0]["outside_topk"] > found[2]["outside_topk"]
