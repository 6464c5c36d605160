"""The examples in the docstrings of the public functions run, and every public function that computes has one."""

from __future__ import annotations

import doctest

import pytest
import torch

import trapo_kernels as tk
from trapo_kernels import functional, module

FUNCTIONS = ("linear_logprobs", "linear_policy_loss", "logprobs_from_logits", "policy_loss_from_logprobs", "TrapoLoss")


@pytest.mark.parametrize("of", [functional, module], ids=["functional", "module"])
def test_the_examples_of_docstrings_give_what_they_say(of):
    torch.manual_seed(0)
    found = doctest.testmod(of, extraglobs={"torch": torch, "Objective": tk.Objective})
    assert (found.failed, found.attempted > 0) == (0, True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_ends_with_an_example(name):
    *_, last = getattr(tk, name).__doc__.split("\n\n")
    assert last.lstrip().startswith("Example:")
    assert ">>> " in last
