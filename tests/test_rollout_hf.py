"""The HF engine against plain `generate`, one request at a time."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from trapo.engines.hf import HFEngine
from trapo.engines.protocol import Request

EOS = 2


@pytest.fixture(scope="module")
def model(tiny_model_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32).eval()
    with torch.no_grad():  # random weights of this size repeat one token; larger ones give varied text
        for p in model.parameters():
            p.mul_(3.0)
    return model


@pytest.fixture
def engine(model):
    return HFEngine(model, eos_ids=[EOS], pad_id=EOS, batch_size=4)


def requests(n=6, each=2):
    generator = torch.Generator().manual_seed(0)
    contexts = [tuple(torch.randint(3, 40000, (3 + i,), generator=generator).tolist()) for i in range(n)]
    return [Request(c, 5 + i) for i, c in enumerate(contexts) for _ in range(each)]


def alone(model, request):
    ids = torch.tensor([request.context])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=request.max_new_tokens,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    return tuple(out[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("each", [1, 2])  # every context once; contexts that share their prefill
def test_batched_greedy_completions_equal_those_of_each_request_alone(model, engine, each):
    asked = requests(each=each)[::-1]
    got = engine.generate(asked, temperature=0.0, seed=0)
    assert [c.token_ids for c in got] == [alone(model, r) for r in asked]
    assert len({c.token_ids for c in got}) > 3  # or the comparison would say little


def test_the_same_seed_samples_the_same_tokens_and_another_seed_others(engine):
    asked = requests()
    first, again, other = (engine.generate(asked, temperature=1.0, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_samples_of_one_context_differ_although_they_share_its_prefill(engine):
    context = requests()[0].context
    got = engine.generate([Request(context, 8)] * 4, temperature=1.0, seed=0)
    assert len({c.token_ids for c in got}) == 4


def test_sampling_follows_the_models_own_probabilities(model):
    context = (5, 6, 7)
    engine = HFEngine(model, eos_ids=[EOS], pad_id=EOS, batch_size=2000)
    got = engine.generate([Request(context, 1)] * 2000, temperature=2.0, seed=0)
    with torch.no_grad():
        p = (model(torch.tensor([context])).logits[0, -1] / 2.0).softmax(-1)
    top = int(p.argmax())
    share = sum(c.token_ids[0] == top for c in got) / 2000
    assert abs(share - float(p[top])) < 5 * (float(p[top]) / 2000) ** 0.5


def test_a_completion_ends_with_the_first_end_token_and_is_finished(engine):
    assert engine.transformers._trim([5, EOS, EOS, EOS], 4).token_ids == (5, EOS)
    assert engine.transformers._trim([5, EOS, EOS, EOS], 4).finished
    assert engine.transformers._trim([5, 6, 7, EOS], 3).token_ids == (5, 6, 7)
    assert not engine.transformers._trim([5, 6, 7, EOS], 3).finished


def test_a_one_token_context_works(model, engine):
    request = Request((9,), 3)
    assert engine.generate([request], temperature=0.0, seed=0)[0].token_ids == alone(model, request)


def test_the_engine_leaves_train_mode_as_it_was(model, engine):
    model.train()
    engine.generate(requests(1), temperature=0.0, seed=0)
    assert model.training
    model.eval()


def test_syncing_another_module_is_refused(engine):
    with pytest.raises(ValueError, match="must be the module"):
        engine.sync(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("setting", [{"repetition_penalty": 5.0}, {"num_beams": 2}, {"top_k": 3, "do_sample": True}])
def test_settings_that_a_checkpoint_ships_do_not_change_what_is_sampled(model, engine, setting):
    asked = requests(3)
    expected = engine.generate(asked, temperature=1.0, seed=0)
    shipped = model.generation_config
    for name, value in setting.items():
        setattr(shipped, name, value)
    try:
        assert engine.generate(asked, temperature=1.0, seed=0) == expected
        assert model.generation_config is shipped
    finally:
        for name in setting:
            setattr(shipped, name, None)


def test_tokens_are_sampled_from_the_distribution_that_the_learner_trains(model, engine):
    """The engine's chain of cached steps and the learner's one forward agree on every greedy token."""
    import trapo_kernels as tk

    asked = requests(4)
    for request, completion in zip(asked, engine.generate(asked, temperature=0.0, seed=0), strict=True):
        ids = torch.tensor([request.context + completion.token_ids])
        with torch.no_grad():
            hidden = model.get_decoder()(ids).last_hidden_state[0, len(request.context) - 1 : -1]
        weight, own = model.get_output_embeddings().weight, ids[0, len(request.context) :]
        chosen = tk.linear_logprobs(hidden, weight, own).logprobs
        best = (hidden @ weight.T).log_softmax(-1).amax(-1)
        torch.testing.assert_close(chosen, best, atol=1e-4, rtol=0)
