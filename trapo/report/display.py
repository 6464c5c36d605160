"""This file shows a run while it runs: a live table on a terminal, one line a step elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from trapo.report.words import QUANTITIES

ROWS = 12  # steps kept in the live table
GAP = 2  # blanks between columns
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Column:
    """Describes a column of the table."""

    title: str
    short: str  # title on a narrow terminal
    cell: Callable[[Row], str]
    dispensable: int = 0  # a terminal that is still too narrow does without the highest first; 0: never left out
    width: int = 0  # at least, so that the table does not move when a longer cell comes


class Display:
    """Shows the run, as a context manager. `update` takes the rows of metrics.jsonl, `status` a word on what is going
    on."""

    def __init__(self, console: Console, total_steps: int, first_step: int, ratios: list[float]) -> None:
        self.console = console
        self.columns = table_columns(ratios)
        self.rows: deque[Row] = deque(maxlen=ROWS)
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
        )
        self.task = self.progress.add_task("starting", total=total_steps, completed=first_step, left="")
        self.live = Live(get_renderable=self._render, console=console, refresh_per_second=2, transient=False)
        self.widths: list[int] = []  # of the columns of a log, from its first line on

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.status("done" if kind is None else "stopped")
            with contextlib.suppress(OSError):
                self.live.stop()

    def status(self, message: str) -> None:
        self.progress.update(self.task, description=message)

    def announce(self, message: str) -> None:
        """Says what is going on where it takes long: as `status`, and in a log by a line."""
        self.status(message)
        if not self.console.is_terminal:
            self.note(f"{message} ...")

    def note(self, message: str) -> None:
        """Prints a line that stays above the table."""
        with contextlib.suppress(OSError):  # a terminal that was closed, a pipe that nobody reads: the run goes on
            self.console.print(message, highlight=False, markup=False)

    def update(self, row: Row) -> None:
        self.rows.append(row)
        left = f"{_clock(row['seconds_left'])} left"
        self.progress.update(self.task, completed=row["step"], left=left)
        if not self.console.is_terminal:
            self._print(row)

    def _render(self) -> Group:
        columns, short = fitting(self.columns, self.rows, self.console.width)
        table = Table(box=None, padding=(0, GAP, 0, 0), header_style="bold", show_edge=False)
        for column in columns:
            title = column.short if short else column.title
            table.add_column(title, justify="right", no_wrap=True, min_width=column.width)
        for row in self.rows:
            table.add_row(*(column.cell(row) for column in columns))
        return Group(table, self.progress)

    def _print(self, row: Row) -> None:
        cells = [column.cell(row) for column in self.columns]
        if not self.widths:
            self.widths = [max(len(c.title), c.width, len(cell)) for c, cell in zip(self.columns, cells, strict=True)]
            self._print_line([column.title for column in self.columns])
        self._print_line(cells)

    def _print_line(self, cells: Sequence[str]) -> None:
        padded = [cell.rjust(width) for cell, width in zip(cells, self.widths, strict=True)]
        with contextlib.suppress(OSError):
            self.console.print((" " * GAP).join(padded), highlight=False, markup=False, soft_wrap=True)


def table_columns(ratios: Sequence[float]) -> list[Column]:
    """Returns what is shown of a step. ratios: the guidance levels that the run can have."""

    def column(name: str, cell: Callable[[Row], str], dispensable: int = 0, suffix: str = "") -> Column:
        words = QUANTITIES[name]
        return Column(words.column + suffix, words.short + suffix, cell, dispensable)

    def reward_at(ratio: str) -> Column:
        return column("reward_by_ratio", lambda row: _number(row["reward_by_ratio"].get(ratio), ".2f"), 1, ratio)

    return [
        Column("step", "step", lambda row: str(row["step"])),
        Column("phase", "phase", lambda row: row["phase"], 4, width=5),
        column("own_reward", lambda row: _number(row.get("own_reward"), ".2f")),
        *(reward_at(f"{ratio:g}") for ratio in ratios if ratio > 0),
        column("trsft_clipped", lambda row: _number(row.get("trsft_clipped"), ".0%"), 2),
        column("entropy", lambda row: _number(row.get("entropy"), ".2f"), 3),
        column("grad_norm", lambda row: _number(row["grad_norm"], ".2f"), 5),
        column("reward_failures", lambda row: str(sum(row["reward_failures"].values())), 2),
        column("tokens_per_second", lambda row: _number(row["tokens_per_second"], ".0f"), 3),
        Column("left", "left", lambda row: _clock(row["seconds_left"]), 6, width=7),  # the progress bar has it too
    ]


def fitting(columns: Sequence[Column], rows: Sequence[Row], width: int) -> tuple[list[Column], bool]:
    """Returns the columns that fit into `width`, and whether their titles have to be the short ones."""

    def needed(shown: Sequence[Column], short: bool) -> int:
        titles = [len(column.short if short else column.title) for column in shown]
        cells = [max([column.width, *(len(column.cell(row)) for row in rows)]) for column in shown]
        return sum(max(pair) + GAP for pair in zip(titles, cells, strict=True))

    shown = list(columns)
    if needed(shown, short=False) <= width:
        return shown, False
    while needed(shown, short=True) > width and any(column.dispensable for column in shown):
        worst = max(column.dispensable for column in shown)
        shown.remove([column for column in shown if column.dispensable == worst][-1])
    return shown, True


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
