"""Distilling into a tiny model: each teacher's update against a formula on whole logits, in float64."""

import copy
import dataclasses
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from test_learner import model  # noqa: F401
from transformers import LlamaConfig, LlamaForCausalLM

import trapo_kernels as tk
from trapo.config import merge_config
from trapo.data.encode import EncodedProblem, PromptEncoder, Trace
from trapo.data.problem import DataError, Problem
from trapo.distillation import Distillation, Tutor
from trapo.distillation.heads import ModelTeacher, Privileged
from trapo.distillation.listed import ColumnTeacher, ServerTeacher, rows_of
from trapo.distillation.making import make_tutor
from trapo.modes import phases
from trapo.rollouts import Rollout
from trapo.trainer import make_learner

KINDS = ("forward_kl", "reverse_kl", "jsd", "mixed")


def rollouts(**row):
    generator = torch.Generator().manual_seed(3)

    def ids(n):
        return tuple(torch.randint(3, 40000, (n,), generator=generator).tolist())

    out = []
    for group, lengths in enumerate([(2, 5, 3), (1, 4)]):
        message = {"role": "user", "content": f"How many is {group} {{and}} {{trace}}?"}
        text = Problem(f"p{group}", (message,), "1", ("x",), "test", row)
        problem = EncodedProblem(text, ids(4 + group), (Trace((*ids(3), 2), ()), Trace((*ids(5), 2), ())))
        out += [Rollout(problem, group, 0, 0.0, (), ids(n), False, True, 0.0, "ok", 0.3 * n - 1) for n in lengths]
    return out


def other_model(rows=0):
    torch.manual_seed(5)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=49152 + rows, num_hidden_layers=1, initializer_range=0.3, **sizes)
    return LlamaForCausalLM(config).eval()


def learner_of(model, *overrides):  # noqa: F811
    return make_learner(merge_config({"optim": {"lr": 1e-3}}, overrides), copy.deepcopy(model), pad_id=2)


def gradient(learner, sample, objective):
    """(the gradient of an update, its metrics)"""
    found = []
    learner._step = lambda loss, region: found.append(flat(learner.model)) or 0.0
    update = learner.update(sample, objective, seed=0)
    return found[-1], update.metrics


def flat(model):  # noqa: F811
    return torch.cat([p.grad.flatten() for p in model.parameters()])


NOTHING = tk.Objective(expert=None, policy=None)


# The formulas, written down once more --------------------------------------------------------------------------------


def kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


def dense(kind, p, q, beta):
    """D of each row: p is the teacher."""
    m = beta * p + (1 - beta) * q
    return {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m),
        "mixed": beta * kl(p, q) + (1 - beta) * kl(q, p),
    }[kind]


def probabilities(model, prompt, response, temperature=1.0):  # noqa: F811
    """[tokens of the response, V] float64."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return (logits.double() / temperature).softmax(-1)


def expected(model, sample, divergence_of, *, by_sequence=False, temperature=1.0):  # noqa: F811
    """(gradient, mean divergence) of a float64 copy; divergence_of(rollout, student's q [n, V]) -> [n]."""
    student = copy.deepcopy(model).double()
    each = []
    for r in sample:
        each.append(divergence_of(r, probabilities(student, r.problem.prompt_ids, r.response_ids, temperature)))
    loss = torch.stack([d.mean() for d in each]).mean() if by_sequence else torch.cat(each).mean()
    loss.backward()
    return flat(student), float(torch.cat(each).mean().detach())


def close(found, exact, tolerance=2e-5):
    assert exact.norm() > 0
    assert float((found - exact).norm() / exact.norm()) < tolerance


# A teacher with a head -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_self_distillation_learns_the_distribution_that_the_trace_makes(model, tokenizer, kind):  # noqa: F811
    sample, learner = rollouts(), learner_of(model, "train.micro_batch_tokens=64")
    how = Distillation("current", kind, beta=0.3)
    problems = list({id(r.problem): r.problem for r in sample}.values())
    learner.tutor = make_tutor(how, learner, tokenizer, problems, merge_config({}).model)
    encoder, seen = PromptEncoder(tokenizer), set()
    reread = learner.tutor.teacher.reread

    def divergence_of(r, q):
        traces = [tokenizer.decode(list(t.token_ids), skip_special_tokens=True) for t in r.problem.traces]
        texts = [how.template.replace("{trace}", t, 1).replace("{prompt}", "How many", 1) for t in traces]
        prompts = [
            encoder.encode(dataclasses.replace(r.problem.problem, prompt=({"role": "user", "content": text},)))
            for text in (t.replace("How many", r.problem.problem.prompt[0]["content"], 1) for t in texts)
        ]
        given = reread(r).problem.prompt_ids
        seen.add(prompts.index(given))
        with torch.no_grad():
            p = probabilities(copy.deepcopy(model).double(), given, r.response_ids)
        return dense(kind, p, q, 0.3)

    exact, mean = expected(model, sample, divergence_of)
    found, metrics = gradient(learner, sample, NOTHING)
    close(found, exact)
    assert seen == {0, 1}  # each trace is somebody's
    assert metrics["divergence"] == pytest.approx(mean, rel=1e-4) == metrics["loss_distill"]
    assert metrics["distilled_tokens"] == sum(len(r.own_ids) for r in sample)
    assert metrics["divergence_max"] > metrics["divergence"] > 0


@pytest.mark.parametrize(
    ("options", "rows", "by_sequence"),
    [
        (["train.share_prefixes=never"], 0, False),
        (["train.packing=always", "rollout.temperature=0.7"], 8, False),
        (["train.micro_batch_tokens=9"], 0, True),
    ],
)
def test_another_models_distribution_is_learnt_however_rollouts_are_laid_out(model, options, rows, by_sequence):  # noqa: F811
    sample, learner, teacher = rollouts(), learner_of(model, *options), other_model(rows)
    temperature = learner.temperature
    reader = ModelTeacher(teacher, precision="float32", budget=20, pad_id=2)
    learner.tutor = Tutor(Distillation("path", "reverse_kl", coef=2.0), reader, temperature)
    objective = dataclasses.replace(NOTHING, reduction="sequence_mean" if by_sequence else "token_mean")

    def divergence_of(r, q):
        with torch.no_grad():
            p = probabilities(copy.deepcopy(teacher).double(), r.problem.prompt_ids, r.response_ids, temperature)
        p = p[:, :49152] / p[:, :49152].sum(-1, keepdim=True)
        return dense("reverse_kl", p, q, 0.5)

    exact, mean = expected(model, sample, divergence_of, by_sequence=by_sequence, temperature=temperature)
    found, metrics = gradient(learner, sample, objective)
    close(found, 2 * exact)
    assert metrics["divergence"] == pytest.approx(mean, rel=1e-5)


def test_the_divergence_comes_beside_the_policy_term_where_a_run_asks_for_both(model):  # noqa: F811
    sample, teacher = rollouts(), ModelTeacher(other_model(), precision="float32", budget=99, pad_id=2)
    objective, tutor = tk.Objective.grpo(), Tutor(Distillation("path", "jsd"), teacher, 1.0)
    alone, both, taught = learner_of(model), learner_of(model), learner_of(model)
    both.tutor = taught.tutor = tutor
    (policy, _), (divergence, _) = gradient(alone, sample, objective), gradient(taught, sample, NOTHING)
    found, metrics = gradient(both, sample, objective)
    close(found, policy.double() + divergence.double())
    assert {"entropy", "divergence"} <= metrics.keys()


def test_an_update_brings_the_student_nearer_and_the_same_tokens_are_measured_before_and_after(model):  # noqa: F811
    sample, learner = rollouts(), learner_of(model)
    teacher = ModelTeacher(other_model(), precision="float32", budget=99, pad_id=2)
    learner.tutor = Tutor(Distillation("path", "forward_kl"), teacher, 1.0)
    (phase,) = phases(merge_config({}, ["mode=distill", "distill.teacher=x", "distill.check_every=2"]))
    assert phase.memory.after(sample, learner, 0)["divergence_after"] == learner.divergence(sample)["divergence"]
    before = learner.update(sample, NOTHING, seed=0).metrics["divergence"]
    assert phase.memory.after(sample, learner, 0) == {}
    assert phase.memory.after(sample, learner, 0)["divergence_after"] < before
    assert phase.memory.state_dict() == {"steps": 3}


def test_the_privileged_prompt_holds_the_prompt_and_the_trace_and_nothing_of_either_is_a_template(tokenizer):
    encoder = Privileged(tokenizer, "{prompt} <<{trace}>> {prompt}")
    messages = ({"role": "system", "content": "S"}, {"role": "user", "content": "a {trace} b"})
    trace = Trace((*tokenizer("c {prompt} d")["input_ids"], tokenizer.eos_token_id), ())
    problem = EncodedProblem(Problem("x", messages, "1", (), "s"), (1,), (trace,))
    text = tokenizer.decode(list(encoder.prompt(problem, 0)))
    assert "a {trace} b <<c {prompt} d>> a {trace} b" in text
    assert "system\nS" in text


# A teacher's top-k ---------------------------------------------------------------------------------------------------


def top(teacher, r, k):
    """(ids, logprobs) [tokens, k] each."""
    with torch.no_grad():
        values = probabilities(teacher, r.problem.prompt_ids, r.response_ids).log().topk(k)
    return values.indices, values.values


def bucket(ids, log_p, q):
    """KL(q ‖ p) over the ids and one more class."""
    inside = q.gather(1, ids)
    with_rest = [torch.cat([x, 1 - x.sum(1, keepdim=True)], 1) for x in (log_p.exp().to(q), inside)]
    return kl(with_rest[1], with_rest[0])


class VLLM(BaseHTTPRequestHandler):
    """Answers as `vllm serve` does: the top-k of each token of the prompt, and the token itself."""

    teacher, asked = None, []

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer({"data": [{"id": "served"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append(body)
        with torch.no_grad():
            logprobs = self.teacher(torch.tensor([body["prompt"]])).logits[0].double().log_softmax(-1)
        entries = [None]
        for place, token in enumerate(body["prompt"][1:]):
            values, ids = logprobs[place].topk(body["prompt_logprobs"])
            entry = {str(i): {"logprob": v, "rank": 1} for i, v in zip(ids.tolist(), values.tolist(), strict=True)}
            entries.append({**entry, str(token): {"logprob": float(logprobs[place, token]), "rank": 99}})
        self._answer({"choices": [{"prompt_logprobs": entries, "text": "x"}]})

    def _answer(self, value):
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def served():
    VLLM.teacher, VLLM.asked = other_model(), []
    server = HTTPServer(("127.0.0.1", 0), VLLM)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_servers_top_k_is_learnt_with_a_bucket_for_the_rest(model, served):  # noqa: F811
    sample, learner = rollouts(), learner_of(model, "train.micro_batch_tokens=30")
    how = Distillation(served, "reverse_kl", top_k=6)
    learner.tutor = Tutor(how, ServerTeacher(served, top_k=6, vocab=49152), 1.0)

    def divergence_of(r, q):
        ids, log_p = top(VLLM.teacher, r, 6)
        return torch.stack([_with_own(i, x, t, p, q_) for i, x, t, p, q_ in _rows(r, ids, log_p, q)])

    def _rows(r, ids, log_p, q):
        whole = probabilities(VLLM.teacher, r.problem.prompt_ids, r.response_ids).log().detach()
        return zip(ids, log_p, r.response_ids, whole, q, strict=True)

    def _with_own(ids, log_p, token, whole, q):
        if token not in ids.tolist():
            ids, log_p = torch.cat([ids, torch.tensor([token])]), torch.cat([log_p, whole[token, None]])
        return bucket(ids[None], log_p[None], q[None])[0]

    exact, mean = expected(model, sample, divergence_of)
    found, metrics = gradient(learner, sample, NOTHING)
    close(found, exact, 1e-4)
    assert metrics["divergence"] == pytest.approx(mean, rel=1e-4)
    assert 0 < metrics["outside_topk"] < 1
    assert sorted(body["prompt"] for body in VLLM.asked) == sorted(
        list(r.problem.prompt_ids + r.own_ids) for r in sample
    )
    assert {body["model"] for body in VLLM.asked} == {"served"}


def of_trace(r, k, ends=True):
    """The rollout that is the first trace, with a top-k of some teacher in its columns."""
    problem = dataclasses.replace(r.problem, traces=r.problem.traces[:1])
    whole = dataclasses.replace(r, problem=problem, own_ids=(), prefix_ids=problem.traces[0].token_ids, supervised=True)
    ids, log_p = top(other_model(), whole, k)
    count = len(ids) if ends else len(ids) - 1
    row = {"topk_ids": ids[:count].tolist(), "topk_logprobs": log_p[:count].tolist()}
    text = dataclasses.replace(problem.problem, row=row)
    return dataclasses.replace(whole, problem=dataclasses.replace(problem, problem=text))


@pytest.mark.parametrize("ends", [True, False])
def test_columns_of_a_trace_are_learnt_token_by_token(model, ends):  # noqa: F811
    sample = [of_trace(r, 5, ends) for r in (rollouts()[0], rollouts()[3])]
    learner = learner_of(model)
    teacher = ColumnTeacher([r.problem for r in sample], 49152)
    learner.tutor = Tutor(Distillation("columns", "reverse_kl"), teacher, 1.0)

    def divergence_of(r, q):
        count = len(r.problem.problem.row["topk_ids"])
        row = r.problem.problem.row
        found = bucket(torch.tensor(row["topk_ids"]), torch.tensor(row["topk_logprobs"]).double(), q[:count])
        return torch.cat([found, q.new_zeros(len(q) - count)])

    exact, mean = expected(model, sample, divergence_of)
    found, metrics = gradient(learner, sample, NOTHING)
    close(found, exact, 1e-4)
    assert metrics["divergence"] == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "column 'topk_ids' must be a list of lists, one a token; got None"),
        ({"topk_ids": [[1]] * 4}, "column 'topk_logprobs' must be a list of lists"),
        ({"topk_ids": [[1]] * 9, "topk_logprobs": [[-1.0]] * 9}, "must have 4 lists, .*, or 3, without the end; got 9"),
        ({"topk_ids": [[1, 2]] * 4, "topk_logprobs": [[-1.0]] * 4}, "token 0 has 2 'topk_ids' and 1 'topk_logprobs'"),
        ({"topk_ids": [[1.5]] * 4, "topk_logprobs": [[-1.0]] * 4}, "token 0: ids and log-probabilities must be"),
        ({"topk_ids": [[99999]] * 4, "topk_logprobs": [[-1.0]] * 4}, "ids must be from 0 to 49151, or -1; got 99999"),
        ({"topk_ids": [[1]] * 4, "topk_logprobs": [[0.5]] * 4}, "log-probabilities must be at most 0; got 0.5"),
        ({"topk_ids": [[1]] * 4, "topk_logprobs": [[math.nan]] * 4}, "log-probabilities must be at most 0; got nan"),
        ({"topk_ids": [[1, 2]] * 4, "topk_logprobs": [[-0.1, -0.1]] * 4}, "must not be above 1 in sum"),
    ],
)
def test_columns_that_say_no_top_k_are_refused_with_the_problem_named(row, reason):
    problem = of_trace(rollouts()[0], 2).problem
    problem = dataclasses.replace(problem, problem=dataclasses.replace(problem.problem, row=row))
    with pytest.raises(DataError, match=rf"^data\.train: p0:.*{reason}") as error:
        ColumnTeacher([problem], 49152)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({}, "no choice with prompt_logprobs"),
        ({"choices": [{"prompt_logprobs": None}]}, "must be a list of 2; got None"),
        ({"choices": [{"prompt_logprobs": [None, None]}]}, "ids of token 1 to log-probabilities; got None"),
        ({"choices": [{"prompt_logprobs": [None, {"a": {"logprob": 0}}]}]}, "ids with a logprob each"),
        ({"choices": [{"prompt_logprobs": [None, {"7": {"logprob": 0}}]}]}, "ids must be from 0 to 6, or -1; got 7"),
    ],
)
def test_an_answer_that_is_no_top_k_is_one_line(answer, reason):
    with pytest.raises(ValueError, match=reason):
        rows_of(answer, 2, 7)
