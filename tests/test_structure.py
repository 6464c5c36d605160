"""The tree stays readable: files and functions are short, the top floor is small, docstrings begin with a sentence."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("trapo_kernels", "trapo", "bench", "study", "examples", "docs", "tests")
PACKAGES = ("trapo_kernels", "trapo")
FILE, FUNCTION = 450, 60  # lines
TOP_FILES, TOP_LINES = 10, 1900  # of trapo's top floor
TOP_KERNELS = 20  # files of trapo_kernels' top floor

# A docstring stands where its code does not: in an editor's tooltip, in the API pages. So that it says there whether a
# value is returned, taken or written, that of a function or class opens with one of these verbs, whose subject is what
# it describes. Another verb is welcome here; a noun is not.
VERBS = frozenset(
    """
    accepts accumulates act acts adds allocates appends asks attaches begins bounds builds calls checks clears clips
    closes collects compares computes concatenates converts copies counts cuts deals decides declares decodes deletes
    describes does draws drops encodes ends enters evaluates fills finds finishes forgets frees freezes gathers
    generates gets gives goes grades hands has holds imports installs is joins keeps kills knows launches leaves lets
    lists lives loads logs looks magnifies makes marks measures moves multiplies names notes opens owns packs pads
    patches prepares prints puts raises reads reduces refuses registers remembers removes replaces returns runs samples
    saves says scores sends serves sets shards shares shows sorts speaks splits spreads stands starts stops sums swaps
    syncs takes tells tests trains tries turns undoes uses waits works wraps writes yields
    """.split()  # noqa: SIM905
)
IRREGULAR = {"be": "is", "do": "does", "go": "goes", "have": "has"}
FINITE = VERBS | {
    "are",
    "become",
    "becomes",
    "bring",
    "come",
    "comes",
    "have",
    "move",
    "run",
    "stand",
    "tests",
    "can",
    "may",
}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def own_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Returns a function's lines but for its docstring, whose length is the reader's gain."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    text = function.body[0]
    return lines - ((text.end_lineno or 0) - text.lineno + 1)


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_top_floor_of_the_trainer_can_be_read_in_an_afternoon() -> None:
    top = {place(path): path.read_text().count("\n") for path in (ROOT / "trapo").glob("*.py")}
    assert len(top) <= TOP_FILES, sorted(top)
    assert sum(top.values()) <= TOP_LINES, top


def test_the_fused_losses_keep_what_belongs_together_behind_folders() -> None:
    top = sorted(path.name for path in (ROOT / "trapo_kernels").glob("*.py"))
    assert len(top) <= TOP_KERNELS, top


def test_no_file_is_longer_than_what_one_subject_needs() -> None:
    lengths = {place(path): path.read_text().count("\n") for path in files(*FOLDERS)}
    assert {name: n for name, n in lengths.items() if n > FILE} == {}


def test_a_function_fits_a_screen() -> None:
    found = {f"{place(path)} {f.name}": own_lines(f) for path in files(*FOLDERS) for f in functions(path)}
    assert {name: n for name, n in found.items() if n > FUNCTION} == {}


def first_sentence(docstring: str) -> str:
    return re.split(r"(?<=[.?])\s", " ".join(docstring.split("\n\n")[0].split()))[0]


def opens_with_a_verb(sentence: str) -> bool:
    word = sentence.split()[0].strip(".,:;").lower()
    return {word, f"{word}s", f"{word}es", re.sub("y$", "ies", word), IRREGULAR.get(word)} & VERBS != set()


def has_a_verb(sentence: str) -> bool:
    """Returns whether a sentence has a verb outside of a clause: `What X does` is a noun, and `a file that is` too."""
    if sentence.endswith("?"):
        return True
    if re.match(r"(what|which|where|when|whether|how|why|whom?)\b", sentence, re.IGNORECASE):
        return False
    before = re.split(r"\b(?:that|which|who|whose|where|what|whether|how|when)\b|: ", sentence)[0]
    return bool({word.strip(".,;()") for word in before.split()} & FINITE)


@pytest.mark.parametrize(
    ("sentence", "verb"),
    [
        ("What a run shows of itself.", False),
        ("Buffers whose rows are padded.", False),
        ("The oracle: it computes all logits.", False),
        ("Does the engine have the weights?", True),
        ("A checkpoint is a folder.", True),
        ("This file says which rows take part.", True),
    ],
)
def test_the_verb_of_a_clause_is_none_of_its_sentence(sentence: str, verb: bool) -> None:
    assert has_a_verb(sentence) is verb


@pytest.mark.parametrize("package", PACKAGES)
def test_a_docstring_s_first_sentence_has_a_verb(package: str) -> None:
    found = []
    for path in files(package):
        for node in ast.walk(tree(path)):
            if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if (text := ast.get_docstring(node)) is None:
                continue
            sentence = first_sentence(text)
            module = isinstance(node, ast.Module)
            if not (has_a_verb(sentence) if module else opens_with_a_verb(sentence) or has_a_verb(sentence)):
                found.append(f"{place(path)} {getattr(node, 'name', '')}: {sentence}")
    assert found == [], "\n".join(found)
