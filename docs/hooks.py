"""Fills the site's generated parts: result tables from bench/results/, what this version has, from its sources, and the
README and the changelog."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces each `<!-- NAME -->` of PARTS."""
    for name, make in PARTS.items():
        if f"<!-- {name} -->" in markdown:
            markdown = markdown.replace(f"<!-- {name} -->", make())
    return markdown


def on_serve(server: Any, **_: Any) -> Any:
    server.watch(str(RESULTS))
    return server


def results() -> str:
    """Every report under bench/results/, a section each, in the order of their names."""
    reports = sorted(RESULTS.rglob("*.md"))
    if not reports:
        return "*No result has been committed yet.*"
    return "\n\n".join(_section(path) for path in reports)


def _section(path: Path) -> str:
    text = _demoted(path.read_text())
    # Pictures and files beside a report stay in the repository: a link to them would lead nowhere here.
    text = re.sub(r"!?\[([^\]]*)\]\((?!https?://|#)[^)]*\)", r"\1", text)
    name = path.relative_to(ROOT)
    if not text.lstrip().startswith("#"):
        text = f"## {path.stem}\n\n{text}"
    return f"{text.rstrip()}\n\n<small>From `{name}`.</small>"


def _demoted(text: str) -> str:
    """Headings a level down, outside code blocks."""
    lines, code = [], False
    for line in text.splitlines():
        code ^= line.startswith("```")
        lines.append(f"#{line}" if line.startswith("#") and not code else line)
    return "\n".join(lines)


def readme() -> str:
    return _of_repository("README.md")


def changelog() -> str:
    return _of_repository("CHANGELOG.md")


def _of_repository(name: str) -> str:
    """A file of the repository's top as a page: links into docs/ lead to its pages, those to other files are text."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")

    def link(found: re.Match[str]) -> str:
        return found[0] if (ROOT / "docs" / found[2].partition("#")[0]).is_file() else found[1]

    return re.sub(r"(?<!!)\[([^\]]*)\]\((?!https?://|#)([^)]*)\)", link, text)


def backends() -> str:
    import trapo_kernels as tk

    rows = ["| backend | what it is |", "| --- | --- |"]
    return "\n".join([*rows, *(f"| `{b.name}` | {b.detail} |" for b in tk.backends().values())])


def metrics() -> str:
    import trapo_kernels as tk

    rows = ["| metric | of several calls | meaning |", "| --- | --- | --- |"]
    for name, metric in tk.METRICS.items():
        how = metric.reduce + (f", weighted by `{metric.over}`" if metric.over else "")
        rows.append(f"| `{name}` | {how} | {metric.doc} |")
    return "\n".join(rows)


def terms() -> str:
    import trapo_kernels as tk

    rows = ["| name | term on | source |", "| --- | --- | --- |"]
    for where, table in (("expert tokens", tk.EXPERT_TERMS), ("own tokens", tk.POLICY_TERMS)):
        rows += [f"| `{name}` | {where} | {term.source} |" for name, term in table.items()]
    return "\n".join(rows)


def config() -> str:
    from trapo.settings.table import markdown

    return markdown()


def modes() -> str:
    from trapo.settings.table import modes_markdown

    return modes_markdown()


def presets() -> str:
    from trapo.settings.table import presets_markdown

    return presets_markdown()


PARTS = {
    "readme": readme,
    "changelog": changelog,
    "results": results,
    "backends": backends,
    "metrics": metrics,
    "terms": terms,
    "config": config,
    "modes": modes,
    "presets": presets,
}
