"""This file writes the weights of a sharded model into one safetensors file, a weight at a time: the memory that it
takes is that of the largest, on the rank that writes.

The format is 8 bytes of length, a header in JSON that says where each tensor is, and the tensors (safetensors' README).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trapo.models import lora
from trapo.models.sharding import whole
from trapo.tools.files import name_file, remove
from trapo.tools.memory import give_back

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def stored(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Returns (name, value) of the parameters and buffers that a model is saved with, the adapters' own left out;
    values are sharded still."""
    saved = model.state_dict().keys()
    buffers = ((name, value) for name, value in model.named_buffers() if name in saved)
    everything = [*((name, p.detach()) for name, p in model.named_parameters()), *buffers]
    return [(name, value) for name, value in everything if lora.plain_name(name) is not None]


def write_weights(model: nn.Module, path: Path | None) -> None:
    """Write the weights of a model, adapters merged. All ranks of a sharded one must call it; path: None where this
    rank does not write.

    Raises OSError on the rank that writes, after all weights have passed, since the others need it until then, and
    TrapoError where the model computes something else with its adapters merged.
    """
    if lora.has_adapter(model):
        lora.check_merged(cast(PreTrainedModel, model))
    # Large elements first, as safetensors does, so that each tensor begins at a multiple of its element's size.
    entries = sorted(stored(model), key=lambda entry: (-entry[1].element_size(), str(lora.plain_name(entry[0]))))
    sink = _Sink(path)
    sink.write(_header(entries))
    for name, value in entries:
        for piece in _pieces(model, name, value, keep=path is not None):
            sink.write(piece.contiguous().view(-1).view(torch.uint8).numpy().data)
        give_back()
    sink.close()


class _Sink:
    """Writes a file, and keeps its first failure until it is closed. path: None for one that swallows everything."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.failure: OSError | None = None
        self._trying(self._open)

    def _open(self) -> None:
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        remove(self.path)
        self.file = self.path.open("xb")

    def write(self, data: bytes | memoryview) -> None:
        self._trying(lambda: self.file.write(data))

    def close(self) -> None:
        """Raises the OSError that there was; nothing is left of the file then."""
        self._trying(lambda: self.file.close())
        if self.failure is not None:
            if self.path is not None:
                remove(self.path)
            raise self.failure

    def _trying(self, act: Callable[[], object]) -> None:
        if self.path is None or self.failure is not None:
            return
        try:
            act()
        except OSError as error:
            name_file(error, self.path)
            self.failure = error


def _header(entries: Iterable[tuple[str, Tensor]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, value in entries:
        end = place + value.numel() * value.element_size()
        plain = str(lora.plain_name(name))
        header[plain] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _pieces(model: nn.Module, name: str, value: Any, *, keep: bool) -> Iterator[Tensor]:
    """Yields a weight as it is in the model without adapters, on the CPU, in blocks of rows; nothing on the ranks that
    do not keep it."""
    adapted = lora.plain_name(name) != name
    if adapted or not hasattr(value, "to_local"):
        found = lora.merged(model, name, whole(value)) if adapted else (name, value)
        if keep and found is not None:
            yield found[1].cpu()
        return
    yield from _gathered(value, keep=keep)


def _gathered(value: Any, *, keep: bool) -> Iterator[Tensor]:
    """Yields the shards of all ranks, which FSDP2 cut along the first dimension."""
    import torch.distributed as dist

    world = value.device_mesh.size()
    length = -(-value.shape[0] // world)
    shard = value.to_local()
    padded = shard.new_zeros((length, *value.shape[1:]))
    padded[: len(shard)] = shard
    sent = padded.view(-1).view(torch.uint8)  # gloo does not send every dtype
    received = [torch.empty_like(sent) for _ in range(world)] if dist.get_rank() == 0 else None
    dist.gather(sent, received, dst=0)
    for place, piece in enumerate(received or ()):
        rows = max(0, min(length, value.shape[0] - place * length))
        if keep and rows:
            yield piece.view(value.dtype).view(padded.shape)[:rows].cpu()
