"""Which backend does a call."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import BACKENDS

import trapo_kernels as tk
from trapo_kernels import dispatch


@pytest.fixture(autouse=True)
def _untouched(monkeypatch):
    monkeypatch.delenv("TRAPO_KERNELS_BACKEND", raising=False)
    yield
    tk.set_backend(None)


def test_the_suite_covers_every_backend_there_is():
    assert set(BACKENDS) == set(tk.backends())


def test_backends_say_what_they_are():
    for name, backend in tk.backends().items():
        assert backend.name == name
        assert backend.available
        assert str(backend) == f"{name}: {backend.detail}"


def test_argument_then_set_backend_then_environment_then_the_fastest(monkeypatch):
    assert dispatch.pick(None, "f").name == "torch"
    monkeypatch.setenv("TRAPO_KERNELS_BACKEND", "reference")
    assert dispatch.pick(None, "f").name == "reference"
    assert tk.default_backend() == "reference"
    tk.set_backend("torch")
    assert dispatch.pick(None, "f").name == "torch"
    assert dispatch.pick("reference", "f").name == "reference"
    tk.set_backend(None)
    assert dispatch.pick(None, "f").name == "reference"


def test_a_backend_that_is_not_there_is_refused_where_it_was_named(monkeypatch):
    hidden, weight, targets = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^set_backend: name must be one of 'torch', 'reference' or None; got 'x'$"):
        tk.set_backend("x")
    monkeypatch.setenv("TRAPO_KERNELS_BACKEND", "x")
    with pytest.raises(ValueError, match=r"^linear_logprobs: backend \(TRAPO_KERNELS_BACKEND\) must be one of"):
        tk.linear_logprobs(hidden, weight, targets)


def test_a_backend_that_cannot_be_here_says_why_and_is_not_picked(monkeypatch):
    fast = replace(tk.backends()["torch"], name="fast", missing="no compiler was found")
    monkeypatch.setattr(dispatch, "_BACKENDS", [fast, *dispatch._BACKENDS])
    assert str(tk.backends()["fast"]) == "fast: not here: no compiler was found"
    assert dispatch.pick(None, "f").name == "torch"
    with pytest.raises(ValueError, match=r"^f: backend 'fast' does not exist here: no compiler was found$"):
        dispatch.pick("fast", "f")
