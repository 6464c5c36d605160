"""Distillation and references on two ranks: teachers are sharded as the policy is, runs are one process's."""

import json
import math

import pytest
import torch
from rank_processes import run_ranks
from safetensors.torch import load_file
from test_ranks import close
from test_resume import timeless
from tiny_models import tiny_llama

from trapo.data.encode import encode_problems
from trapo.data.loading import load_problems

# Two steps on 3 x 2 rollouts in micro-batches of a few, so that ranks have different numbers of them; Adam
# divides by |gradient|: without this eps an entry that is nothing but rounding would move by lr.
SMALL = [
    "rollout.seeding=request", "optim.eps=1e-3", "optim.lr=1e-3", "train.steps=2", "train.updates_per_step=1",
    "train.prompts_per_step=3", "train.micro_batch_tokens=150", "data.eval=null", "eval.every=0", "checkpoint.every=0",
    "objective.entropy_coef=null", "rollout.max_response_tokens=12", "log.rollouts_every=0",
]  # fmt: skip
SELF = ["mode=self_distill", "distill.check_every=1", "distill.kind=jsd"]


@pytest.fixture(scope="module")
def teacher(tokenizer, tmp_path_factory):
    """Another model than the student, wider."""
    path = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(5)
    tiny_llama(tokenizer, hidden_size=32, intermediate_size=48, num_attention_heads=4).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def columns(tokenizer, tmp_path_factory):
    """Traces with the two ids that their teacher knows of each token."""
    problems = load_problems("task://word_problems?split=train&n=4&seed=1")
    encoded, _ = encode_problems(problems, tokenizer, max_prompt_tokens=300, max_trace_tokens=300)
    path = tmp_path_factory.mktemp("columns") / "train.jsonl"
    with path.open("w") as file:
        for problem, ids in zip(problems, encoded, strict=True):
            count = len(ids.traces[0].token_ids)
            row = {"topk_ids": [[5, 6]] * count, "topk_logprobs": [[math.log(0.75), math.log(0.25)]] * count}
            text = {"prompt": problem.prompt[-1]["content"], "answer": problem.answer, "trace": problem.traces[0]}
            file.write(json.dumps({**text, **row}) + "\n")
    return path


CASES = {
    "current": lambda *_: SELF,
    "initial": lambda *_: [*SELF, "distill.teacher=initial", "guidance.group_size=2"],
    "another model": lambda teacher, _: ["mode=distill", f"distill.teacher={teacher}", "distill.check_every=1"],
    "columns": lambda _, file: [
        *["mode=distill", "distill.teacher=columns", "distill.kind=forward_kl", f"data.train={file}"],
        "rollout.max_response_tokens=300",
    ],
    "KL": lambda *_: ["objective.kl_coef=0.1", "train.updates_per_step=2"],
    "asft": lambda *_: ["mode=sft", "objective.expert=asft"],
}


CHEAP = "another model"  # the other runs take a quarter of a minute


@pytest.fixture(scope="module", params=[CHEAP, pytest.param("others", marks=pytest.mark.slow)])
def runs(request, teacher, columns, tiny_model_path, tmp_path_factory):
    """{case: its folders on one rank and on two}."""
    names = [name for name in CASES if (name == CHEAP) == (request.param == CHEAP)]
    cases = json.dumps([SMALL + CASES[name](teacher, columns) for name in names])
    folders = []
    for world in (1, 2):
        folders.append(tmp_path_factory.mktemp(f"ranks{world}"))
        run_ranks(world, "trains", tiny_model_path, folders[-1], cases)
    return {name: [folder / str(i) for folder in folders] for i, name in enumerate(names)}


def test_runs_with_a_teacher_or_a_reference_are_the_same_on_two_ranks(runs):
    for name, (one, two) in runs.items():
        expected_rows, rows = (
            [timeless(json.loads(x)) for x in (d / "metrics.jsonl").read_text().splitlines()] for d in (one, two)
        )
        assert len(expected_rows) == 2
        for found, expected in zip(rows, expected_rows, strict=True):
            assert expected["trained_tokens"], name
            close(found, expected)
        weights, expected_weights = (load_file(d / "final" / "model.safetensors") for d in (two, one))
        for weight, value in expected_weights.items():
            torch.testing.assert_close(weights[weight], value, atol=1e-5, rtol=0, msg=f"{name}: {weight}")
