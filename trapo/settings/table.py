"""This file makes tables of all keys and modes: what `trapo config` prints and what docs/config.md is made of."""

from __future__ import annotations

import typing
from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from trapo.config import PRESETS, Config, preset_names
from trapo.errors import TrapoError
from trapo.modes import MODES
from trapo.settings.keys import Key, keys_of

COLUMNS = ("key", "default", "accepts", "what it is")


def groups() -> dict[str, list[Key]]:
    """Returns the keys by the group that they are in; "" has those in none."""
    found: dict[str, list[Key]] = {}
    for each in keys_of(Config):
        found.setdefault(each.name.rpartition(".")[0], []).append(each)
    return found


def matching(word: str | None) -> dict[str, list[Key]]:
    """Returns the keys whose name or sentence holds the word, by group. Raises TrapoError when there is none."""
    if word is None:
        return groups()
    found = {
        group: kept
        for group, keys in groups().items()
        if (kept := [k for k in keys if word.lower() in f"{k.name} {k.doc}".lower()])
    }
    if not found:
        raise TrapoError(f"no key with {word!r} in its name or description; `trapo config` prints all")
    return found


def tables(word: str | None = None) -> Iterator[Table]:
    """Yields what `trapo config` prints: a table a group, and one of the modes. word: only keys that have it."""
    for group, keys in matching(word).items():
        table = _table(group_note(group), *COLUMNS)
        for each in keys:
            table.add_row(Text(each.name, "bold"), Text(shown(each.default)), Text(each.accepts), Text(each.doc))
        yield table
    if word is None:
        table = _table("modes", "mode", "what it does")
        for mode in MODES.values():
            table.add_row(Text(mode.name, "bold"), Text(mode.doc))
        yield table


def presets_table() -> Table:
    """Returns what `trapo presets` prints: each with the comment that its file begins with."""
    table = _table("presets", "preset", "what it is")
    for name, doc in presets().items():
        table.add_row(Text(name, "bold"), Text(doc))
    return table


def presets() -> dict[str, str]:
    """Returns the presets that are installed with the package, and the comment that each file begins with."""
    return {name: _comment((PRESETS / f"{name}.yaml").read_text(encoding="utf-8")) for name in preset_names()}


def markdown() -> str:
    """Returns every key as a Markdown table, a section a group."""
    lines = []
    for group, keys in groups().items():
        lines += [f"## {group or 'The run'}", ""]
        if note := group_note(group).partition(": ")[2]:
            lines += [note, ""]
        lines += ["| key | default | accepts | what it is |", "| --- | --- | --- | --- |"]
        lines += [f"| `{k.name}` | `{shown(k.default)}` | {_cell(k.accepts)} | {_cell(k.doc)} |" for k in keys]
        lines += [""]
    return "\n".join(lines)


def modes_markdown() -> str:
    """Returns every mode as a Markdown table."""
    rows = [f"| `{mode.name}` | {_cell(mode.doc)} |" for mode in MODES.values()]
    return "\n".join(["| mode | what it does |", "| --- | --- |", *rows])


def presets_markdown() -> str:
    """Returns every preset as a Markdown table."""
    rows = [f"| `{name}` | {_cell(doc)} |" for name, doc in presets().items()]
    return "\n".join(["| preset | what it is |", "| --- | --- |", *rows])


def group_note(group: str) -> str:
    """Returns a group's name, and what its class says of all its keys."""
    if not group:
        return "the run"
    kind: type = Config
    for name in group.split("."):
        kind = typing.get_type_hints(kind)[name]
    doc = kind.__doc__ or ""
    generated = doc.startswith(f"{kind.__name__}(")  # what `dataclass` writes where there is none
    return group if generated or not doc else f"{group}: {doc}"


def shown(default: object) -> str:
    """Returns a default as a YAML file would have it."""
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, str):
        return default or '""'
    return (
        f"{default:g}" if isinstance(default, float) else str(list(default) if isinstance(default, tuple) else default)
    )


def _comment(text: str) -> str:
    """Returns the comment at the top of a YAML file, in one line."""
    lines = text.splitlines()
    count = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.lstrip("# ") for line in lines[:count])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, no_wrap=i == 0, ratio=1 if i == len(columns) - 1 else None)
    return table
