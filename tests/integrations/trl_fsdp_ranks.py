"""Run by test_trl_fuse.py under torchrun: TRL's fused head, computed here, under FSDP2 on two ranks against one."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from fsdp_ranks import agree, two_of_one_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from trapo_kernels import Objective
from trapo_kernels.foreseen import Foreseen
from trapo_kernels.integrations.trl import FusedHead


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    ids = torch.randint(0, 101, (4, 13), generator=torch.Generator().manual_seed(1))
    mine = ids[2 * dist.get_rank() :][:2]
    for foreseen in (True, False):
        for shard_head in (True, False):  # a group of its own, or the root's
            whole, sharded = two_of_one_model()
            head = FusedHead(sharded, outputs=("log_probs", "entropy"))
            if foreseen:
                head.foresee = lambda _: Foreseen(Objective.sft(), missed=lambda: sys.exit("missed"))
            for module in (*sharded.model.layers, *([sharded.lm_head] if shard_head else []), sharded):
                fully_shard(module, mesh=mesh)
            whole(input_ids=ids, labels=ids).loss.backward()
            for _ in range(2):
                sharded.zero_grad()
                out = sharded(input_ids=mine, labels=mine, fused_lm_head=True)
                (-out.log_probs.sum() / 24).backward()
            agree(sharded, whole, (foreseen, shard_head))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
