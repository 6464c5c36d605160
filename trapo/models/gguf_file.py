"""This file reads a .gguf file once for a model: transformers parses it for its configuration, its tokenizer and its
weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path


@contextmanager
def _one_reader() -> Iterator[None]:
    import gguf

    made = gguf.GGUFReader  # transformers looks it up by this name in every call; what it reads it leaves as it is
    gguf.GGUFReader = functools.lru_cache(maxsize=1)(lambda path: made(path))  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        gguf.GGUFReader = made  # type: ignore[misc]


def read_once(source: Path) -> AbstractContextManager[None]:
    """Returns a context in which a .gguf file is parsed once, however often it is asked for; of other files nothing."""
    return _one_reader() if source.suffix == ".gguf" else nullcontext()
