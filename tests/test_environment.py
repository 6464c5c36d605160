"""`python -m trapo_kernels` and `trapo doctor`: what there is, why something is not, and what to do."""

import subprocess
import sys
from dataclasses import replace

import torch
from typer.testing import CliRunner

import trapo_kernels as tk
from trapo.cli import app
from trapo_kernels import environment


def without(monkeypatch, name, reason):
    found = {n: replace(b, look=lambda: reason) if n == name else b for n, b in tk.backends().items()}
    monkeypatch.setattr(environment, "backends", lambda: found)


def test_both_commands_print_versions_and_every_backend_with_its_reason():
    done = subprocess.run(
        [sys.executable, "-m", "trapo_kernels"], capture_output=True, text=True, timeout=120, check=True
    )
    shown = CliRunner().invoke(app, ["doctor"])
    assert shown.exit_code == 0, shown.output
    for text in (done.stdout, shown.output):
        assert f"torch {torch.__version__}" in text
        for name in tk.backends().keys() - {"cuda-on-cpu"}:  # which the tests add to their own process
            assert f"\n  {name}: " in text
        assert "\nwhat to do\n" in text


def test_a_missing_extension_is_named_with_the_command_that_mends_it(monkeypatch):
    without(monkeypatch, "cpu", "it was not compiled")
    said = environment.describe()
    assert "  cpu: not here: it was not compiled" in said
    assert "(it was not compiled): " in said
    assert "`pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation trapo-kernels`" in said
    assert "install a C++17 compiler, then" not in said or environment._compiler() is None


def test_a_missing_compiler_is_part_of_the_advice(monkeypatch):
    without(monkeypatch, "cpu", "it was not compiled")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    said = environment.describe()
    assert "C++: none found" in said
    assert "install a C++17 compiler, then install again" in said


def test_settings_of_the_environment_are_shown(monkeypatch):
    monkeypatch.setenv("TRAPO_KERNELS_BACKEND", "torch")
    said = environment.describe()
    assert "  TRAPO_KERNELS_BACKEND=torch\n" in said
    assert "TRAPO_KERNELS_BACKEND=torch names the backend of every call" in said
