"""With several ranks the first one alone loads a model, and hands its weights out: the memory of all ranks together is
one copy of the weights, and one weight more.

The others get the model without its weights: the very modules, buffers and configuration of the first rank, so that
nothing has to be built twice alike. Each weight is then cut into the shards of FSDP2, sent, and freed.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trapo.errors import TrapoError
from trapo.models.sharding import shard_over
from trapo.runs.ranks import Ranks
from trapo.tools.memory import give_back

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def load_over(build: Callable[[], Loaded], ranks: Ranks, precision: str, device: torch.device) -> Loaded:
    """Returns the model that build() gives, its weights sharded over all ranks, on the device, and its tokenizer.

    build: is called by the first rank alone and gives weights on the CPU, or, in a run of one process, on the device.
    precision: float32 or bfloat16, as `sharding.shard` takes it. Raises on all ranks what build() raises.
    """
    if ranks.world == 1:
        return build()
    weights: dict[str, Tensor] = {}

    def first() -> bytes:
        model, tokenizer = build()
        weights.update((name, parameter.detach()) for name, parameter in model.named_parameters())
        data = _without_weights(model, tokenizer)
        for module in model.modules():  # which refer to each other, and live until the next collection of garbage
            module._parameters.clear()
        return data

    model, tokenizer = _received(ranks.once(first))
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    made: dict[int, nn.Parameter] = {}
    left = {name for name, _ in model.named_parameters()}

    def before(unit: nn.Module) -> None:
        _make_room(unit, device, made)

    def after(unit: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if name in left and hasattr(parameter, "placements"):
                _hand_out(parameter, weights.pop(name, None), ranks)
                left.remove(name)
        give_back()

    shard_over(model, ranks, precision, device, before, after)
    return model, tokenizer


class _Pickler(pickle.Pickler):
    """Writes the shape of a parameter in place of its values; one that is in two places stays one."""

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, nn.Parameter):
            return id(obj), tuple(obj.shape), obj.dtype, obj.requires_grad
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.made: dict[int, nn.Parameter] = {}

    def persistent_load(self, pid: Any) -> nn.Parameter:
        key, shape, dtype, trained = pid
        if key not in self.made:
            self.made[key] = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=trained)
        return self.made[key]


def _without_weights(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bytes:
    file = io.BytesIO()
    try:
        _Pickler(file).dump((model, tokenizer))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        kind = f"model type {model.config.model_type} ({type(model).__name__})"
        raise TrapoError(f"{kind} cannot be sent to other ranks: {error}; accepted with it: one process") from error
    return file.getvalue()


def _received(data: bytes) -> Loaded:
    """Returns what `_without_weights` wrote; parameters are on the meta device."""
    return _Unpickler(io.BytesIO(data)).load()


def _make_room(unit: nn.Module, device: torch.device, made: dict[int, nn.Parameter]) -> None:
    """Gives a unit that is sharded next parameters on the device, whose memory nobody has touched: its shards are cut
    from them. made: those of the units before, for the ones that are shared."""
    for module in unit.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta and not hasattr(parameter, "placements"):
                if id(parameter) not in made:
                    room = torch.empty_like(parameter, device=device)
                    made[id(parameter)] = nn.Parameter(room, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]


@torch.no_grad()
def _hand_out(parameter: Any, weight: Tensor | None, ranks: Ranks) -> None:
    """Fills all ranks' shards of a parameter. weight: its value, on the first rank."""
    import torch.distributed as dist

    shard = parameter.to_local()
    length = -(-parameter.shape[0] // ranks.world)
    piece = shard.new_empty((length, *parameter.shape[1:]))
    pieces = None if weight is None else [_bytes(p) for p in _pieces(weight.to(shard.device), length, ranks.world)]
    dist.scatter(_bytes(piece), pieces, src=0)
    shard.copy_(piece[: len(shard)])


def _pieces(weight: Tensor, length: int, count: int) -> Iterator[Tensor]:
    """Yields `count` blocks of so many rows: FSDP2's shards, the last ones filled up."""
    for place in range(count):
        block = weight[place * length : (place + 1) * length]
        if len(block) < length:
            block = torch.cat([block, block.new_zeros((length - len(block), *weight.shape[1:]))])
        yield block.contiguous()


def _bytes(tensor: Tensor) -> Tensor:
    """Returns the same memory as bytes: gloo does not send every dtype."""
    return tensor.view(-1).view(torch.uint8)
