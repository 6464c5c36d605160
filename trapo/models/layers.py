"""This file reads what a configuration says of its layers, which need not be alike: Gemma 4's differ in the width of
their heads."""

from __future__ import annotations

from typing import Any


def layer_configs(config: Any) -> list[Any]:
    """Returns the configuration of each layer of the text model. Where layers differ, transformers refuses to tell
    their sizes otherwise."""
    text = config.get_text_config()
    if getattr(text, "is_heterogeneous", False):
        return list(text.per_layer_config)
    return [text] * text.num_hidden_layers


def attention_width(config: Any) -> int:
    """Returns the sum over layers of heads × their width: what the products of a pair of tokens sum over. 0 for a
    model without attention."""
    width = 0
    for layer in layer_configs(config):
        if heads := getattr(layer, "num_attention_heads", None):
            width += heads * (getattr(layer, "head_dim", None) or layer.hidden_size // heads)
    return width


def sliding_windows(config: Any) -> set[int]:
    """Returns the lengths of the layers' sliding windows; empty where there is none."""
    found = {getattr(layer, "sliding_window", None) for layer in layer_configs(config)}
    return {size for size in found if isinstance(size, int)}
