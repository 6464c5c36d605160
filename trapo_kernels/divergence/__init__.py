"""This folder has divergences of a head from another (`heads`): their values and gradients by blocks of rows (`rows`),
from references that are hidden states with a head of their own, or logits (`references`)."""

from .heads import Divergence, linear_divergence

__all__ = ["Divergence", "linear_divergence"]
