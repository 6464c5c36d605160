"""This file prints for whatever terminal there is: tables that keep their digits, characters that cannot be shown."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def print_table(console: Console, table: Table) -> None:
    """Print a table at its full width. Where the terminal is narrower its lines go on in the next line, so that no
    number loses digits."""
    unlimited = console.options.update(width=10_000)
    width = max(console.width, Measurement.get(console, unlimited, table).maximum)
    wide = Console(file=console.file, width=width, force_terminal=console.is_terminal)
    wide.print(table, highlight=False, soft_wrap=True)


def replace_what_cannot_be_shown() -> None:
    """Let stdout and stderr show "?" for a character that the terminal's encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def plain_keys(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments of a command with `--train.steps=20`, as other command lines have it, as `train.steps=20`.
    No option of ours has a dot in its name."""
    return [a.removeprefix("--") if re.match(r"--\w+(\.\w+)+=", a) else a for a in arguments]
