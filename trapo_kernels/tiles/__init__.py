"""Kernels that go from hidden states and weight to a row's statistics and write no logits, one file per implementation.

A submodule here is called triton, so nothing in this file may be.
"""
