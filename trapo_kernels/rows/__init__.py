"""The row kernels, one file per implementation. `base` says what one is.

A submodule here is called torch, so nothing in this file may be.
"""
