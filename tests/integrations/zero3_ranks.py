"""Run by test_zero3.py under torchrun: heads computed here under DeepSpeed's ZeRO-3, on two ranks and on one."""

from __future__ import annotations

import copy
import sys
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from trapo_kernels import Objective
from trapo_kernels.foreseen import Foreseen
from trapo_kernels.integrations.transformers import fuse
from trapo_kernels.integrations.trl import FusedHead, chunked_divergence_loss

CONFIG = {
    "train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "overlap_comm": False},
}  # fmt: skip
KINDS = ("stock", "one pass", "recomputed", "transformers")


class Fused(nn.Module):
    """Is a model whose forward gives TRL's loss of log-probabilities, or the stock one."""

    def __init__(self, model, kind):
        super().__init__()
        self.model = copy.deepcopy(model)
        self.kind = kind
        if kind in ("one pass", "recomputed"):
            head = FusedHead(self.model, outputs=("log_probs",))
            if kind == "one pass":
                head.foresee = lambda _: Foreseen(Objective.sft(), missed=lambda: sys.exit("missed"))
        elif kind == "transformers":
            fuse(self.model)

    def forward(self, ids):
        if self.kind in ("stock", "transformers"):
            return self.model(input_ids=ids, labels=ids).loss
        return -self.model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.mean()


class Distilled(nn.Module):
    """Is a student with TRL's divergence from its own halved logits, by their loss or ours."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = copy.deepcopy(model), loss

    def forward(self, ids):
        hidden, head = self.model.model(ids).last_hidden_state, self.model.lm_head.weight
        mask = torch.ones_like(ids)
        return self.loss(hidden, hidden.detach(), head, head, mask, 0.0, teacher_logit_scale=0.5)[0]


def step(module, ids, engine):
    """One step of SGD, with DeepSpeed or without; the parameters after it."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    if not engine:
        module(ids).backward()
        optimizer.step()
        return {name: p.detach().clone() for name, p in module.named_parameters()}
    kept = HfDeepSpeedConfig(CONFIG)  # while it lives, TRL and transformers know that ZeRO-3 is on
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=CONFIG)
    assert all(p.numel() == 0 for p in module.parameters())  # partitioned
    engine.backward(engine(ids))
    engine.step()
    del kept
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        return {name: p.detach().clone() for name, p in module.named_parameters()}


def main() -> None:
    # It would compile its own collectives; gloo has those that are needed.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed(dist_backend="gloo")
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    ids = torch.randint(0, 101, (4, 13), generator=torch.Generator().manual_seed(1))
    mine = ids[2 * dist.get_rank() :][:2]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    for tied in (False, True):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=101, **sizes, tie_word_embeddings=tied)).train()
        start = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
        cases = [(partial(Fused, model, kind), Fused(model, "stock"), kind) for kind in KINDS]
        plain = Distilled(model, _chunked_divergence_loss)
        cases.append((partial(Distilled, model, chunked_divergence_loss), plain, "divergence"))
        for make, plain, kind in cases:
            expected, found = step(plain, ids, engine=False), step(make(), mine, engine=True)
            for name, after in expected.items():
                moved = (after - start[name]).abs().max()
                error = (found[name] - after).abs().max()
                assert moved > 0, (kind, name)
                assert error <= 1e-5 * moved + 1e-6, (kind, tied, name, float(error), float(moved))
            if dist.get_rank() == 0:
                print(kind, tied, "ok", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
