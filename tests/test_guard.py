"""The agreement guard, with an engine that generates from a copy of the model: its weights can be stale."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from trapo.config import RolloutConfig, merge_config
from trapo.data.encode import EncodedProblem
from trapo.data.problem import Problem
from trapo.engines.guard import AgreementGuard, plain_scorer, unanswered
from trapo.engines.hf import HFEngine
from trapo.engines.protocol import Completion, Request
from trapo.errors import TrapoError
from trapo.rollouts import Rollout
from trapo.runs.ranks import Ranks
from trapo.trainer import make_learner


@pytest.fixture(scope="module")
def model(tiny_model_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    return model


class CopyEngine:
    """Generates with weights of its own and says what it gave each token, like an engine of another process."""

    def __init__(self, model, temperature=1.0):
        self.inner = HFEngine(copy.deepcopy(model), eos_ids=[2], pad_id=2)
        self.temperature = temperature
        self.asked = []

    def generate(self, requests, *, temperature, seed):
        self.asked += requests
        completions = self.inner.generate(requests, temperature=temperature, seed=seed)
        score = plain_scorer(self.inner.model, self.temperature)
        given = [
            score([Rollout(problem(r.context), 0, 0, 0.0, (), c.token_ids, False, True)])[0]
            for r, c in zip(requests, completions, strict=True)
        ]
        return [Completion(c.token_ids, c.finished, tuple(g.tolist())) for c, g in zip(completions, given, strict=True)]


def problem(ids):
    return EncodedProblem(Problem("p", ({"role": "user", "content": "?"},), "1", (), "test"), tuple(ids), ())


def rollouts():
    sample = [Rollout(problem((5, 6, 7 + i)), i, 0, 0.0, (), (8, 9), False, True) for i in range(5)]
    return [*sample, Rollout(problem((5, 6)), 5, 1, 0.5, (11, 12, 13), (14,), True, False)]


def guard(**settings):
    return AgreementGuard(RolloutConfig(engine="vllm", **settings), "float32")


def scorer(model):
    return make_learner(merge_config({}), copy.deepcopy(model), pad_id=2).own_logprobs


def test_an_engine_with_the_learners_weights_passes_and_its_difference_is_reported(model):
    engine = CopyEngine(model)
    difference = guard(guard_tokens=32).check(engine, rollouts(), scorer(model), seed=0)
    assert 0 <= difference < 1e-5
    assert sum(r.max_new_tokens for r in engine.asked) == 32
    assert len(engine.asked[-1].context) == 5  # the expert prefix belongs to it


def test_weights_that_were_not_synced_stop_the_run_in_one_line(model):
    engine = CopyEngine(model)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.get_decoder().layers[0].mlp.down_proj.weight.mul_(1.1)
    with pytest.raises(TrapoError, match=r"^rollout\.guard_tolerance: the engine does not generate") as error:
        guard().check(engine, rollouts(), scorer(changed), seed=0)
    assert "\n" not in str(error.value)
    assert guard(guard_tolerance=100.0).check(engine, rollouts(), scorer(changed), seed=0) > 1e-3


def test_log_probabilities_that_are_not_numbers_stop_the_run(model):
    class Broken(CopyEngine):
        def generate(self, requests, *, temperature, seed):
            return [Completion((5,), True, (float("nan"),)) for _ in requests]

    with pytest.raises(TrapoError, match="disagree by nan"):
        guard().check(Broken(model), rollouts(), scorer(model), seed=0)


def test_the_comparison_is_at_the_temperature_that_is_sampled_from(model):
    score = plain_scorer(model, 0.7)
    assert guard(temperature=0.7).check(CopyEngine(model, 0.7), rollouts(), score, seed=0) < 1e-5
    with pytest.raises(TrapoError):
        guard(temperature=0.7).check(CopyEngine(model, 1.0), rollouts(), score, seed=0)


@pytest.mark.parametrize("settings", [{"guard_tokens": 0}, {"engine": "hf"}])
def test_a_guard_that_is_off_asks_nothing(model, settings):
    engine = CopyEngine(model)
    check = AgreementGuard(RolloutConfig(**{"engine": "vllm", **settings}), "float32").check
    assert check(engine, rollouts(), scorer(model), seed=0) is None
    assert engine.asked == []


def test_rollouts_that_are_full_traces_are_not_begun_again(model):
    whole = Rollout(problem((5, 6)), 0, 0, 1.0, (7, 2), (), True, True)
    assert guard().check(CopyEngine(model), [whole], scorer(model), seed=0) is None


def test_before_the_first_step_the_prompts_themselves_are_compared(model):
    engine = CopyEngine(model)
    assert guard(guard_tokens=8).check(engine, unanswered([problem((5, 6))]), plain_scorer(model, 1.0), seed=0) < 1e-5
    assert engine.asked == [Request((5, 6), 8)]


def test_learner_and_plain_scorer_give_the_same(model):
    for a, b in zip(scorer(model)(rollouts()), plain_scorer(model, 1.0)(rollouts()), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


class Engines:
    """An engine a rank, as all ranks together ask them."""

    def __init__(self, *engines):
        self.engines = engines

    def generate(self, requests, *, temperature, seed):
        ranks = [Ranks(i, len(self.engines)) for i in range(len(self.engines))]
        parts = zip(self.engines, (rank.share(requests) for rank in ranks), strict=True)
        return [c for e, part in parts for c in e.generate(part, temperature=temperature, seed=seed)]


def test_every_rank_s_engine_is_asked_and_a_stale_one_among_many_is_named(model):
    stale = copy.deepcopy(model)
    with torch.no_grad():
        stale.get_decoder().layers[0].mlp.down_proj.weight.mul_(1.1)
    engines = [CopyEngine(model) for _ in range(6)]
    check = AgreementGuard(RolloutConfig(engine="vllm", guard_tokens=8), "float32", Ranks(0, 6)).check
    assert check(Engines(*engines), rollouts(), scorer(model), seed=0) < 1e-5
    assert [sum(r.max_new_tokens for r in engine.asked) for engine in engines] == [8] * 6
    with pytest.raises(TrapoError, match=r"the engine of rank 4 does not generate with the learner's weights"):
        check(Engines(*engines[:4], CopyEngine(stale), engines[5]), rollouts(), scorer(model), seed=0)
    # Of one server all ranks ask together.
    asked = CopyEngine(model)
    AgreementGuard(RolloutConfig(engine="vllm_server", guard_tokens=8), "float32", Ranks(0, 6)).check(
        asked, rollouts(), scorer(model), seed=0
    )
    assert sum(r.max_new_tokens for r in asked.asked) == 8
