"""`trapo plan` counts here what a run needs around its updates: host memory while it loads, an engine's memory while it
generates, and what a weight sync moves. Arithmetic, as in plan.py."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from trapo.settings.groups import RolloutConfig

UTILIZATION = 0.4  # of a GPU's memory that engine vllm takes where rollout.engine_args does not say (engines/vllm.py)


def host_memory(model: nn.Module, ranks: int) -> dict[str, int]:
    """Returns the host memory, in bytes, that all ranks of a machine together need to load the model: the first one has
    it whole, and of several it cuts a weight into pieces at a time."""
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    return {"the model, on the first rank": sum(sizes)} | ({"a weight in pieces": max(sizes)} if ranks > 1 else {})


def kv_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Returns the bytes of a token's keys and values in all layers."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * width * dtype.itemsize


def engine_memory(
    model: PreTrainedModel, rollout: RolloutConfig, precision: str, *, ranks: int, sequences: int, longest: int
) -> dict[str, int]:
    """Returns what generating takes of a rank's GPU beside the learner's weights and optimizer, in bytes.

    sequences: of a step, on all ranks; at most rollout.batch_size are generated at once. longest: tokens of one.
    """
    if rollout.engine == "vllm_server":
        return {}  # the server's GPUs are others
    itself = rollout.engine == "hf"
    dtype = getattr(torch, precision if itself else rollout.dtype or str(model.dtype).removeprefix("torch."))
    at_once = min(rollout.batch_size, -(-sequences // ranks))
    whole = 0 if itself and ranks == 1 else dtype.itemsize * sum(p.numel() for p in model.parameters())
    cache = at_once * longest * kv_bytes(model, dtype)
    return {"weights to generate with": whole, f"keys and values of {at_once} sequences": cache}


def sync_traffic(model: nn.Module, rollout: RolloutConfig, precision: str, ranks: int) -> dict[str, int]:
    """Returns what one weight sync moves, in bytes: what a rank receives from the others, who each have a part, and
    what goes to a server."""
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    gathered = sum(p.numel() for p in model.parameters()) * getattr(torch, precision).itemsize
    whole = gathered if rollout.engine == "hf" else stored
    moved = {"to each rank, from the others": whole * (ranks - 1) // ranks}
    if rollout.engine == "vllm_server":
        how = "through the file system" if rollout.weight_sync == "folder" else f"by {rollout.weight_sync}"
        moved[f"to the server, {how}"] = stored
    return moved


def reserved(rollout: RolloutConfig, gib: float) -> float | None:
    """Returns the GiB that engine vllm takes of a GPU of so many while it generates; None for another engine."""
    if rollout.engine not in ("vllm", "auto"):
        return None
    return gib * float((rollout.engine_args or {}).get("gpu_memory_utilization", UTILIZATION))
