"""The device that kernels are tested on: `pytest --device cuda`; what a test starts reads it from the environment.

Whatever a test makes without naming a device is made there, tensors and generators alike, so that no test knows of it.
"""

from __future__ import annotations

import os
from typing import Any

import torch

ENV = "TRAPO_TEST_DEVICE"
# The backends that take its tensors, and what else the suite has on a CPU (kernel_cases.py).
BACKENDS = {
    "cpu": ["reference", "torch", "triton"],
    "cuda": ["reference", "torch", "triton", "cuda"],
    "pretend": ["reference", "torch", "triton"],  # pretend.py: to test the suite itself; Triton is interpreted
}
# What a device other than a CPU has to do with: kernels, the loops around them, what users call.
FILES = {
    *("test_conformance.py", "test_columns.py", "test_terms.py", "test_divergence.py", "test_vocab_parallel.py"),
    *("test_hostile_numbers.py", "test_terms_on_backends.py", "test_terms_of_sequences.py"),
    *("test_compile.py", "test_stream.py", "test_autograd.py", "test_own_terms.py", "test_statistics.py"),
    *("test_capture.py", "test_device.py"),
}


def name() -> str:
    """Of the device."""
    return os.environ.get(ENV, "cpu")


def refuse(device: str) -> str | None:
    """Why kernels cannot be tested on a device, or None."""
    if device not in BACKENDS:
        return f"--device must be one of {', '.join(BACKENDS)}; got {device!r}"
    if device == "cuda" and not torch.cuda.is_available():
        return f"--device cuda: torch {torch.__version__} finds no CUDA device"
    return None


def activate(device: str | None = None) -> None:
    """Makes it the device of everything from here on. Triton, which reads it when it is first imported, interprets its
    kernels where there is no GPU."""
    os.environ[ENV] = device = name() if device is None else device
    if device != "cuda":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    if device == "cpu":
        return
    if device == "pretend":
        import pretend

        pretend.activate()
        return
    torch.set_default_device(device)
    torch.Generator = _generators_of(device)  # type: ignore[misc]


def _generators_of(device: str) -> Any:
    """torch.Generator, whose default is this device: its own is the CPU whatever torch.set_default_device said."""
    original = torch.Generator

    class Generator(original):  # type: ignore[misc, valid-type]
        def __new__(cls, on: Any = device) -> Any:
            return original.__new__(original, on)

    return Generator
