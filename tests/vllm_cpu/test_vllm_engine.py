"""vLLM in this process: what it generates, and the three ways in which a weight sync goes wrong without notice."""

import copy
import gc
import weakref

import pytest
import torch
from engine_checks import EOS, contexts, learn, load, mismatch, requests, rollouts

from trapo.config import RolloutConfig
from trapo.engines import vllm_sync
from trapo.engines.guard import AgreementGuard, plain_scorer
from trapo.engines.hf import HFEngine
from trapo.engines.protocol import Request
from trapo.errors import TrapoError
from trapo.models.weights import full_weights

ROUNDING = 2e-4  # nats; fp32 through two implementations


@pytest.fixture(scope="module")
def learner(vllm_model_path):
    return load(vllm_model_path)


@pytest.fixture(scope="module")
def only_engine(learner):
    """A process can hold one engine, and starting it costs seconds: tests share it."""
    from trapo.engines.vllm import VLLMEngine

    cache = {"block_size": 32, "kv_cache_memory_bytes": 1 << 27}
    return VLLMEngine(learner, eos_ids=[EOS], max_tokens=256, batch_size=8, engine_args=cache)


@pytest.fixture
def engine(only_engine, learner):
    """The engine with the learner's weights; whatever a test did to it is undone."""
    only_engine.sync(learner)
    return only_engine


@pytest.fixture
def changed(learner):
    """The learner after some steps."""
    model = copy.deepcopy(learner)
    learn(model)
    return model


def guard():
    return AgreementGuard(RolloutConfig(engine="vllm"), "float32")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_learner_at_the_temperature_that_is_sampled_from(engine, learner, temperature):
    assert mismatch(engine, learner, temperature) < ROUNDING


def test_greedy_completions_are_those_of_transformers(engine, learner):
    plain = HFEngine(learner, eos_ids=[EOS], pad_id=EOS)
    expected = plain.generate(requests(), temperature=0.0, seed=0)
    got = engine.generate(requests(), temperature=0.0, seed=0)
    assert [c.token_ids for c in got] == [c.token_ids for c in expected]
    assert len({c.token_ids for c in got}) == 4


def test_the_same_seed_samples_the_same_tokens_and_rollouts_of_one_context_differ(engine):
    asked = [Request(contexts()[0], 8)] * 4
    first, again, other = (engine.generate(asked, temperature=1.0, seed=s) for s in (1, 1, 2))
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    assert first != other
    assert len({c.token_ids for c in first}) == 4


def test_a_completion_ends_with_its_end_token_or_at_its_own_limit(engine, learner):
    ends = HFEngine(learner, eos_ids=[EOS], pad_id=EOS).generate(requests(1), temperature=0.0, seed=0)[0].token_ids
    engine.eos_ids = [ends[3]]
    try:
        stopped, cut = engine.generate([*requests(1), Request(contexts()[0], 2)], temperature=0.0, seed=0)
    finally:
        engine.eos_ids = [EOS]
    assert (stopped.token_ids, stopped.finished) == (ends[: ends.index(ends[3]) + 1], True)
    assert (cut.token_ids, cut.finished) == (ends[:2], False)
    assert len(stopped.logprobs) == len(stopped.token_ids)


def test_after_a_sync_it_generates_with_the_new_weights(engine, learner, changed):
    mismatch(engine, learner)  # contexts are cached
    assert mismatch(engine, changed) > 0.05
    engine.sync(changed)
    assert mismatch(engine, changed) < ROUNDING
    assert guard().check(engine, rollouts(), plain_scorer(changed, 1.0), seed=0) < ROUNDING
    engine.sync(learner)
    assert mismatch(engine, learner) < ROUNDING


def refused(engine, model):
    """Whether the guard stops the run."""
    with pytest.raises(TrapoError, match=r"rollout\.guard_tolerance: the engine does not generate"):
        guard().check(engine, rollouts(), plain_scorer(model, 1.0), seed=0)
    return True


def test_a_sync_that_does_nothing_is_noticed_by_the_guard(engine, changed, monkeypatch):
    monkeypatch.setattr(engine, "sync_weights", lambda model: None)
    engine.sync(changed)
    assert refused(engine, changed)


def test_trap_a_tied_head_keeps_its_old_packed_copy_unless_it_is_packed_anew(engine, changed, monkeypatch):
    monkeypatch.setattr(vllm_sync, "_repack_head", lambda model: None)
    engine.sync(changed)
    assert mismatch(engine, changed) > 0.05
    assert refused(engine, changed)


def test_trap_cached_prefixes_are_those_of_the_old_weights_unless_the_cache_is_reset(
    engine, learner, changed, monkeypatch
):
    mismatch(engine, learner)  # contexts are cached
    monkeypatch.setattr(engine.llm, "reset_prefix_cache", lambda: True)
    engine.sync(changed)
    assert mismatch(engine, changed) > 0.05
    assert refused(engine, changed)


def test_trap_load_weights_cannot_fill_packed_layers(engine, changed, monkeypatch):
    def load_weights(worker, weights=None, path=None):
        worker.model_runner.get_model().load_weights(weights)

    monkeypatch.setattr(vllm_sync, "reload_in_worker", load_weights)
    with pytest.raises(TrapoError, match="vLLM could not take over the learner's weights"):
        engine.sync(changed)


def test_a_context_that_is_too_long_is_one_line(engine):
    with pytest.raises(TrapoError, match=r"^rollout\.engine: vLLM could not generate: ") as error:
        engine.generate([Request(tuple(range(3, 300)), 4)], temperature=1.0, seed=0)
    assert "\n" not in str(error.value)


def test_the_engine_leaves_the_learners_threads_alone(engine):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)


def test_gradients_still_flow_beside_the_engine(engine, learner):
    model = copy.deepcopy(learner)
    ids = torch.tensor([contexts(1)[0]])
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_sync_takes_the_weights_in_one_unit_at_a_time(engine, learner, monkeypatch):
    """Of a sharded learner each weight is made whole for this: those of a layer are alive together, and no more."""
    alive, most = 0, 0

    def gone(size):
        nonlocal alive
        alive -= size

    def weights(model):
        nonlocal alive, most
        for name, value in full_weights(model):
            copied = value.clone()
            alive += copied.nbytes
            most = max(most, alive)
            weakref.finalize(copied, gone, copied.nbytes)
            yield name, copied
            del copied

    monkeypatch.setattr(vllm_sync, "full_weights", weights)
    engine.sync(learner)
    gc.collect()
    assert alive == 0
    sizes = [p.nbytes for p in learner.parameters()]
    layer = sum(p.nbytes for p in learner.model.layers[0].parameters())
    assert layer < max(sizes) <= most <= max(sizes) + layer < sum(sizes)
    assert mismatch(engine, learner) < ROUNDING


def test_its_cache_holds_as_many_tokens_as_the_plan_counts(engine, learner):
    from trapo.models.plan_around import kv_bytes

    cache = engine.llm.llm_engine.vllm_config.cache_config
    tokens = cache.num_gpu_blocks * 32
    assert tokens * kv_bytes(learner, torch.float32) == pytest.approx(1 << 27, rel=0.01)
