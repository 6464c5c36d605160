"""A benchmark keeps here what its problems were answered, as soon as they are, so that nothing is asked twice."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trapo.errors import TrapoError
from trapo.runs.ranks import ALONE, Ranks
from trapo.tools.files import append_line, remove, write_atomic

Row = dict[str, Any]  # a line of NAME.jsonl: a response with its problem and reward


class Answers:
    """Holds the file of a benchmark that is under way: a line of settings, then a line for each answered problem, with
    all its rows. It goes when the benchmark is finished. Of several ranks the first one writes, and all must ask.

    A line that a kill or a full disk left half is cut off, and its problem asked again.
    """

    def __init__(self, path: Path, settings: dict[str, Any], ranks: Ranks = ALONE) -> None:
        self.path, self.settings, self.ranks = path, settings, ranks

    def load(self) -> dict[int, list[Row]]:
        """Returns the rows of the problems that are answered, by their places. Raises TrapoError where they were
        answered with other settings."""
        return self.ranks.once(self._load)

    def add(self, rows: dict[int, list[Row]]) -> None:
        """Makes the rows of more problems durable, all of them or none. Raises OSError where they cannot be."""
        lines = [json.dumps([place, of_problem], ensure_ascii=False) for place, of_problem in rows.items()]
        self.ranks.once(lambda: append_line(self.path, "\n".join(lines)))

    def forget(self) -> None:
        """Deletes the file."""
        self.ranks.once(lambda: remove(self.path))

    def _load(self) -> dict[int, list[Row]]:
        data = self.path.read_bytes() if self.path.exists() else b""
        lines = _whole_lines(data)
        if not lines:
            write_atomic(self.path, json.dumps(self.settings) + "\n")
            return {}
        refuse_other_settings(self.path, lines[0], self.settings)
        if (kept := sum(len(line) + 1 for line in data.split(b"\n")[: len(lines)])) < len(data):
            os.truncate(self.path, kept)
        return dict(lines[1:])


def refuse_other_settings(path: Path, earlier: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises TrapoError where what is in the file was made with other settings."""
    if changed := sorted(key for key in settings if earlier.get(key) != settings[key]):
        raise TrapoError(f"run_dir: {path} is of other settings ({', '.join(changed)}); choose another run_dir")


def _whole_lines(data: bytes) -> list[Any]:
    """Returns what the lines of a file hold, up to the first that is not whole."""
    found = []
    for line in data.split(b"\n")[:-1]:  # nothing ends the last one
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def in_blocks(places: Sequence[int], size: int) -> list[Sequence[int]]:
    """Returns consecutive blocks of so many places."""
    return [places[i : i + size] for i in range(0, len(places), size)]
