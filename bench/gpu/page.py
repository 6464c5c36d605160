"""A run's results for people: a Markdown page, and the one table that the command ends with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.gpu.losses import BOTH, FORWARD
from bench.gpu.results import Results

__all__ = ["cells", "markdown", "summary"]

FLOOR = "three bare GEMMs"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return [*lines, *("| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |" for row in rows), ""]


def cells(results: Results, part: str) -> tuple[list[str], list[tuple[str, str, list[str]]]]:
    """Returns (shapes, rows of provider, what it gives, and a cell a shape): milliseconds, × the bare GEMMs, peak
    memory; or why not."""
    rows = [r for r in results.rows("loss") if r["part"] == part]
    shapes = list(dict.fromkeys(tuple(r["shape"]) for r in rows))
    floors = {tuple(r["shape"]): r["ms"] for r in rows if r["provider"] == FLOOR and "ms" in r}
    at = {(r["provider"], tuple(r["shape"])): r for r in rows}

    def cell(name: str, shape: tuple[int, ...]) -> str:
        row = at.get((name, shape), {})
        if "ms" not in row:
            return str(row.get("failed") or row.get("left_out") or "")[:80]
        ratio = f" ({row['ms'] / floors[shape]:.2f}×)" if shape in floors and part == BOTH else ""
        return f"{row['ms']:.2f}{ratio}" + (f", {row['peak_gib']:.1f} GiB" if "peak_gib" in row else "")

    gives = {r["provider"]: r["gives"] for r in rows}
    titles = ["×".join(map(str, shape)) for shape in shapes]
    return titles, [(name, gives[name], [cell(name, s) for s in shapes]) for name in gives]


def summary(results: Results) -> str:
    """Returns what the command ends with: the losses by shape, then each stage."""
    shapes, rows = cells(results, BOTH)
    rows = [r for r in rows if any(text[:1].isdigit() for text in r[2])]
    lines = [f"{results.data['card']}: forward and both gradients, ms (× the bare GEMMs), peak beyond the inputs"]
    lines.append(f"{'':36}" + "".join(f"{shape:>28}" for shape in shapes))
    lines += [f"{name:36}" + "".join(f"{text[:27]:>28}" for text in row) for name, _, row in rows]
    lines.append("")
    for name, stage in results.data["stages"].items():
        lines.append(f"{name:30} {stage['status']:8} {stage.get('seconds', 0):6.1f} s  {stage.get('why', '')}"[:200])
    return "\n".join(lines)


def _losses(results: Results) -> list[str]:
    lines: list[str] = []
    for part in (BOTH, FORWARD):
        shapes, rows = cells(results, part)
        lines += [f"## Losses: {part}", ""]
        lines += ["Median milliseconds (× the three bare GEMMs), peak memory beyond the inputs, by N×D×V.", ""]
        lines += _table(["provider", "gives", *shapes], ([name, gives, *row] for name, gives, row in rows))
    return lines


def _ceilings(results: Results) -> list[str]:
    lines = ["## Ceilings", ""]
    lines += [f"Copy: {row['tb_per_s']} TB/s.\n" for row in results.rows("copy")]
    gemms = [r for r in results.rows("GEMM") if "tflops" in r]
    names = list(dict.fromkeys(r["gemm"] for r in gemms))
    at = {(tuple(r["shape"]), r["stride"], r["gemm"]): r["tflops"] for r in gemms}
    keys = list(dict.fromkeys((tuple(r["shape"]), r["stride"]) for r in gemms))
    lines += _table(
        ["TFLOP/s; rows × D × V", "row stride", *names],
        (["×".join(map(str, s)), stride, *(at.get((s, stride, n), "") for n in names)] for s, stride in keys),
    )
    lines += _table(
        ["finish of d_weight", "D × V", "ms"],
        ([r["how"], "×".join(map(str, r["shape"])), r["ms"]] for r in results.rows("finish of d_weight")),
    )
    kernels = results.rows("row kernel")
    return lines + _table(
        ["row kernel", "verb", "rows × V", "ms", "GB/s"],
        ([r["backend"], r.get("verb", ""), f"{r['rows']}×{r['vocab']}", r.get("ms", ""),
          r.get("gb_per_s", r.get("failed", ""))] for r in kernels),
    )  # fmt: skip


def _plain(results: Results, title: str, *kinds: str) -> list[str]:
    """Returns the rows of some kinds with all their fields."""
    rows = [row for kind in kinds for row in results.rows(kind)]
    if not rows:
        return []
    head = list(dict.fromkeys(key for row in rows for key in row))
    return [f"## {title}", "", *_table(head, ([_short(row.get(key, "")) for key in head] for row in rows))]


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_short, value))
    return str(value)


def markdown(results: Results) -> str:
    data = results.data
    lines = [
        f"# {data['card']}",
        "",
        f"Written by `python -m bench.gpu --device {data['device']}`, {data['started']}.",
        "",
    ]
    if data["device"] == "cpu":
        lines += ["A CPU, tiny shapes: these numbers only show that the command works.", ""]
    for what in ("machine", "versions", "tools", "peers", "backends"):
        for row in results.rows(what):
            lines += [f"- {what}: " + "; ".join(f"{k} {_short(v)}" for k, v in row.items() if k != "what")]
    lines += ["", "## Stages", ""]
    lines += _table(
        ["stage", "ended", "seconds", "limit", "why"],
        (
            [n, s["status"], s.get("seconds", ""), s.get("limit", ""), s.get("why", "")]
            for n, s in data["stages"].items()
        ),
    )
    lines += _losses(results)
    lines += _plain(results, "Correctness", "first call", "smoke", "wrong", "tests", "so far", "failed")
    lines += _plain(results, "compute-sanitizer", "memcheck", "racecheck", "synccheck")
    lines += _ceilings(results)
    lines += _plain(results, "CUDA graphs", "graph")
    lines += _plain(results, "A training step", "training step")
    lines += _plain(results, "trapo train", "trapo train", "trainer's step")
    return "\n".join(lines) + "\n"
