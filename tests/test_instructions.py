"""guidance.instruction: a guided rollout of prefix_rl is asked to go on with a prefix, which stands in its prompt."""

import dataclasses
import json

import pytest
from killed_run import settings, train_here
from test_hybrids import Script, draw, plan
from transformers import AutoTokenizer

from trapo.config import merge_config
from trapo.data.encode import decode_text, encode_problems
from trapo.data.problem import Problem
from trapo.data.sampling import longest_sequence
from trapo.errors import TrapoError
from trapo.modes.instructions import POPE

TEXT = "Solve {problem} and go on behind: {partial}"


@pytest.fixture
def one(tiny_model_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    text = Problem("p", ({"role": "user", "content": "2 + 2?"},), "4", ("First, 2 and 2 are two twos, so 4.",), "test")
    (found,), _ = encode_problems([text], tokenizer, max_prompt_tokens=99, max_trace_tokens=99, instruction=TEXT)
    return tokenizer, found


def test_the_prefix_is_a_part_of_the_prompt_and_the_response_the_models_own(one):
    tokenizer, problem = one
    phase = plan("mode=prefix_rl", "guidance.find=false", f"guidance.instruction='{TEXT}'")
    rollouts = draw(phase, 0, [problem])
    own, asked = rollouts[:4], rollouts[4:]
    assert {r.problem.prompt_ids for r in own} == {problem.prompt_ids}
    prefix = problem.traces[0].token_ids[: len(problem.traces[0].token_ids) // 2]
    before, behind = problem.around
    assert {r.problem.prompt_ids for r in asked} == {before + prefix + behind}
    text = tokenizer.decode(asked[0].problem.prompt_ids)
    assert f"Solve 2 + 2? and go on behind: {decode_text(tokenizer, prefix)}" in text
    template = [{"role": "user", "content": f"Solve 2 + 2? and go on behind: {decode_text(tokenizer, prefix)}"}]
    assert text == tokenizer.apply_chat_template(template, add_generation_prompt=True, tokenize=False)
    assert all(r.guided and not r.prefix_ids and r.own_ids and not r.supervised for r in asked)
    assert longest_sequence([problem], 10) == len(before) + len(behind) + len(problem.traces[0].token_ids) + 10


def test_the_shortest_prefix_is_found_with_an_instruction_too(one):
    _, problem = one
    phase = plan("mode=prefix_rl", f"guidance.instruction='{TEXT}'")
    phase.memory.after(draw(phase, 0, [problem]), None, 0)
    assert phase.memory.bounds == {"p": [0.5, 1.0]}  # all wrong: a longer one
    right = [dataclasses.replace(r, reward=1.0) for r in draw(phase, 0, [problem]) if r.guided]
    assert right[0].ratio == 0.8  # of 0.75
    phase.memory.after(right, None, 0)
    assert phase.memory.bounds == {"p": [0.5, 0.75]}
    assert Script(0).score(right)[0].value == 0.0


def test_popes_text_asks_to_complete_the_partial_response():
    phase = plan("mode=prefix_rl", "guidance.instruction=pope")
    assert phase.schedule.instruction == POPE
    assert POPE.startswith("You are given a problem and a partial solution.\n\nYour task is to carefully study the")
    assert "\n\nProblem:\n{problem}\n\nPartial Response:\n{partial}\n\nContinue solving the problem" in POPE
    assert "\\boxed{your_answer_here}" in POPE


def test_a_run_with_popes_instruction(tiny_model_path, tmp_path):
    short = [
        "mode=prefix_rl",
        "guidance.instruction=pope",
        "train.steps=1",
        "train.updates_per_step=1",
        "data.eval=null",
    ]
    train_here(settings(tiny_model_path, tmp_path / "run", *short, "guidance.group_size=4"))
    (row,) = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert row["rollouts_by_ratio"] == {"0": 4, "0.5": 4}
    assert row["supervised_tokens"] == 0


@pytest.mark.parametrize("text", ["go on", "{problem}", "{partial} {partial} {problem}"])
def test_a_text_without_its_places_is_refused(text):
    with pytest.raises(TrapoError, match=r"guidance\.instruction: got .*; must be pope, or hold \{problem\}"):
        merge_config({}, ["mode=prefix_rl", f"guidance.instruction='{text}'"])
    with pytest.raises(TrapoError, match=r"guidance\.instruction: only mode prefix_rl puts prefixes into prompts"):
        merge_config({}, ["guidance.instruction=pope"])
