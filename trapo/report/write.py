"""This file writes the reports of runs: `report.html` to look at, `report.png` to paste, `report.json` with the numbers
behind that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trapo.report.page import write_page
from trapo.report.picture import write_picture
from trapo.report.run_data import read_run, with_distinct_names


def write_report(path: Path, summary: dict[str, Any] | None = None) -> Path:
    """Writes report.png, report.json and report.html of the run in `path`, into it; returns the page's path.

    summary: of a run that is about to be finished. Raises TrapoError when the folder holds no steps.
    """
    run = read_run(path, summary)
    write_picture(run)
    return write_page([run], path / "report.html")


def write_comparison(paths: Sequence[Path], out: Path) -> Path:
    """Writes one page on all runs, overlaid; nothing is written into their folders."""
    return write_page(with_distinct_names([read_run(path) for path in paths]), out)
