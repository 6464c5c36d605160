import json

import pytest

from trapo.cli import eval_job
from trapo.config import merge_config
from trapo.data.encode import EncodedProblem
from trapo.data.problem import Problem
from trapo.engines.protocol import Completion
from trapo.evaluation.evaluate import EvalResult, evaluate
from trapo.rewards import Reward


class Script:
    """Engine, reward pool and tokenizer in one: the n-th response to problem p is right when n < p."""

    def __init__(self):
        self.asked = {}

    def generate(self, requests, *, temperature, seed):
        self.temperature, self.limit = temperature, requests[0].max_new_tokens
        return [Completion(r.context, True) for r in requests]

    def decode(self, ids, skip_special_tokens):
        n = self.asked[ids[0]] = self.asked.get(ids[0], -1) + 1
        return "right" if n < ids[0] else "wrong"

    def score(self, pairs):
        return [Reward(float(text == "right"), "ok" if text == "right" else "timeout") for text, _ in pairs]


def problems(n):
    return [
        EncodedProblem(Problem(f"p{i}", ({"role": "user", "content": "?"},), "1", (), "test"), (i,), ())
        for i in range(n)
    ]


def run(n, *overrides, **options):
    script = Script()
    job = eval_job(merge_config({}, overrides))
    asked = {"temperature": job.eval.temperature, "samples": job.eval.samples, **options}
    limit = job.max_response_tokens
    return evaluate(problems(n), script, script, script, max_response_tokens=limit, seed=0, **asked), script


def test_one_greedy_answer_a_problem_gives_accuracy_with_wilsons_interval():
    result, script = run(4, "rollout.max_response_tokens=30")
    assert result.accuracy == 0.75  # problem 0 is never right
    assert 0.3 < result.interval[0] < 0.75 < result.interval[1] < 1
    assert (script.temperature, script.limit) == (0.0, 30)
    assert result.reward_failures == {"timeout": 1}


def test_several_samples_give_avg_at_k_and_pass_at_k():
    result, _ = run(5, "eval.samples=4", "eval.temperature=0.8")
    assert result.accuracy == pytest.approx((0 + 1 + 2 + 3 + 4) / 20)
    assert result.pass_at["1"] == pytest.approx(result.accuracy)
    # pass@2 = 1 − C(wrong, 2)/C(4, 2) per problem
    assert result.pass_at["2"] == pytest.approx((0 + 3 / 6 + 5 / 6 + 1 + 1) / 5)
    assert result.pass_at["4"] == pytest.approx(4 / 5)


def test_every_response_is_written_with_its_problem_and_reward(tmp_path):
    run(2, "eval.samples=2", "eval.temperature=1", rows_path=tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(r["id"], r["reward"]) for r in rows] == [("p0", 0.0), ("p0", 0.0), ("p1", 1.0), ("p1", 0.0)]


def test_a_result_reads_back_as_it_was_saved(tmp_path):
    result, _ = run(3)
    result.save(tmp_path / "e.json")
    assert EvalResult.load(tmp_path / "e.json") == result
