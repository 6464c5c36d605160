"""What expert terms read beside the model: the log-probabilities of what wrote the traces, and a reference's head."""

import copy
import dataclasses
import json

import pytest
import torch
from killed_run import settings, train_here
from test_learner import model  # noqa: F401
from transformers import AutoTokenizer

import trapo_kernels as tk
from trapo.config import merge_config
from trapo.data.encode import EncodedProblem, Trace, encode_problems
from trapo.data.loading import load_problems
from trapo.data.problem import DataError, Problem
from trapo.errors import TrapoError
from trapo.rollouts import Rollout
from trapo.trainer import make_learner

IDS = (11, 400, 13, 9000, 15, 16, 17)


def traces(own=False):
    """Two whole traces of unequal lengths and one half of one, with or without own tokens behind it."""
    made, generator = [], torch.Generator().manual_seed(0)
    for group, size in enumerate((7, 5, 3)):
        behaviour = tuple((-3 * torch.rand(7, generator=generator)).tolist())
        expert = Trace(IDS, (), behaviour)
        text = Problem(str(group), ({"role": "user", "content": "?"},), "1", (), "test")
        whole = size == 7
        made.append(
            Rollout(
                EncodedProblem(text, (5, 6, 7 + group), (Trace((1, 2), ()), expert)), group, 0, size / 7, IDS[:size],
                () if whole or not own else (21, 22), True, True, 1.0, "ok", 0.5,
            )
        )  # fmt: skip
    return made


def gradient(net, objective, sample, reference=None, *overrides):
    learner = make_learner(merge_config({}, overrides), copy.deepcopy(net), pad_id=2, reference=reference)
    found = []
    learner._step = lambda loss, region: found.append([p.grad.clone() for p in learner.parameters]) or 0.0
    learner.update(sample, objective, seed=0)
    return found


def logits(net, rollout):
    ids = torch.tensor([rollout.problem.prompt_ids + rollout.response_ids])
    log_p = net(ids).logits[0, :-1].log_softmax(-1)
    start = len(rollout.problem.prompt_ids) - 1
    return log_p[start:], ids[0, 1 + start :]


@pytest.mark.parametrize(("level", "own"), [("token", False), ("block", False), ("sequence", False), ("token", True)])
def test_pear_weighs_by_the_behaviour_that_came_with_the_trace(model, level, own):  # noqa: F811
    objective = tk.Objective(expert="pear", policy="clip", pear_level=level, pear_block=2, pear_gamma=0.9)
    (found,) = gradient(model, objective, traces(own))
    net, loss, tokens = copy.deepcopy(model), 0.0, 0
    for r in traces(own):
        log_p, targets = logits(net, r)
        chosen = log_p.gather(-1, targets[:, None])[:, 0]
        n = len(r.prefix_ids)
        steps = (chosen[:n].detach() - torch.tensor(r.problem.traces[1].behaviour[:n])).clamp(-0.08, 0.3)
        ends = {"token": [i + 1 for i in range(n)], "block": [2 * (i // 2) + 2 for i in range(n)]}.get(level, [0] * n)
        gamma = 1.0 if level == "sequence" else 0.9
        weights = torch.stack([gamma ** max(n - e, 0) * steps[e:].sum().exp() for e in ends])
        loss = loss - (weights * chosen[:n]).sum() - (0.5 * (chosen[n:] - chosen[n:].detach()).exp()).sum()
        tokens += len(chosen)
    for actual, expected in zip(found, torch.autograd.grad(loss / tokens, list(net.parameters())), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)


def test_asft_is_dft_and_the_divergence_from_the_first_weights(model):  # noqa: F811
    net, reference = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.3)
    (found,) = gradient(net, tk.Objective.asft(asft_kl=0.7), traces(), reference)
    (dft,) = gradient(net, tk.Objective.dft(), traces())
    loss, tokens = 0.0, 0
    for r in traces():
        log_p, targets = logits(net, r)
        with torch.no_grad():
            of_reference, _ = logits(reference, r)
        chosen = log_p.gather(-1, targets[:, None])[:, 0]
        divergence = (of_reference.exp() * (of_reference - log_p)).sum()
        loss, tokens = loss - (chosen.detach().exp() * chosen).sum() + 0.7 * divergence, tokens + len(chosen)
    for actual, expected in zip(found, torch.autograd.grad(loss / tokens, list(net.parameters())), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-7)
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(found, dft, strict=True))


def test_lco_kld_has_the_models_own_first_probabilities_of_whole_traces(model):  # noqa: F811
    """In the first of two updates π_old is π, so that it is as if there were no old one."""
    objective = tk.Objective(expert="lco_kld", policy=None, lco_beta=1.0)
    sample = traces()[:1] * 2
    first, _ = gradient(model, objective, [dataclasses.replace(r) for r in sample], None, "train.updates_per_step=2")
    (alone,) = gradient(model, objective, sample[:1])
    for actual, expected in zip(first, alone, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-8)


# The column --------------------------------------------------------------------------------------------------------


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_column_is_a_list_or_one_a_trace(tmp_path):
    rows = [
        {"prompt": "a", "answer": "1", "trace": "x", "behaviour_logprobs": [-0.5, 0]},
        {"prompt": "b", "answer": "1", "traces": ["x", "y"], "behaviour_logprobs": [[-0.5], [-1, -2.0]]},
        {"prompt": "c", "answer": "1", "trace": "x"},
    ]
    found = load_problems(write(tmp_path / "a.jsonl", rows))
    assert [p.behaviour for p in found] == [((-0.5, 0.0),), ((-0.5,), (-1.0, -2.0)), ()]
    assert "behaviour_logprobs" not in found[0].row


@pytest.mark.parametrize(
    "value", [0.5, [0.5], "x", [[-1], [-2]], [["a"]], [float("-inf")], [float("nan")], [[-1, [-2]]], []]
)
def test_what_is_no_list_of_log_probabilities_is_refused(value, tmp_path):
    rows = [{"prompt": "a", "answer": "1", "traces": ["x"], "behaviour_logprobs": value}]
    if value == []:  # a trace of no tokens is none: the number of tokens says so
        assert load_problems(write(tmp_path / "a.jsonl", rows))[0].behaviour == ((),)
        return
    with pytest.raises(DataError, match=r"column 'behaviour_logprobs' must hold log-probabilities, a list for each of"):
        load_problems(write(tmp_path / "a.jsonl", rows))


def test_numbers_are_as_many_as_tokens(tiny_model_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    text = "The answer is 4."
    count = len(tokenizer(text)["input_ids"]) + 1  # with the end

    def encoded(numbers):
        problem = Problem("p", ({"role": "user", "content": "?"},), "4", (text,), "test", ((-1.0,) * numbers,))
        return encode_problems([problem], tokenizer, max_prompt_tokens=99, max_trace_tokens=99)[0]

    assert encoded(count)[0].traces[0].behaviour == (-1.0,) * count
    with pytest.raises(TrapoError, match=rf"behaviour_logprobs has {count - 1} numbers for a trace of {count} tokens"):
        encoded(count - 1)


def test_runs_from_yaml_take_pear_with_the_column_and_asft_with_the_model(tiny_model_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    rows = [{"prompt": f"{n}?", "answer": str(n), "trace": f"It is {n}."} for n in range(6)]
    short = ["mode=sft", "train.steps=2", "train.updates_per_step=1", "data.eval=null", "checkpoint.every=0"]
    without = write(tmp_path / "without.jsonl", rows)
    refused = settings(tiny_model_path, tmp_path / "no", *short, f"data.train={without}", "objective.expert=pear")
    with pytest.raises(
        TrapoError, match=r"data\.train: objective\.expert reads .* behaviour_logprobs; 6 problems have"
    ):
        train_here(refused)
    for row in rows:
        row["behaviour_logprobs"] = [-8.0] * (len(tokenizer(row["trace"])["input_ids"]) + 1)
    given = write(tmp_path / "with.jsonl", rows)
    for name, more in {
        "pear": ["objective.expert=pear", "objective.pear_level=block"],
        "asft": ["objective.expert=asft"],
        "sft": [],
    }.items():
        train_here(settings(tiny_model_path, tmp_path / name, *short, f"data.train={given}", *more))
    norms = {
        name: [json.loads(line)["grad_norm"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("pear", "asft", "sft")
    }
    assert all(norm > 0 for of_run in norms.values() for norm in of_run)
    assert len({of_run[0] for of_run in norms.values()}) == 3
