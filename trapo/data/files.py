"""Files of problems are read here row by row, whatever their type: rows, or what is wrong with one."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trapo.data.problem import DataError
from trapo.errors import words_of

Row = Mapping[str, Any]


def _read_jsonl(path: Path) -> Iterator[tuple[str, Row | DataError]]:
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # UnicodeDecodeError is one too
                yield str(number), DataError(f"not JSON: {error}")
                continue
            except RecursionError:
                yield str(number), DataError("not JSON that can be read: nested too deep")
                continue
            if not isinstance(row, dict):
                yield str(number), DataError(f"each line must be a JSON object; got {kind_of(row)}")
                continue
            yield str(number), row


def _read_parquet(path: Path) -> Iterator[tuple[str, Row | DataError]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            # Few rows at a time: a page of a few bytes may stand for rows of megabytes.
            for batch in file.iter_batches(batch_size=32):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a parquet file: {words_of(error)}") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
        raise DataError(f"{path}: damaged after row {number}: {words_of(error)}") from None


def _read_json(path: Path) -> Iterator[tuple[str, Row | DataError]]:
    """Yields the members of a list of objects, or of the one list that an object holds."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {words_of(error)} (a file of one object a line is .jsonl)") from None
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list)]
        found = lists[0] if len(lists) == 1 else found
    if not isinstance(found, list):
        raise DataError(f"{path}: must hold a list of objects; got {kind_of(found)}")
    for number, row in enumerate(found, 1):
        right = isinstance(row, dict)
        yield f"row {number}", row if right else DataError(f"each row must be an object; got {kind_of(row)}")


def _read_csv(path: Path) -> Iterator[tuple[str, Row | DataError]]:
    """Yields the rows below a line of names. Cells are texts, an empty one is nothing."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, strict=True)
            for row in table:
                where = f"row {table.line_num}"
                if None in row or None in row.values():
                    yield (
                        where,
                        DataError(f"has another number of cells than the {len(table.fieldnames or ())} names above"),
                    )
                else:
                    yield where, {name: cell or None for name, cell in row.items()}
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a CSV file in UTF-8: {words_of(error)}") from None


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Row | DataError]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def kind_of(value: Any) -> str:
    """Returns what a value is, in one line that any terminal can show."""
    names = {list: "a list", dict: "a record", str: "text", type(None): "nothing", bool: "true or false"}
    shown = repr(value).encode(errors="replace").decode()
    return f"{names.get(type(value), type(value).__name__)} {shown[:60]}{'…' if len(shown) > 60 else ''}"
