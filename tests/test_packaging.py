"""What is in a release: an sdist that builds, and a wheel that has types, presets and templates without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import trapo_kernels as tk

ROOT = Path(__file__).parents[1]


def build(source: Path, out: Path, *command: str) -> Path:
    """The file that `setup.py COMMAND` makes of the sources, with nothing left beside them."""
    steps = ["egg_info", "--egg-base", str(out), *command, "--dist-dir", str(out / "dist")]
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *steps],
        cwd=source,
        env={**os.environ, "TRAPO_KERNELS_BUILD": "none"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (made,) = (out / "dist").iterdir()
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The unpacked sdist."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the sources of the repository")
    out = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build(ROOT, out, "sdist", "--formats", "gztar")) as archive:
        archive.extractall(out / "unpacked", filter="data")
    (folder,) = (out / "unpacked").iterdir()
    return folder


def test_an_sdist_holds_every_source_that_is_compiled_and_all_of_the_tests(sdist):
    for folder in ("csrc", "tests", "trapo/presets", "trapo/report", "trapo_kernels"):
        here = {p.relative_to(ROOT) for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix in SOURCES}
        there = {p.relative_to(sdist) for p in (sdist / folder).rglob("*")}
        assert here
        assert here <= there
    assert (sdist / "LICENSE").exists()


SOURCES = {".py", ".cpp", ".cu", ".h", ".yaml", ".j2", ".typed"}


def test_a_wheel_made_of_it_without_a_compiler_has_types_presets_templates_and_the_version(sdist, tmp_path):
    wheel = build(sdist, tmp_path, "bdist_wheel")
    names = zipfile.ZipFile(wheel).namelist()
    wanted = {"trapo_kernels/py.typed", "trapo/py.typed", "trapo/presets/demo.yaml", "trapo/report/page.html.j2"}
    assert wanted <= {*names}
    assert not [name for name in names if name.endswith(".so") or name.startswith(("tests", "bench", "study", "csrc"))]
    assert wheel.name.startswith(f"trapo_kernels-{tk.__version__}-py3-none-any")
