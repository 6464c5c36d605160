"""The changes of a version, from CHANGELOG.md: `python release/notes.py v0.2.0` prints them for the release's page.

Exits 1 where the tag is not the version of the package, or the changelog has no section of it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def version() -> str:
    """Returns trapo_kernels.__version__, without importing torch."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "trapo_kernels/__init__.py").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def section(changelog: str, of: str) -> str | None:
    """Returns what stands below the heading of a version; None where there is no such heading."""
    found = re.search(rf"^## {re.escape(of)}(?: [^\n]*)?\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    return found and found[1].strip()


def main(tag: str) -> None:
    wanted = tag.removeprefix("v")
    if wanted != version():
        sys.exit(f"release/notes.py: the tag says {wanted}, trapo_kernels.__version__ is {version()}")
    notes = section((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), wanted)
    if not notes:
        sys.exit(f"release/notes.py: CHANGELOG.md has no section ## {wanted}")
    print(notes)


if __name__ == "__main__":
    main(sys.argv[1])
