"""The examples in the docstrings of the public functions run, and every public function that computes has one."""

from __future__ import annotations

import doctest
import inspect

import pytest
import torch

import trapo_kernels as tk
from trapo_kernels import functional, metrics, module, statistics
from trapo_kernels.divergence import heads
from trapo_kernels.support import logprobs, topk_divergence

MODULES = (functional, module, heads, logprobs, topk_divergence, metrics, statistics)
# What asks for or sets a state of the process needs no example.
SETTINGS = {"backends", "budget_mb", "default_backend", "get_budget_mb", "set_backend", "set_budget_mb", "verify"}
COMPUTING = [name for name in tk.__all__ if inspect.isfunction(getattr(tk, name)) and name not in SETTINGS]


@pytest.mark.parametrize("of", MODULES, ids=lambda of: of.__name__)
def test_the_examples_of_docstrings_give_what_they_say(of):
    torch.manual_seed(0)
    found = doctest.testmod(of, extraglobs={"torch": torch, "Objective": tk.Objective})
    assert (found.failed, found.attempted > 0) == (0, True)


@pytest.mark.parametrize("name", [*COMPUTING, "TrapoLoss"])
def test_a_public_function_ends_with_an_example(name):
    *_, last = getattr(tk, name).__doc__.split("\n\n")
    assert last.lstrip().startswith("Example:")
    assert ">>> " in last
