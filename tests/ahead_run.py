"""A run whose engine has weights of its own, as a server has; as a program, one that kills itself (killed_run.py)."""

import copy
import dataclasses
import threading

import torch

from trapo.engines.hf import HFEngine
from trapo.models.loading import eos_ids

SERVER = ["rollout.engine=vllm_server", "rollout.server_url=http://127.0.0.1:9"]
AHEAD = [*SERVER, "rollout.ahead=1", "train.updates_per_step=1", "reward.function={here}:by_length"]


def by_length(text, answer):
    """A reward that a random model gets some of."""
    return (len(text) % 3) / 2


class CopyEngine:
    """Stands for a server: engine hf on a copy of the model, which says how likely its tokens were. seen: (whether it
    was asked by another thread than the main one, the copy's first weights then) of each call."""

    def __init__(self, rollout, model, tokenizer, **_):
        self.model = copy.deepcopy(model).eval()
        ends = eos_ids(model, tokenizer)
        self.engine = HFEngine(self.model, eos_ids=ends, pad_id=tokenizer.pad_token_id, batch_size=rollout.batch_size)
        self.seen = []

    def generate(self, requests, *, temperature, seed):
        aside = threading.current_thread() is not threading.main_thread()
        self.seen.append((aside, next(self.model.parameters()).detach().clone()))
        drawn = self.engine.generate(requests, temperature=temperature, seed=seed)
        return [
            dataclasses.replace(c, logprobs=self.logprobs(r, c, temperature))
            for r, c in zip(requests, drawn, strict=True)
        ]

    @torch.no_grad()
    def logprobs(self, request, completion, temperature):
        ids = torch.tensor([request.context + completion.token_ids])
        logits = self.model(input_ids=ids).logits[0, len(request.context) - 1 : -1].float() / temperature
        return tuple(logits.log_softmax(-1).gather(1, ids[0, len(request.context) :, None])[:, 0].tolist())

    def rest(self):
        pass

    def sync(self, model):
        self.model.load_state_dict(model.state_dict())
        self.engine.sync(self.model)


def main() -> None:
    import killed_run

    from trapo import trainer

    trainer.make_engine = CopyEngine
    killed_run.main()
