"""A manifest lists a folder's files with their sizes and SHA-256, by which damage to any of them is seen."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from trapo.errors import TrapoError
from trapo.tools.files import file_digest, write_json

NAME = "manifest.json"
_UNREADABLE = f"{NAME} is not readable"


def write_manifest(folder: Path) -> None:
    """Write `folder/manifest.json` over all files that are in the folder now."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    entries = {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": file_digest(p)} for p in files}
    write_json(folder / NAME, {"files": entries})


def find_damage(folder: Path) -> str | None:
    """Returns what is wrong with the folder, in a few words; None when it holds the files that were written and no
    others."""
    try:
        files = json.loads((folder / NAME).read_bytes())["files"]
        return _compare(folder, files)
    except FileNotFoundError:
        return f"{NAME} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return _UNREADABLE


def refuse_damaged(folder: Path) -> None:
    """Raises TrapoError when a folder that has a manifest is not what it says. Others are taken as they are."""
    if not (folder / NAME).is_file():
        return
    if damage := find_damage(folder):
        raise TrapoError(f"model.path: {folder} is damaged: {damage}; if it was changed on purpose, delete its {NAME}")


def _compare(folder: Path, files: Any) -> str | None:
    # Sizes first: they cost nothing, and most damage is a file cut short.
    for name, entry in files.items():
        path = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return _UNREADABLE
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} of {entry['bytes']} bytes"
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in files and name != NAME and _counts(path):
            return f"{name} was not saved with it"
    for name, entry in files.items():
        try:
            digest = file_digest(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if digest != entry["sha256"]:
            return f"{name} does not have its checksum"
    return None


def _counts(path: Path) -> bool:
    """Returns whether a file that appeared later could be taken for a part of the model: notes and hidden files are
    not."""
    return not path.is_dir() and not path.name.startswith(".") and path.suffix != ".md"
