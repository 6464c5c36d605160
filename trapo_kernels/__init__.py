"""Fused losses over huge vocabularies."""
