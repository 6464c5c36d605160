"""`python -m trapo_kernels` and `trapo doctor`: what there is, why something is not, and what to do."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import trapo_kernels as tk
from trapo.cli import app
from trapo_kernels import environment
from trapo_kernels.backends import native


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
    assert f"`{native.REINSTALL}`" in said
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


class Noted:
    """A distribution with pip's note on where it came from."""

    def __init__(self, **noted):
        self.noted = noted

    def read_text(self, name):
        assert name == "direct_url.json"
        return json.dumps(self.noted) if self.noted else None


@pytest.mark.parametrize(
    ("noted", "word"),
    [
        ({}, "trapo-kernels"),
        ({"url": "file://{tmp}/a%20folder"}, "'{tmp}/a folder'"),
        ({"url": "file://{tmp}/x.tar.gz"}, "{tmp}/x.tar.gz"),
        ({"url": "file://{tmp}/x.whl"}, "trapo-kernels"),  # which holds no source
        ({"url": "file://{tmp}/gone"}, "trapo-kernels"),
        ({"url": "https://x/y.git", "vcs_info": {"vcs": "git", "commit_id": "ab12"}}, "git+https://x/y.git@ab12"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_command_names_what_was_installed_for_the_package_may_be_in_no_index(noted, word, tmp_path, monkeypatch):
    (tmp_path / "a folder").mkdir()
    for name in ("x.tar.gz", "x.whl"):
        (tmp_path / name).touch()
    noted = {k: v.replace("{tmp}", str(tmp_path)) if isinstance(v, str) else v for k, v in noted.items()}
    monkeypatch.setattr(native.importlib.metadata, "distribution", lambda name: Noted(**noted))
    assert native._origin(tmp_path / "lib") == word.replace("{tmp}", str(tmp_path))


def test_in_a_checkout_the_command_names_the_checkout():
    root = Path(tk.__file__).parents[1]
    if (root / "csrc").exists():
        assert native.REINSTALL.endswith(f" --no-build-isolation -e {root}")
