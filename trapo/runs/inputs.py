"""A run is made of more than its configuration: the contents of the files that it reads, by SHA-256.

`<run_dir>/inputs.json` keeps them with the run's id. A run that goes on after its data, its reward function or the
weights of its reference were changed would be two runs in one; it is refused with what changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
from collections.abc import Mapping
from pathlib import Path

from trapo.errors import TrapoError
from trapo.settings.groups import DataConfig
from trapo.tools.files import file_digest, write_json
from trapo.tools.imports import source_file

_MODEL_FILES = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Holds a run's id, and the SHA-256 of what each key of its configuration names."""

    run: str
    files: dict[str, str]

    @classmethod
    def new(cls, files: dict[str, str]) -> Inputs:
        return cls(secrets.token_hex(8), files)

    @classmethod
    def load(cls, path: Path) -> Inputs | None:
        """Returns what `save` wrote; None where there is none or it is damaged."""
        try:
            raw = json.loads(path.read_bytes())
            found = cls(str(raw["run"]), dict(raw["files"]))
            return found if raw["sha256"] == found._digest() else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, path: Path) -> None:
        write_json(path, dataclasses.asdict(self) | {"sha256": self._digest()})

    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


def fingerprints(
    data: DataConfig,
    code: Mapping[str, str],
    model_path: str | None = None,
    teacher: str | None = None,
    prior: str | None = None,
) -> dict[str, str]:
    """Returns the SHA-256 by key of the local files that a run reads.

    code: the functions that keys name, the user's and others. model_path: of its files too, which a run that goes on
    reads again only for adapters, a reference or a teacher. teacher: the path of another model, which it does.
    prior: as eval.prior.
    """
    found: dict[str, str] = {}
    for key, name in (("data.train", data.train), ("data.eval", data.eval), ("eval.prior", prior)):
        if name is not None and "://" not in name and Path(name).is_file():
            found[key] = file_digest(Path(name))
    for key, name in code.items():
        if (source := source_file(name)) is not None:
            found[key] = file_digest(source)
    for key, path in (("model.path", model_path), ("distill.teacher", teacher)):
        if path is not None and (files := _model_files(path)):
            found[key] = hashlib.sha256("".join(map(file_digest, files)).encode()).hexdigest()
    return found


def refuse_changed(kept: Mapping[str, str], now: Mapping[str, str], where: Path) -> None:
    """Raises TrapoError when a file is not what it was when the run began."""
    if changed := changed_inputs(kept, now):
        raise TrapoError(
            f"{', '.join(changed)}: the contents have changed since the run in {where} began; put them back, choose "
            "another run_dir, or go on with the new ones by --if-changed continue"
        )


def changed_inputs(kept: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [key for key in kept if key in now and kept[key] != now[key]]


def _model_files(name: str) -> list[Path]:
    from trapo.models.loading import find_weights

    source = find_weights(name)
    if source.is_file():
        return [source]
    return sorted({file for pattern in _MODEL_FILES for file in source.glob(pattern)})
