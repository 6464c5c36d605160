r"""This file takes an undressed answer apart: lists, brackets, unions, equations, inequalities, matrices, both
signs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

from trapo.rewards.dress import matching

_LIST_SEPARATOR = re.compile(r",|;|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
_EQUALS = re.compile(r"(?<![<>!:\\])=+|\\equiv(?![A-Za-z])")
_APPROX = re.compile(r"\\approx(?![A-Za-z])")
_ORDER = re.compile(r"\\le(?![A-Za-z])|\\ge(?![A-Za-z])|<|>")
_MATRIX = re.compile(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}", re.DOTALL)
_NAME = re.compile(
    r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_(?:\{[^{}]*\}|\\?[A-Za-z]+|\d+))?'*(?:\([^()]*\))?"
    r"|\\(?:math)?(?:bf|rm)?\{?[A-Za-z]\}?"
)
_DERIVATIVE = re.compile(r"\\frac\{d.{0,20}\}\{d.{0,20}\}|\\d?dot\s*\{[^{}]*\}(?:\([A-Za-z]\))?")


def split_at(text: str, separator: re.Pattern[str]) -> list[str]:
    """Returns `text` cut at the separators that stand in no bracket."""
    parts, depth, start, position = [], 0, 0, 0
    while position < len(text):
        char = text[position]
        depth += (char in "([{") - (char in ")]}")
        match = separator.match(text, position) if depth <= 0 else None
        if match is not None and match.end() > position:
            parts.append(text[start:position])
            start = position = match.end()
        else:
            position += 1
    parts.append(text[start:])
    return [part.strip() for part in parts]


_GROUPED = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")


def items(text: str, *, grouped: bool = True) -> list[str]:
    """Returns the members of a list that commas, semicolons, "and" or "or" make; one item when there is no list.

    grouped: 58,500 is one number.
    """
    if text.startswith("\\begin"):
        return [text]
    if grouped:
        text = _GROUPED.sub(lambda m: m.group().replace(",", "\x00"), text)
    return [part.replace("\x00", ",") for part in split_at(text, _LIST_SEPARATOR) if part]


def sides(text: str) -> list[str]:
    """Returns what the equals signs of `text` part."""
    return [part for part in split_at(text, _EQUALS) if part]


def approximations(text: str) -> list[str]:
    return [part for part in split_at(text, _APPROX) if part]


def brackets(text: str) -> tuple[str, str, str] | None:
    r"""Returns (opening, inside, closing) of a text that is one pair of brackets: `(a, b]`, `\{a, b\}`."""
    if text.startswith("\\{") and text.endswith("\\}") and matching(text, 1) == len(text) - 1:
        return "{", text[2:-2].strip(), "}"
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and matching(text, 0) == len(text) - 1:
        return text[0], text[1:-1].strip(), text[-1]
    return None


def without_outer_brackets(text: str) -> str:
    """Returns what is in a pair of round brackets around a whole formula; (a, b) and the letter of a choice keep
    theirs."""
    while (pair := brackets(text)) is not None and (pair[0], pair[2]) == ("(", ")"):
        if len(items(pair[1], grouped=False)) != 1 or re.fullmatch("[A-Za-z]?", pair[1]):
            break
        text = pair[1]
    return text


def union(text: str) -> list[str]:
    return split_at(text, re.compile(r"\\cup(?![A-Za-z])"))


def matrix(text: str) -> list[list[str]] | None:
    """Returns the rows of cells, where the whole text is one matrix."""
    match = _MATRIX.fullmatch(text)
    if match is None or "\\begin" in match.group(1):
        return None
    rows = [row for row in re.split(r"\\\\(?:\s*\[[^\]]*\])?", match.group(1)) if row.strip()]
    return [[cell.strip() for cell in row.split("&")] for row in rows]


def vector(cells: list[list[str]] | None) -> list[str] | None:
    """Returns the cells of a matrix of several rows or columns that is one column or one row."""
    if cells is None or len(cells) * len(cells[0]) < 2 or (len(cells) > 1 and any(len(row) > 1 for row in cells)):
        return None
    return [cell for row in cells for cell in row]


def is_unsolved(text: str) -> bool:
    """Returns whether `text` is a polynomial in one letter that is not just its name: what an equation on its way to a
    value has on its left, `3x`, `x + 3`, `2x^2`. The square of a letter other than x, y, z may be what was asked."""
    compact = re.sub(r"\\cdot(?![A-Za-z])|[\s{}]", "", text)
    letters = set(re.findall("[A-Za-z]", compact))
    if len(letters) != 1 or not re.fullmatch(r"[-+*/^.\d()a-z]+", compact) or is_name(compact):
        return False
    if re.search(r"[a-z]\(", compact):  # f(2) + f(0)
        return False
    return letters <= set("xyz") or not re.fullmatch(r"[a-z]\^\d+", compact)


def is_name(text: str) -> bool:
    r"""Returns whether `text` names what follows: `x`, `f(x)`, `X_{d}`, `(x, y)`, `\angle ABC`, `\frac{dx}{dt}`,
    words."""
    text = text.strip()
    compact = text.replace(" ", "")
    if _NAME.fullmatch(compact) or _DERIVATIVE.fullmatch(compact):
        return True
    pair = brackets(text)
    if pair is not None:
        return all(is_name(item) for item in items(pair[1]))
    if re.fullmatch(r"(?:m\s*)?\\(?:angle|triangle|overline|vec|hat|bar|widehat)\s*\{?[\sA-Za-z_{}\d]*\}?", text):
        return True
    if re.fullmatch(r"\|?\s*[A-Z]{1,3}\s*\|?|\[[A-Z]+\]", text):
        return True
    return bool(re.fullmatch(r"[A-Za-z][A-Za-z\s]+(?:\([^()]*\))?", text))


def same_name(gold: str, given: str) -> bool:
    def spelled(name: str) -> str:
        return re.sub(r"[\s{}\\]|(?<=\w)\((?:.*)\)$", "", name).casefold()

    in_words = re.search(r"(?<![\\A-Za-z])[A-Za-z]?[a-z]{2,}", given) is not None
    return spelled(gold) == spelled(given) or in_words


def argument(name: str) -> str | None:
    """Returns the letter that a function is written of: x in f(x)."""
    match = re.fullmatch(r".*\(\s*([A-Za-z])\s*\)", name.strip())
    return match.group(1) if match else None


_MIRRORED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
# |x| > 1: a number, of which the negative is plain.
_SIZE = re.compile(
    r"(?:\||\\[lr]?vert)\s*([A-Za-z])\s*(?:\||\\[lr]?vert)\s*(<|>|\\le|\\ge)\s*(\d[\d./]*|\\frac\{\d+\}\{\d+\})\s*"
)


def interval_of(text: str) -> str | None:
    r"""Returns the interval that an inequality in one name means, or the union of several: `-2 \le x < 7` is
    `[-2,7)`."""
    if (size := _SIZE.fullmatch(text)) is not None:
        name, order, bound = size.groups()
        within = order in ("<", "\\le")
        text = (
            f"-{bound} {order} {name} {order} {bound}"
            if within
            else f"{name} {_MIRRORED[order]} -{bound} or {name} {order} {bound}"
        )
    parts = items(text)
    if len(parts) > 1:  # x < 2 or x > 3
        intervals = [interval_of(part) for part in parts]
        return "\\cup ".join(filter(None, intervals)) if all(intervals) else None
    operators = [m.group() for m in _ORDER.finditer(text)]
    parts = split_at(text, _ORDER)
    if len(parts) != len(operators) + 1 or not all(parts):
        return None
    rising = [op in ("<", "\\le") for op in operators]
    if len(parts) == 2 and is_name(parts[0]):
        low = "(-\\infty" if rising[0] else ("(" if operators[0] == ">" else "[") + parts[1]
        high = parts[1] + (")" if operators[0] == "<" else "]") if rising[0] else "\\infty)"
        return f"{low},{high}"
    if len(parts) == 2 and is_name(parts[1]):
        return interval_of(f"{parts[1]} {_MIRRORED[operators[0]]} {parts[0]}")
    if len(parts) == 3 and is_name(parts[1]) and rising[0] == rising[1]:
        if not rising[0]:
            parts.reverse()
            operators.reverse()
        first, last = ("(" if operators[0] in "<>" else "["), (")" if operators[1] in "<>" else "]")
        return f"{first}{parts[0]},{parts[2]}{last}"
    return None


_SIGNS = re.compile(r"\\(pm|mp)(?![A-Za-z])")


def both_signs(text: str) -> list[list[str]]:
    r"""Returns what `\pm` may stand for: with all signs turned together, and, where there are several, each on its
    own."""
    signs = _SIGNS.findall(text)
    if not signs:
        return [[text]]
    together = [[first] * len(signs) for first in (True, False)]
    readings = [[_signed(text, choice) for choice in together]]
    if 1 < len(signs) <= 4:
        readings.append([_signed(text, list(c)) for c in itertools.product((True, False), repeat=len(signs))])
    return readings


def _signed(text: str, upper: list[bool]) -> str:
    choices = iter(upper)

    def sign(match: re.Match[str]) -> str:
        return "+" if next(choices) == (match.group(1) == "pm") else "-"

    signed = _SIGNS.sub(sign, text)
    return re.sub(r"(^|[(\[{,=]\s*)\+\s*", r"\1", re.sub(r"([+-])\s+", r"\1", signed))


def same_members(gold: list[str], given: list[str], equal: Callable[[str, str], bool]) -> bool:
    """Returns whether two lists hold the same, in any order, each as often."""
    if len(gold) != len(given):
        return False
    rest = list(given)
    for member in gold:
        match = next((i for i, other in enumerate(rest) if equal(member, other)), None)
        if match is None:
            return False
        del rest[match]
    return True
