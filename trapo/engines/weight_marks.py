"""This file tells whether a model's weights are those of before, without a copy of them.

What an engine derives from weights (packed ones, keys and values of a prompt) must go when they change, whoever forgot
to say so. An in-place write, such as an optimizer's step, counts up a tensor's version; weights in another place are
other weights. A write through `.data` does neither, and a loader may make one: so a sample of each weight's elements is
compared as well, which an update of all of them cannot miss. Not seen: a write through `.data` to elements that are not
in the sample. `Engine.sync` is for that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

SAMPLED = 64  # elements of each weight


@dataclasses.dataclass(frozen=True)
class Mark:
    """Holds what is known of all weights of a model at one time."""

    places: tuple[tuple[int, int], ...]  # address and version of each
    sample: torch.Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mark) and self.places == other.places and torch.equal(self.sample, other.sample)


def mark(model: nn.Module) -> Mark:
    """Returns a mark of the weights; of sharded models of this rank's part."""
    weights = [getattr(w, "_local_tensor", w).detach() for w in _weights(model)]
    samples: dict[torch.device, list[torch.Tensor]] = {}
    for weight in weights:
        samples.setdefault(weight.device, []).append(_sample(weight))
    return Mark(
        tuple((w.data_ptr(), -1 if w.is_inference() else w._version) for w in weights),
        torch.cat([torch.empty(0, dtype=torch.uint8), *(torch.cat(found).cpu() for found in samples.values())]),
    )


def _weights(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yields parameters and what else a checkpoint holds. A buffer that is not saved (a table of positions, say) comes
    from the config, and some models compute it anew in a forward."""
    for module in model.modules():
        yield from (p for p in module._parameters.values() if p is not None)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield buffer


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """Returns the bytes, for a NaN is not equal to itself."""
    flat = weight.view(-1) if weight.is_contiguous() else weight.flatten()
    return flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].contiguous().view(torch.uint8)
