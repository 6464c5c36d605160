"""This folder measures how good a model is: accuracy on held-out problems and named benchmarks, and paired tests of two
models."""
