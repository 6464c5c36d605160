"""This file counts what sharing saves of a step, as far as a plan can know: that rollouts share their prompt."""

from __future__ import annotations

from transformers import PreTrainedModel

from trapo.models import prefix_tree
from trapo.settings.groups import ModelConfig, TrainConfig

FLASH = ("flash", "fastest")  # what model.attention says where a GPU packs rows, or may


def shared_tokens(
    built: PreTrainedModel,
    model: ModelConfig,
    train: TrainConfig,
    *,
    prompts: int,
    rollouts: int,
    lengths: tuple[int, int],
) -> int | None:
    """Returns the tokens that go through the model for so many prompts with so many rollouts each, cut into trees as an
    update does; None where train.share_prefixes, packing or attention leave each rollout a row.

    lengths: (of a prompt, of a response). Expert prefixes that rollouts share beside it would save more.
    """
    prompt, response = lengths
    packed = train.packing == "always" or (train.packing == "auto" and model.attention.startswith(FLASH))
    known = model.attention == "auto" or model.attention in prefix_tree.TAKE_A_MASK
    if train.share_prefixes == "never" or packed or not known or prompt + response > prefix_tree.window(built):
        return None
    begun, own = tuple(range(prompt)), range(response - 1)
    sequences = [(*begun, prompt + i, *own) for i in range(rollouts)]
    trees = prefix_tree.grow(sequences, train.micro_batch_tokens, prefix_tree.costs_of(built))
    return prompts * sum(prefix_tree.size([sequences[i] for i in tree]) for tree in trees)
