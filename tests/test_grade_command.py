"""`trapo grade`: files of answers, graded again."""

import json

import pytest
from typer.testing import CliRunner

from trapo.cli import app
from trapo.errors import TrapoError
from trapo.rewards.grading import grade_file

ROWS = [
    {"id": "a", "answer": "24", "text": "so\n#### $24", "reward": 1.0, "status": "ok"},
    {"id": "b", "answer": "24", "text": "### Plan\n#### Step 24", "reward": 1.0, "status": "ok"},
    {"id": "c", "answer": "1/2", "text": "\\boxed{0.5}", "reward": 1.0, "status": "ok"},
    {"id": "d", "answer": "7", "text": "no idea\u2028#### 8", "reward": 0.0, "status": "ok"},
]


@pytest.fixture
def file(tmp_path):
    def write(rows, name="eval.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def test_the_command_shows_which_rule_decided_and_writes_each_grade(file, tmp_path):
    out = tmp_path / "graded.jsonl"
    path = file(ROWS)
    result = CliRunner().invoke(app, ["grade", str(path), "--out", str(out), "--show", "1", "--workers", "1"])
    assert result.exit_code == 0, result.output
    assert "4 answers, mean reward 0.500" in result.output
    assert "no final answer" in result.output
    assert "right  number: '0.5'  gold '1/2'" in result.output
    graded = [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n") if line]
    assert [row["reward"] for row in graded] == [1.0, 0.0, 1.0, 0.0]
    assert [row["id"] for row in graded] == ["a", "b", "c", "d"]
    assert graded[2]["rule"] == "number"
    assert graded[2]["given"] == "0.5"


def test_lines_of_rollouts_jsonl_are_prefix_and_own_text(file):
    (graded,) = grade_file(file([{"answer": "24", "prefix": "so\n", "own": "#### 24", "reward": 0.0}]), workers=1)
    assert graded.text == "so\n#### 24"
    assert graded.reward.value == 1.0
    assert graded.before == 0.0


def test_other_columns_and_functions_can_be_named(file):
    path = file([{"said": "so 24", "wanted": 24}])
    (graded,) = grade_file(path, "said", "wanted", "math_verify", workers=1)
    assert (graded.reward.value, graded.rule) == (1.0, "ok")
    (failed,) = grade_file(path, "said", "wanted", "reward_fixtures:fails", workers=1)
    assert (failed.rule, failed.reward.detail) == ("error", "KeyError: 'api_key missing'")


def test_rewards_of_another_range_are_declared_or_refused(file):
    command = ["grade", str(file([{"answer": "4", "text": "so 4", "reward": 0.75}])), "--workers", "1"]
    command += ["--function", "reward_fixtures:five"]
    declared = CliRunner().invoke(app, [*command, "--range", "-10", "10"])
    assert declared.exit_code == 0, declared.output
    assert "1 answers, mean reward 0.750" in declared.output
    refused = CliRunner().invoke(app, command)
    assert str(refused.exception).startswith("reward.function: got a reward of 5 in eval.jsonl; accepted: 0 to 1")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"said": "24", "answer": "24"}], r"no column text or response or .*; columns found: said, answer; --text"),
        ([{"text": "24"}], r"no column answer or gold or .*--answer names another one"),
        ([{"text": ["24"], "answer": "24"}], r":1: column 'text' must be text; got list"),
        ([[1]], r":1: a row must be a JSON object; got list"),
        ([], r"has no rows"),
    ],
)
def test_a_file_of_another_layout_is_refused_in_one_line(file, rows, message):
    with pytest.raises(TrapoError, match=message) as caught:
        grade_file(file(rows))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused_in_one_line(tmp_path):
    with pytest.raises(TrapoError, match=r"absent\.jsonl cannot be read: No such file"):
        grade_file(tmp_path / "absent.jsonl")
