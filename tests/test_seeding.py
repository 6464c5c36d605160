"""Random numbers of each request's own: neither the batch nor the number of ranks decides what is sampled."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from trapo.engines.hf import HFEngine
from trapo.engines.protocol import Completion, Request
from trapo.engines.shared import SharedEngine
from trapo.engines.transformers_loop import OwnNoise
from trapo.runs.ranks import ALONE, Ranks


@pytest.fixture(scope="module")
def model(tiny_model_path):
    return AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)


REQUESTS = [Request(tuple(range(3, 3 + n)), 6) for n in (4, 9, 4, 7, 4)]


def generate(model, batch_size, requests=REQUESTS, seed=1):
    engine = SharedEngine(HFEngine(model, eos_ids=[2], pad_id=2, batch_size=batch_size), ALONE)
    return engine.generate(requests, temperature=1.0, seed=seed)


def test_batches_of_any_size_sample_the_same(model):
    whole = generate(model, 64)
    assert generate(model, 1) == whole
    assert generate(model, 2) == whole
    assert generate(model, 64, seed=2) != whole
    equal = [whole[i].token_ids for i in (0, 2, 4)]
    assert len(set(equal)) == 3  # one context, three samples


def test_the_noise_samples_the_softmax_at_its_temperature():
    scores = torch.tensor([0.3, -1.0, 2.0, 0.0, -torch.inf])
    noise = OwnNoise([7], 0.7, torch.device("cpu"))
    drawn = torch.stack([noise(torch.empty(0), scores[None]).argmax() for _ in range(20000)])
    shares = torch.bincount(drawn, minlength=5) / 20000
    # Four standard errors of a share are at most 0.014.
    torch.testing.assert_close(shares, (scores / 0.7).softmax(0), atol=0.014, rtol=0)
    assert shares[4] == 0


def test_each_rank_is_asked_for_its_share_with_the_seeds_of_the_whole():
    asked = []

    class Recorder:
        def generate(self, requests, *, temperature, seed):
            asked.append(list(requests))
            return [Completion((r.seed,), True) for r in requests]

        def sync(self, model):
            pass

    class Half(Ranks):
        def gather(self, share):
            return list(share)

    whole = SharedEngine(Recorder(), ALONE).generate(REQUESTS, temperature=1.0, seed=1)
    parts = [SharedEngine(Recorder(), Half(rank, 2)).generate(REQUESTS, temperature=1.0, seed=1) for rank in (0, 1)]
    assert parts[0] + parts[1] == whole
    assert [len(requests) for requests in asked] == [5, 2, 3]
