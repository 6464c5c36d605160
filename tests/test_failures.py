"""Failure drills: what a run does about bad input and hanging parts, end to end on a tiny model.

Details are tested where they belong: rows and columns in test_data.py, limits in test_encode.py, workers in
test_rewards.py; killed runs in test_resume.py; SIGTERM, disks and checkpoints in test_restarts.py.
"""

import json
import logging
import shutil

import pytest
from killed_run import settings, train_here

from trapo.errors import TrapoError

GOOD = {"prompt": "What is 2 + 2?", "answer": "4", "trace": "2 + 2 = 4\n#### 4"}
SHORT = ("train.steps=1", "data.eval=null", "checkpoint.every=0", "train.updates_per_step=1")


@pytest.fixture
def run(tiny_model_path, tmp_path):
    """Trains a step on the rows given (a text is a line as it is); returns what the console showed."""

    def train(rows, *overrides, model=tiny_model_path):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "train.jsonl").write_text("".join(line + "\n" for line in lines))
        data = f"data.train={tmp_path / 'train.jsonl'}"
        return train_here(settings(model, tmp_path / "run", data, *SHORT, *overrides))

    return train


def refused(run, rows, message, *overrides, **options):
    """The run is refused with one line, before it has left anything behind."""
    with pytest.raises(TrapoError, match=message) as error:
        run(rows, *overrides, **options)
    assert "\n" not in str(error.value)


def test_a_corrupted_row_is_fatal_by_default_with_its_file_and_line(run, tmp_path):
    refused(run, [GOOD, '{"prompt": "What is', GOOD], r"train\.jsonl:2: not JSON")
    assert not (tmp_path / "run").exists()


def test_a_corrupted_row_can_be_skipped_and_is_reported_with_its_file_and_line(run, caplog, tmp_path):
    with caplog.at_level(logging.WARNING):
        run([GOOD, '{"prompt": "What is', GOOD], "data.on_bad_row=skip")
    (told,) = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert "skipped 1 bad rows of 3; the first: " in told
    assert "train.jsonl:2: not JSON" in told
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
def test_an_empty_dataset_is_refused(run, on_bad_row):
    refused(run, [], r"train\.jsonl: no problems in it", f"data.on_bad_row={on_bad_row}")


@pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
def test_missing_columns_are_named_with_those_found_and_those_accepted(run, on_bad_row):
    message = r"unknown layout; columns found: prompt, solution; accepted: prompt \+ reward_model or "
    refused(run, [{"prompt": "?", "solution": "4"}], message, f"data.on_bad_row={on_bad_row}")


def test_a_prompt_over_the_limit_is_left_out_and_the_first_one_named(run):
    output = run([GOOD, GOOD | {"prompt": "long " * 200, "id": "the-long-one"}], "data.max_prompt_tokens=100")
    assert "left out 1 prompts over 100 tokens (first: the-long-one)" in output


def test_prompts_all_over_the_limit_are_refused(run):
    rows = [GOOD | {"id": "first"}, GOOD | {"id": "second"}]
    refused(
        run,
        rows,
        r"data\.max_prompt_tokens: all 2 prompts .* longer than 5 tokens; the first: first",
        "data.max_prompt_tokens=5",
    )


def test_an_expert_trace_over_the_limit_is_left_out_and_its_problem_kept(run, tmp_path):
    rows = [GOOD, GOOD | {"trace": "1 + " * 300, "id": "the-talkative-one"}]
    output = run(rows, "data.max_trace_tokens=50")
    assert "left out 1 traces over 50 tokens (first: the-talkative-one)" in output
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["rollouts_by_ratio"].values()) == 2 * 8  # both prompts were drawn


def test_traces_all_over_the_limit_are_refused(run):
    refused(
        run, [GOOD], r"has no expert trace \(of at most 2 tokens\); mode trapo needs some", "data.max_trace_tokens=2"
    )


def test_a_tokenizer_without_a_chat_template_is_refused(run, tiny_model_path, tmp_path):
    model = tmp_path / "no-template"
    shutil.copytree(tiny_model_path, model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    refused(run, [GOOD], r"model\.path: the tokenizer has no chat template", model=model)


def test_a_reward_worker_that_hangs_costs_its_answer_and_not_the_run(run, tmp_path):
    run([GOOD, GOOD], "reward.function=reward_fixtures:hang_on_odd_length", "reward.timeout=1", "reward.workers=2")
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    hung = row["reward_failures"]["timeout"]
    assert 0 < hung < 16
    assert row["reward"] == 1 - hung / 16
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["reward_failures"] == {"timeout": hung}


def test_a_reward_that_fails_everywhere_stops_the_run_in_its_first_step_with_the_reason(run, tmp_path):
    refused(run, [GOOD], r"all 16 rewards of step 1 failed .*api_key missing", "reward.function=reward_fixtures:fails")
    rows = (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()
    assert {json.loads(row)["detail"] for row in rows} == {"KeyError: 'api_key missing'"}


def test_an_evaluation_whose_rewards_all_fail_is_no_result(run, tmp_path):
    data = f"data.eval={tmp_path / 'train.jsonl'}"
    message = r"all 1 rewards of the evaluation of 1 problems failed .*api_key missing"
    refused(run, [GOOD], message, data, "eval.before=true", "reward.function=reward_fixtures:fails")
    (row,) = (tmp_path / "run" / "eval" / "step-000000.jsonl").read_text().splitlines()
    assert json.loads(row)["detail"] == "KeyError: 'api_key missing'"
    assert not (tmp_path / "run" / "eval" / "step-000000.json").exists()


def test_some_failing_rewards_are_said_and_cost_their_answers_alone(run):
    output = run([GOOD, GOOD], "reward.function=reward_fixtures:fails_for_odd_length")
    assert "a reward failed in step 1 and scores 0 (error: KeyError: 'odd one')" in output


def test_the_parts_of_a_step_are_timed_and_add_up(run, tmp_path):
    run([GOOD, GOOD], "train.updates_per_step=2")
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    parts = [row[f"seconds_{name}"] for name in ("generate", "reward", "logprobs", "update", "sync")]
    assert all(seconds > 0 for seconds in parts)
    assert 0.8 * row["seconds_step"] < sum(parts) <= row["seconds_step"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    steps = {"generate", "reward", "logprobs", "update", "sync"}
    assert summary["seconds_by_part"].keys() == {*steps, "evaluate", "save"}
