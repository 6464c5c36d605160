"""`trapo route`: which traces' gradients are concentrated on few matrices, and the two files that come of it."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trapo.cli import eval_job
from trapo.config import merge_config
from trapo.data.loading import load_problems
from trapo.data.sampling import load_problem_set
from trapo.errors import TrapoError
from trapo.evaluation.routing import gini, gradient_norms, kurtosis, layer_matrices, route, variation

TRAIN = "task://word_problems?split=train&n=6&seed=1"


@pytest.mark.parametrize("n", [2, 5, 100])
def test_ginis_ends(n):
    one_hot = torch.zeros(n)
    one_hot[n // 2] = 3.0
    assert gini(one_hot) == pytest.approx(1 - 1 / n)
    assert gini(torch.full((n,), 0.7)) == pytest.approx(0, abs=1e-12)
    assert gini(torch.zeros(n)) == 0.0
    values = torch.rand(n, generator=torch.Generator().manual_seed(0))
    apart = sum(abs(a - b) for a in values.double() for b in values.double())
    assert gini(values) == pytest.approx(float(apart / (2 * n * values.double().sum())))  # the textbook's definition


def test_the_other_measures_are_numpys_of_the_same_name():
    values = torch.tensor([1.0, 2.0, 4.0, 9.0])
    assert variation(values) == pytest.approx(3.0822070014844885 / 4)
    assert kurtosis(values) == pytest.approx(180.5 / 9.5**2)
    assert (variation(torch.zeros(3)), kurtosis(torch.ones(3))) == (0.0, 0.0)


def test_norms_are_those_of_transformers_loss_and_routing_ignores_its_scale(tiny_model_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    problem = load_problem_set(merge_config({}).data, TRAIN, tokenizer, print)[0]
    matrices = layer_matrices(model)
    assert len(matrices) == 2 * 7  # q, k, v, o, gate, up and down of two layers
    found = gradient_norms(model, matrices, problem, problem.traces[0], "float32")
    ids = torch.tensor([problem.prompt_ids + problem.traces[0].token_ids])
    labels = ids.clone()
    labels[:, : len(problem.prompt_ids)] = -100
    grads = torch.autograd.grad(model(ids, labels=labels).loss, matrices)
    expected = torch.stack([g.square().sum() for g in grads])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    scaled = gradient_norms(model, matrices, problem, problem.traces[0], "float32", scale=7.0)
    assert gini(scaled) == pytest.approx(gini(found), rel=1e-5)


def test_two_files_hold_the_problems_the_concentrated_ones_for_rl(tiny_model_path, tmp_path):
    settings = merge_config({"model": {"path": str(tiny_model_path)}, "data": {"train": TRAIN}})
    routed = route(eval_job(settings), tmp_path / "out", by="gini", rl_share=1 / 3, log=print)
    rows = {
        name: [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("rl", "sft")
    }
    assert (len(rows["rl"]), len(rows["sft"]), routed.to_rl) == (2, 4, 2)
    assert min(r["concentration"] for r in rows["rl"]) >= max(r["concentration"] for r in rows["sft"])
    again = [p for name in ("rl", "sft") for p in load_problems(tmp_path / "out" / f"{name}.jsonl")]
    plain = load_problems(TRAIN)
    assert {p.id: (p.prompt, p.answer, p.traces) for p in again} == {
        p.id: (p.prompt, p.answer, p.traces) for p in plain
    }
    with pytest.raises(
        TrapoError, match=r"route: got by=mean, rl_share=0\.5; accepted: gini, cv, kurtosis and a share"
    ):
        route(eval_job(settings), tmp_path / "out", by="mean", rl_share=0.5, log=print)
