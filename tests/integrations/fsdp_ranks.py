"""Run by test_transformers.py under torchrun: a patched model under FSDP2 on two ranks against the same on one."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import trapo_kernels as tk
from trapo_kernels.integrations.transformers import patch_causal_lm_loss


def two_of_one_model() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """Returns a tiny model of random weights twice: one stays whole."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    whole = LlamaForCausalLM(config).train()
    return whole, copy.deepcopy(whole)


def agree(sharded: LlamaForCausalLM, whole: LlamaForCausalLM, case: object = None) -> None:
    """Checks that all gradients are those of the whole model."""
    for (name, p), q in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        error = (p.grad.full_tensor() - q.grad).abs().max()
        assert error <= 1e-5 * q.grad.abs().max(), (case, name, float(error))


def main() -> None:
    dist.init_process_group("gloo")
    whole, sharded = two_of_one_model()
    patch_causal_lm_loss(sharded, tk.Objective.sft())
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    ids = torch.randint(0, 101, (4, 13))
    mine = ids[2 * dist.get_rank() :][:2]
    whole(input_ids=ids, labels=ids).loss.backward()
    for _ in range(2):
        sharded.zero_grad()
        sharded(input_ids=mine, labels=mine).loss.backward()
    agree(sharded, whole)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
