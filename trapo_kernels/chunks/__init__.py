"""This folder has the parts of the chunk loop, which is in stream.py.

`selection` says which rows take part, `sources` where their logits come from and their gradients go, `budget` how many
rows a chunk has. `buffers` has the memory of a chunk, `products` products of 16-bit operands, and `columns` the
backward that goes over blocks of the vocabulary instead.
"""
