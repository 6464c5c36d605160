import pytest

from trapo.config import merge_config
from trapo.data.encode import EncodedProblem
from trapo.data.problem import Problem
from trapo.data.sampling import derive_seed, load_eval_set, load_train_set, problems_at
from trapo.errors import TrapoError
from trapo.modes import phases

PROBLEMS = [
    EncodedProblem(Problem(str(i), ({"role": "user", "content": "?"},), "1", (), "test"), (i,), ()) for i in range(7)
]


def ids(step, *overrides):
    config = merge_config({}, ["train.prompts_per_step=3", *overrides])
    return [p.problem.id for p in problems_at(step, PROBLEMS, 3, seed=config.seed, shuffle=config.data.shuffle)]


def test_an_epoch_shows_every_problem_once_and_the_next_in_another_order():
    seen = [i for step in range(14) for i in ids(step)]
    epochs = [seen[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(epoch) == sorted(epochs[0]) == list("0123456") for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_step_depends_on_seed_and_step_alone():
    assert ids(5) == ids(5)
    assert [ids(s) for s in range(5)] != [ids(s, "seed=1") for s in range(5)]


def test_without_shuffling_problems_come_in_file_order():
    assert ids(0, "data.shuffle=false") + ids(1, "data.shuffle=false") == list("012345")


def test_seeds_of_near_by_steps_are_unrelated_and_fit_torch():
    seeds = {derive_seed(0, "step", i) for i in range(1000)}
    assert len(seeds) == 1000
    assert all(0 <= s < 2**62 for s in seeds)


def write(tmp_path, *rows):
    import json

    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train_set(config, tokenizer, log):
    limit = config.rollout.max_response_tokens
    return load_train_set(config.data, phases(config), tokenizer, log, mode=config.mode, max_response_tokens=limit)


def load(tokenizer, path, *overrides):
    config = merge_config({}, [f"data.train={path}", *overrides])
    lines = []
    return train_set(config, tokenizer, lines.append), lines


def test_imitation_leaves_problems_without_a_trace_out_and_says_so(tmp_path, tokenizer):
    path = write(tmp_path, {"prompt": "a", "answer": "1", "trace": "#### 1"}, {"prompt": "b", "answer": "2"})
    problems, lines = load(tokenizer, path, "mode=sft")
    assert len(problems) == 1
    assert "1 problems without an expert trace left out" in lines[0]
    problems, lines = load(tokenizer, path, "mode=trapo")
    assert (len(problems), lines) == (2, [])


def test_a_mode_that_needs_traces_refuses_data_without_any(tmp_path, tokenizer):
    path = write(tmp_path, {"prompt": "b", "answer": "2"})
    with pytest.raises(TrapoError, match="has no expert trace"):
        load(tokenizer, path, "mode=trapo")
    assert len(load(tokenizer, path, "mode=grpo")[0]) == 1


def test_the_official_preset_trains_on_the_thinking_part_alone(tmp_path, tokenizer):
    row = {"prompt": "a", "answer": "1", "trace": "<think>1 is 1</think>\n#### 1"}
    problems, _ = load(tokenizer, write(tmp_path, row), "guidance.preset=official")
    assert "####" not in tokenizer.decode(problems[0].traces[0].token_ids)


def test_what_is_over_a_length_limit_is_left_out_and_said(tmp_path, tokenizer):
    path = write(
        tmp_path,
        {"prompt": "short", "answer": "1", "traces": ["1 " * 50, "#### 1"]},
        {"prompt": "long " * 300, "answer": "2"},
    )
    problems, lines = load(tokenizer, path, "data.max_prompt_tokens=100", "data.max_trace_tokens=20")
    assert [len(p.traces) for p in problems] == [1]
    assert "left out 1 prompts over 100 tokens (first: data/" in lines[0]
    assert ") and 1 traces over 20 tokens (first: data/" in lines[0]


def test_a_trace_that_no_response_can_hold_is_left_out_and_not_cut(tmp_path, tokenizer):
    path = write(tmp_path, {"prompt": "a", "answer": "1", "traces": ["1 " * 50, "#### 1"]})
    problems, lines = load(tokenizer, path, "mode=sft", "rollout.max_response_tokens=20")
    assert [len(p.traces) for p in problems] == [1]
    assert "1 traces over rollout.max_response_tokens=20" in lines[0]
    assert problems[0].traces[0].token_ids[-1] == tokenizer.eos_token_id
    problems, lines = load(tokenizer, path, "mode=trapo", "rollout.max_response_tokens=20")
    assert [len(p.traces) for p in problems] == [2]  # its prefixes may fit
    assert "1 traces over rollout.max_response_tokens=20 are never given whole" in lines[0]


def test_no_evaluation_set_is_fine_and_no_training_set_is_not(tokenizer):
    assert load_eval_set(merge_config({}).data, tokenizer, print) is None
    with pytest.raises(TrapoError, match=r"data\.train: missing"):
        train_set(merge_config({}), tokenizer, print)
