"""What every vLLM engine is asked: the same contexts, and how far its log-probabilities are from the learner's."""

import torch
from transformers import AutoModelForCausalLM

from trapo.data.encode import EncodedProblem
from trapo.data.problem import Problem
from trapo.engines.guard import plain_scorer
from trapo.engines.protocol import Request
from trapo.rollouts import Rollout

EOS = 2


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def contexts(count=4, length=100):
    """Token ids that fill several blocks of a prefix cache."""
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(3, 40000, (length + 7 * i,), generator=generator).tolist()) for i in range(count)]


def requests(count=4, tokens=12):
    return [Request(context, tokens) for context in contexts(count)]


def rollout(context, completion=None):
    problem = EncodedProblem(Problem("p", ({"role": "user", "content": "?"},), "1", (), "test"), context, ())
    own = completion.token_ids if completion else ()
    return Rollout(problem, 0, 0, 0.0, (), own, False, False)


def rollouts():
    return [rollout(context) for context in contexts()]


def mismatch(engine, model, temperature=1.0, seed=0):
    """Largest |engine − model| in nats over all generated tokens."""
    asked = requests()
    completions = engine.generate(asked, temperature=temperature, seed=seed)
    own = plain_scorer(model, temperature)([rollout(r.context, c) for r, c in zip(asked, completions, strict=True)])
    given = [torch.tensor(c.logprobs) for c in completions]
    return float((torch.cat(own) - torch.cat(given)).abs().max())


@torch.no_grad()
def learn(model):
    """What a few optimizer steps do to a model: every weight moves."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(0.03 * parameter.std() * torch.randn(parameter.shape, generator=generator))
