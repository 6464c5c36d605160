"""What leads to a release: the check of a wheel, the notes of a version, the parts of CI and the workflows."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch

import trapo_kernels as tk
from trapo_kernels.backends.cpu import rows

ROOT = Path(__file__).parents[1]
LIBRARY = rows.library()
pytestmark = pytest.mark.skipif(not (ROOT / "release").exists(), reason="needs the sources of the repository")


def script(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "release" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wheel(tmp_path):
    """Makes a wheel with these libraries in it."""

    def make(libraries, name="trapo_kernels-0.2.0-213torch-py3-none-manylinux_2_34_x86_64.whl", more=()):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("trapo/cli.py", "")
            for member in more:
                archive.writestr(member, "")
            for member, source in libraries.items():
                archive.write(source, f"trapo_kernels/{member}")
        return tmp_path / name

    return make


@pytest.mark.skipif(LIBRARY is None, reason="the C++ extension is not compiled")
def test_a_wheel_with_the_three_libraries_of_this_machine_may_leave_it(wheel):
    names = [f"_cpu_{c}.so" for c in ("default", "avx2", "avx512")]
    said = script("check_wheel").check(wheel(dict.fromkeys(names, LIBRARY)))
    assert "3 libraries" in said
    assert re.search(r"glibc 2\.\d+ and newer$", said)


@pytest.mark.skipif(LIBRARY is None, reason="the C++ extension is not compiled")
def test_a_wheel_that_another_machine_cannot_use_is_refused(wheel):
    check, one = script("check_wheel").check, {"_cpu_default.so": LIBRARY}
    with pytest.raises(AssertionError, match="not py3-none"):
        check(wheel(one, "trapo_kernels-0.2.0-cp311-cp311-linux_x86_64.whl"))
    with pytest.raises(AssertionError, match=r"lacks \['trapo_kernels/_cpu_avx2\.so'"):
        check(wheel(one))
    names = {f"_cpu_{c}.so": LIBRARY for c in ("default", "avx2", "avx512")}
    with pytest.raises(AssertionError, match=r"holds \['tests/test_x\.py'\]"):
        check(wheel(names, more=["tests/test_x.py"]))
    python = Path(torch.__file__).parent / "lib" / "libtorch_python.so"
    with pytest.raises(AssertionError, match=r"libtorch_python\.so: needs "):
        script("check_wheel").glibc(python)


def test_the_notes_of_a_release_are_its_section_of_the_changelog(tmp_path):
    notes = script("notes")
    assert notes.version() == tk.__version__
    text = "# Changelog\n\n## Unreleased\n\n- a\n\n## 0.2.0 (2026-12-01)\n\n- b\n- c\n\n## 0.1.0\n\n- d\n"
    assert notes.section(text, "0.2.0") == "- b\n- c"
    assert notes.section(text, "0.1.0") == "- d"
    assert notes.section(text, "0.2") is None
    done = subprocess.run(
        [sys.executable, ROOT / "release/notes.py", "v9.9.9"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"the tag says 9.9.9, trapo_kernels.__version__ is {tk.__version__}" in done.stderr


def test_every_part_of_ci_is_a_job_of_the_workflow_and_a_function_of_the_script():
    run = (ROOT / ".ci/run").read_text()
    parts = re.search(r"^parts=\((.*)\)$", run, re.MULTILINE)[1].split()
    assert all(re.search(rf"^{part}\(\) ", run, re.MULTILINE) for part in parts)
    matrix = re.search(r"part: \[(.*)\]", (ROOT / ".github/workflows/tests.yml").read_text())[1]
    assert matrix.split(", ") == parts
    done = subprocess.run(
        ["bash", ROOT / ".ci/run", "lnit"], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 2
    assert "no part 'lnit'; there are: lint" in done.stdout


def test_the_workflows_are_yaml_and_name_targets_and_files_that_there_are():
    import yaml

    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        text = path.read_text()
        jobs = yaml.safe_load(text)["jobs"]
        assert jobs
        assert set(re.findall(r"run: make ([\w-]+)", text)) <= targets
        for file in re.findall(r"python3? (release/\S+\.py)", text):
            assert (ROOT / file).exists()


def test_the_lowest_torch_of_the_workflow_is_the_one_that_is_promised():
    promised = re.search(r'dependencies = \["torch>=([\d.]+)"\]', (ROOT / "pyproject.toml").read_text())[1]
    tried = re.search(r'torch: \["([\d.]+)"', (ROOT / ".github/workflows/tests.yml").read_text())[1]
    assert tried.startswith(promised)


def test_without_the_packages_of_the_trainer_the_command_says_how_to_get_them():
    code = "import sys; sys.modules['typer'] = None; from trapo.tools.command import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "trapo: needs typer: pip install 'trapo-kernels[train]'\n"


def test_a_module_of_ours_that_is_missing_is_a_fault_and_not_a_lack_of_packages():
    code = "import sys; sys.modules['trapo.cli'] = None; from trapo.tools.command import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Traceback" in done.stderr
