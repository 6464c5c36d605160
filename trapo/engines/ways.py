"""This file has the ways in which engine hf turns contexts into completions."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Way:
    """Says what a way does and does without; the last four are of transformers' loop."""

    own: bool = True  # our loop (own_loop.py), else transformers' (transformers_loop.py)
    prefill: bool = True  # by the decoder, before `generate`, which otherwise does it with a cache of its own making
    share: bool = True  # each distinct context once
    pad: bool = True  # contexts of different lengths in one batch
    cache: bool = True

    def __str__(self) -> str:
        slower = {
            "with transformers' loop": not self.own,
            "without sharing prompts": not self.share,
            "without padding": not self.pad,
            "without a cache": not self.cache,
        }
        return ", ".join(name for name, true in slower.items() if true)


WAYS = (  # fastest first
    Way(),
    Way(own=False),
    Way(own=False, share=False),
    Way(own=False, prefill=False, share=False),
    Way(own=False, prefill=False, share=False, pad=False),
    Way(own=False, prefill=False, share=False, pad=False, cache=False),
)
