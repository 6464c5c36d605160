"""What a run shows while it runs: a live table on a terminal, one line a step elsewhere."""

from __future__ import annotations

from collections import deque
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROWS = 12  # steps kept in the live table


class Display:
    """Context manager. `update` takes the rows of metrics.jsonl, `status` a word on what is going on."""

    def __init__(self, console: Console, total_steps: int, first_step: int, ratios: list[float]) -> None:
        self.console = console
        self.ratios = ratios
        self.rows: deque[dict[str, Any]] = deque(maxlen=ROWS)
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
        self._printed_header = False

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def status(self, message: str) -> None:
        self.progress.update(self.task, description=message)

    def note(self, message: str) -> None:
        """A line that stays above the table."""
        self.console.print(message, highlight=False, markup=False)

    def update(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        left = f"{_clock(row['seconds_left'])} left"
        self.progress.update(self.task, completed=row["step"], left=left)
        if not self.console.is_terminal:
            self._print(row)

    def _columns(self) -> list[str]:
        by_ratio = [f"reward@{ratio:g}" for ratio in self.ratios]
        return [
            "step",
            "phase",
            "reward",
            *by_ratio,
            "TrSFT clipped",
            "entropy",
            "grad norm",
            "failed rewards",
            "tokens/s",
            "left",
        ]

    def _cells(self, row: dict[str, Any]) -> list[str]:
        by_ratio = [_number(row["reward_by_ratio"].get(f"{ratio:g}"), ".2f") for ratio in self.ratios]
        return [
            str(row["step"]),
            row["phase"],
            _number(row["reward"], ".2f"),
            *by_ratio,
            _number(row.get("trsft_clipped"), ".0%"),
            _number(row.get("entropy"), ".2f"),
            _number(row["grad_norm"], ".2f"),
            str(sum(row["reward_failures"].values())),
            _number(row["tokens_per_second"], ".0f"),
            _clock(row["seconds_left"]),
        ]

    def _render(self) -> Group:
        table = Table(box=None, padding=(0, 1), header_style="bold")
        for column in self._columns():
            table.add_column(column, justify="right")
        for row in self.rows:
            table.add_row(*self._cells(row))
        return Group(table, self.progress)

    def _print(self, row: dict[str, Any]) -> None:
        columns = self._columns()
        if not self._printed_header:
            self.console.print("  ".join(columns), highlight=False, soft_wrap=True)
            self._printed_header = True
        cells = [cell.rjust(len(column)) for cell, column in zip(self._cells(row), columns, strict=True)]
        self.console.print("  ".join(cells), highlight=False, soft_wrap=True)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
