"""Prints what extras of pyproject.toml ask for, one requirement a line: python tests/extras.py train vllm"""

from __future__ import annotations

import sys
from pathlib import Path

import tomllib


def requirements(extras: list[str]) -> list[str]:
    """Of the package itself and of these extras."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]


if __name__ == "__main__":
    print(*requirements(sys.argv[1:]), sep="\n")
