"""The example runs, is short, and the model learns in it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "examples" / "trapo_loop.py"


@pytest.fixture(scope="module")
def train():
    return runpy.run_path(str(PAGE))["train"]


def test_the_loop_fits_on_a_page():
    assert len(PAGE.read_text("utf-8").splitlines()) <= 150


def test_a_tiny_model_learns_the_experts_tokens_and_is_helped_where_it_fails(train, tiny_model_path, capsys):
    rows = train(str(tiny_model_path), steps=5, prompts=2, lr=2e-2)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(row["alone"] == 0 for row in rows)  # random weights solve nothing, so every problem gets all its help
    assert all(row["guided"] == pytest.approx(2 / 3) for row in rows)
    assert rows[-1]["expert_prob"] > 2 * rows[0]["expert_prob"]
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_a_run_is_the_same_again(train, tiny_model_path):
    first, second = (train(str(tiny_model_path), steps=2, prompts=2, lr=1e-2) for _ in range(2))
    assert first == second


@pytest.mark.slow
def test_smollm2_is_right_more_often_after_a_few_steps(train):
    rows = train("smollm2-135m-instruct", steps=4, prompts=6, lr=5e-5)
    first, second = rows[:2], rows[2:]
    for name in ("expert_prob", "alone"):
        assert sum(row[name] for row in second) > sum(row[name] for row in first)
