"""A list of a folder's files with their sizes and SHA-256, by which damage to any of them is seen."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from trapo.files import write_json

NAME = "manifest.json"
_CHUNK = 1 << 22


def write_manifest(folder: Path) -> None:
    """Write `folder/manifest.json` over all files that are in the folder now."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    entries = {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}
    write_json(folder / NAME, {"files": entries})


def find_damage(folder: Path) -> str | None:
    """What is wrong with the folder, in a few words; None when every file is as it was written."""
    try:
        files = json.loads((folder / NAME).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"{NAME} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{NAME} is not readable"
    # Sizes first: they cost nothing, and most damage is a file cut short.
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} of {entry['bytes']} bytes"
    for name, entry in files.items():
        try:
            if _sha256(folder / name) != entry["sha256"]:
                return f"{name} does not have its checksum"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
