"""The page on a first run, run as it is written: its files, its commands in their order, and what they leave behind."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import forked
import pytest

PAGE = (Path(__file__).parents[1] / "docs/first_run.md").read_text("utf-8")
FILES = re.findall(r'^```(?:python|yaml) title="(.+?)"\n(.*?)^```', PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [shlex.split(line) for line in re.findall(r"^\$ (.+)$", PAGE, re.MULTILINE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_path):
    """Everything that the page makes, with a model of two layers in the place of SmolLM2, and shorter answers of it."""
    folder = tmp_path_factory.mktemp("first-run")
    for name, content in FILES:
        (folder / name).write_text(content)
    for program, *arguments in COMMANDS:
        if program == "python":
            subprocess.run([sys.executable, *arguments], cwd=folder, check=True)
            continue
        assert program == "trapo"
        if arguments[0] in ("eval", "train"):
            arguments += [f"model.path={tiny_model_path}", "train.threads=1", "rollout.max_response_tokens=16"]
        done = forked.run("trapo.tools.command:main", arguments, cwd=folder, timeout=240)
        assert done.returncode == 0, (arguments, done.stdout[-2000:], done.stderr[-2000:])
    return folder


def test_the_page_names_the_files_that_its_commands_read():
    names = {name for name, _ in FILES}
    assert names == {"make_data.py", "my_reward.py", "pens.yaml"}
    assert [command[:2] for command in COMMANDS] == [
        ["python", "make_data.py"], ["trapo", "eval"], ["trapo", "train"], ["trapo", "grade"], ["trapo", "report"]
    ]  # fmt: skip


def test_the_run_ends_with_a_report_of_the_prompts_and_rewards_of_the_page(folder):
    report = (folder / "runs/pens/report.html").read_text("utf-8")
    assert "Ann has" in report
    assert 'class="group"' in report
    rows = [json.loads(line) for line in (folder / "runs/pens/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 10
    assert all(0 <= row["own_reward"] <= 1 for row in rows)
    assert sum(row["guided"] for row in rows) > 0  # a model of random weights fails alone
    assert not any(row["reward_failures"] for row in rows)


def test_evaluated_answers_stand_beside_their_prompts(folder):
    rows = [json.loads(line) for line in (folder / "runs/before/eval.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert all(row["prompt"].startswith("Ann has") and row["status"] == "ok" for row in rows)
