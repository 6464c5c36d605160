r"""This file finds one spelling for the many ways to write one value: `undress` takes off what changes no value.

`REWRITES` is the table, in the order in which it is applied. Gold answers and given ones pass through the same table.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "≡": r"\equiv ", "±": r"\pm ", "∓": r"\mp ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∠": r"\angle ", "√": r"\sqrt ", "∅": r"\emptyset ", "…": r"\ldots ",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "∞": r"\infty ", "°": " degrees ",
    "′": "'", "’": "'", "“": '"', "”": '"',
    "π": r"\pi ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "ε": r"\epsilon ",
    "θ": r"\theta ", "λ": r"\lambda ", "μ": r"\mu ", "ρ": r"\rho ", "σ": r"\sigma ", "τ": r"\tau ", "φ": r"\phi ",
    "ω": r"\omega ", "ψ": r"\psi ", "ζ": r"\zeta ", "η": r"\eta ", "ℏ": r"\hbar ", "Ω": r"\Omega ", "Δ": r"\Delta ",
    "Γ": r"\Gamma ", "Σ": r"\Sigma ",
    "€": "", "¢": " cents ", "£": "", "¥": "", "₹": "",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "", "\ufeff": "",
}  # fmt: skip
_VULGAR = re.compile(r"(\d?)\s*([¼½¾⅐-⅞])")

# Names that plain text writes without a backslash.
_PLAIN_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp"
_GREEK = (
    "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|omega|psi|zeta|eta|pi|"
    "Delta|Omega|Gamma|hbar|infty"
)
_STYLES = (
    r"(?:text)?color\s*\{[^{}]*\}|[lL]arge|LARGE|[hH]uge|small|tiny|displaystyle|textstyle|limits|nolimits|rm|bf|it|"
    "mathstrut|boldmath|centering"
)
_SPACES = r"(?<!\\)\\(?:[,;:>\s]|q?quad(?![A-Za-z])|thinspace|enspace|hspace\s*\{[^{}]*\}|phantom\s*\{[^{}]*\})|~"
_BASES = dict(zip("two three four five six seven eight nine ten".split(), map(str, range(2, 11)), strict=True))  # noqa: SIM905
_BASES |= {"twelve": "12", "sixteen": "16"}
_BASE = rf"(\d+|{'|'.join(_BASES)})"
# Units that are one letter, where a text macro or a blank sets them off from a variable.
LETTER_UNITS = {
    "m": "metres", "s": "seconds", "g": "grams", "h": "hours", "L": "litres", "l": "litres", "J": "joules",
    "N": "newtons", "W": "watts", "V": "volts", "A": "amperes", "K": "kelvin", "C": "celsius", "F": "fahrenheit",
    "T": "tesla",
}  # fmt: skip

_TEXT = (
    r"\\(?:text(?:bf|it|rm|tt|sf|normal|md)?|mbox|hbox|math(?:rm|bf|it|sf|tt|normal)|boldsymbol|bm|operatorname\*?|emph|"
    "underline)"
)
_TEXT_MACRO = re.compile(_TEXT + r"\s*\{([^{}]*)\}")
_UNIT_MACRO = re.compile(r"(?<=[\d})\s~])\s*\\(?:text|textrm|mbox|mathrm)\s*\{\s*([mshgLlJNWVAKCFT])\s*\}")
_PLAIN_POWER = re.compile(r"\^\s*(?:\(([^()]*)\)|([+-]\s*(?:\d+(?:\.\d+)?|[A-Za-z]))|(\d{2,}|\d+\.\d+))")


def _words(match: re.Match[str]) -> str:
    """Returns the content of a text macro: words stand apart from the rest, a single letter or number does not."""
    content = match.group(1)
    return f" {content} " if re.search(r"[A-Za-z]{2}|\s", content) else content


def _unit_letter(match: re.Match[str]) -> str:
    return f" {LETTER_UNITS[match.group(1)]} "


def _power(match: re.Match[str]) -> str:
    return "^{" + next(g for g in match.groups() if g is not None).replace(" ", "") + "}"


def _in_base(match: re.Match[str]) -> str:
    base = next(g for g in match.groups() if g is not None)
    return "_" + _BASES.get(base, base)


def _ratio(match: re.Match[str]) -> str:
    return ":".join(re.findall(r"\d+", match.group(1)))


def _mark_bold(match: re.Match[str]) -> str:
    return match.group(1)


_Replacement = str | Callable[[re.Match[str]], str]
REWRITES: tuple[tuple[str, re.Pattern[str], _Replacement], ...] = tuple(
    (name, re.compile(pattern), replacement)
    for name, pattern, replacement in (
        ("calculator notes of GSM8K", r"<<[^<>]*>>", ""),
        ("chat end marks", r"<\|[^|]*\|>", ""),
        ("bold and code of Markdown", r"(?<![\w*])\*\*(?=\S)(.+?)(?<=\S)\*\*(?![\w*])", _mark_bold),
        ("backticks", r"`+", ""),
        ("money", r"\\text\s*\{\s*\\?\$\s*\}|\\textdollar|\\pounds|\\euro", ""),
        ("a box in the box", r"\\f?box(?:ed)?\s*\{((?:[^{}]|\{[^{}]*\})*)\}", _mark_bold),
        ("dollars and math delimiters", r"\\?\$|(?<!\\)\\[()]|(?<!\\)\\\[|(?<!\\)\\\](?!\w)", ""),
        ("sizes of brackets", r"\\(?:left|right|[bB]igg?[lrm]?|middle)(?![A-Za-z])\s*\.?", ""),
        ("styles", r"\\(?:" + _STYLES + r")(?![A-Za-z])", ""),
        ("no space", r"\\!\s*|\{\}|\\/", ""),
        ("space in a number", r"(?<=\d)(?:\\[,:;]|\{,\}\s*)(?=\d{3}(?!\d))|(?<=\d)\s*\{\s*,\s*\}\s*(?=\d)", ","),
        ("spaces", _SPACES, " "),
        ("fractions", r"\\[dtcx]frac(?![A-Za-z])", r"\\frac"),
        ("quantifiers", r",?\s*(?:\\text\s*\{)?\s*\bfor\s+(?:all|any|every|each)\b[^=<>]*$", ""),
        ("percent", r"\\%|\b(?:percent|per cent|pct)\b", "%"),
        ("degrees", r"\^\s*\{?\s*\\(?:circ|degree)(?![A-Za-z])\s*\}?|\\(?:text)?degrees?(?![A-Za-z])", " degrees "),
        ("minus", r"(?<!\\)\\-(?=\d)", "-"),
        ("binomials", r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
        ("binomials", r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        ("primes", r"\^\s*\{\s*\\prime\s*\}|\^\s*\\prime(?![A-Za-z])", "'"),
        ("braces", r"\\lbrace(?![A-Za-z])", r"\\{"),
        ("braces", r"\\rbrace(?![A-Za-z])", r"\\}"),
        ("brackets", r"\\(?:lparen|lgroup|langle)(?![A-Za-z])", "("),
        ("brackets", r"\\(?:rparen|rgroup|rangle)(?![A-Za-z])", ")"),
        ("matrices", r"(\\(?:begin|end))\s*\{\s*(?:(?:p|b|B|small)?matrix\s*\}|array\s*\}(?:\s*\{[lcr|\s]*\})?)",
         r"\1{pmatrix}"),
        ("relations", r"\\(?:leqslant|leqq|leq|le)(?![A-Za-z])|<=|=<", r"\\le "),
        ("relations", r"\\(?:geqslant|geqq|geq|ge)(?![A-Za-z])|>=", r"\\ge "),
        ("relations", r"\\(?:neq|ne)(?![A-Za-z])|!=|\\not\s*=", r"\\ne "),
        ("relations", r"\\(?:lt)(?![A-Za-z])", "<"),
        ("relations", r"\\(?:gt)(?![A-Za-z])", ">"),
        ("relations", r"\\(?:approx|simeq|sim|thickapprox|doteq)(?![A-Za-z])|~=", r"\\approx "),
        ("unions", r"(?<=[)\]}])\s*\b[UuV]\b\s*(?=[(\[\\{])|\\bigcup(?![A-Za-z])", r"\\cup "),
        ("division", r"\\div(?![A-Za-z])", "/"),
        ("set difference", r"\\(?:setminus|backslash)(?![A-Za-z])", r"\\setminus "),
        ("empty set", r"\\varnothing(?![A-Za-z])", r"\\emptyset "),
        ("variants of letters", r"\\var(epsilon|theta|phi|rho|sigma)(?![A-Za-z])", r"\\\1"),
        ("letters of units", _UNIT_MACRO.pattern, _unit_letter),
        ("text macros", _TEXT_MACRO.pattern, _words),
        ("text macros", _TEXT_MACRO.pattern, _words),  # one in another
        ("plain roots", r"(?<![\\A-Za-z])sqrt\b", r"\\sqrt"),
        ("numpy's names", r"(?<![A-Za-z])(?:np|math|numpy|sympy)\.(?=[a-z])", ""),
        ("plain functions", rf"(?<![\\A-Za-z])({_PLAIN_FUNCTIONS})(?![A-Za-z])(?=[\s({{\\^_\d]|[a-z]\b)", r"\\\1 "),
        ("plain functions", r"(?<![\\A-Za-z])a(sin|cos|tan)(?=\s*[({])", r"\\arc\1 "),
        ("plain Greek", r"(?<![\\A-Za-z])(" + _GREEK + r")(?![A-Za-z])", r"\\\1 "),
        ("plain infinity", r"(?<![\\A-Za-z])(?:infinity|inf|Infinity|oo)(?![A-Za-z])", r"\\infty "),
        ("powers of programs", r"(?<=[\w)}])\*\*(?=[\w(-])", "^"),
        ("plain powers", _PLAIN_POWER.pattern, _power),
        ("times of programs", r"(?<=[\w)}\s])\*(?=[\s\w(\\])", r"\\cdot "),
        ("times ten", r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times "),
        ("bases", rf"(?<=\d)\s*_\s*\{{?\s*(?:\(\s*(?:base\s*)?{_BASE}\s*\)|(?:base\s*)?{_BASE})\s*\}}?\s*(?:base)?$"
         rf"|(?<=\d)\s*,?\s*\(?(?:in\s+)?base[\s-]*\{{?{_BASE}\}}?\)?\s*$",
         _in_base),
        ("ratios in words",
         r"(?i)^\s*(?:(?:in\s+)?(?:(?:the|a)\s+)?ratio\s+(?:(?:is|of)\s+)?)?(\d+(?:\s+(?:is\s+)?to\s+\d+)+)\s*\.?\s*$",
         _ratio),
    )
)  # fmt: skip
# What a sentence puts before its answer.
_ANNOUNCED = re.compile(
    r"(?i)^\s*(?:(?:so|thus|hence|therefore|\\therefore|and|then)\b[\s,]*)*"
    r"(?:(?:the|our|my)\s+)?(?:(?:final|correct|right|required|desired)\s+)*(?:answer|result|solution|option|choice)s?"
    r"(?:\s+(?:to|of|for)\s+(?:the|this)\s+(?:problem|question))?\s*(?:is\b|are\b|:|=)+\s*[:=]?\s*(?:\\newline)?"
)
_MINUS_WORD = re.compile(r"(?i)^\s*(?:negative|minus)\s+(?=[\d.]|\\frac)")
_CONNECTIVE = re.compile(
    r"(?i)^\s*(?:(?:so|thus|hence|therefore)\b\s*[:,]?\s+|(?:\\(?:therefore|Rightarrow|implies|to|rightarrow)(?![A-Za-z])|=|[-=]>)\s*)"
)


@functools.lru_cache(maxsize=4096)
def undress(text: str) -> str:
    r"""Returns `text` as LaTeX-like math in one spelling, words set apart by blanks.

    >>> undress(r"\boxed{\$10{,}080}."), undress("11√2"), undress(r"4.5 x 10^33 \text{ erg/s}")
    ('10,080', '11\\sqrt{2}', '4.5 \\times 10^{33} erg/s')
    """
    if text.isascii():
        plain = text
        if _NOTHING_TO_DO.fullmatch(text):
            return text.strip().rstrip(".")
    else:
        plain = _ascii(text)
    plain = re.sub(r"\s+", " ", plain)
    for _, pattern, replacement in REWRITES:
        plain = pattern.sub(replacement, plain)
    plain = _ANNOUNCED.sub("", plain, count=1)
    plain = _CONNECTIVE.sub("", plain, count=1)
    plain = _MINUS_WORD.sub("-", plain, count=1)
    plain = _brace_arguments(plain)
    plain = " ".join(plain.split()).strip(" ,;:").strip("\"'").strip()
    plain = re.sub(r"\.$", "", plain) if not plain.endswith("..") else plain
    return _outer_braces(_OUTWARD.sub(_inward, plain.strip(" ,;:*")))


_NOTHING_TO_DO = re.compile(r"\s*-?\d+(?:,\d{3})*(?:\.\d*)?\s*")


def _ascii(text: str) -> str:
    text = _VULGAR.sub(lambda m: m.group(1) + " " + unicodedata.normalize("NFKC", m.group(2)).replace("⁄", "/"), text)
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻ⁿ]+", lambda m: "^{" + m.group().translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub("[₀-₉]+", lambda m: "_{" + m.group().translate(_SUBSCRIPTS) + "}", text)
    text = "".join(_SYMBOLS.get(c, c) for c in text)
    return "".join(_SYMBOLS.get(c, c) for c in unicodedata.normalize("NFKC", text))


# ]a, b[ is (a, b)
_OUTWARD = re.compile(r"(?<![^\s])([\[\]])([^\[\]]+,[^\[\]]+)([\[\]])(?!\S)")


def _inward(match: re.Match[str]) -> str:
    return ("(" if match.group(1) == "]" else "[") + match.group(2) + (")" if match.group(3) == "[" else "]")


def _outer_braces(text: str) -> str:
    while text.startswith("{") and matching(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


_OPENING, _CLOSING = "([{", ")]}"


def matching(text: str, start: int) -> int:
    """Returns the index of the bracket that closes the one at `start`, of whatever kind (intervals mix them); -1:
    none."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in _OPENING) - (text[i] in _CLOSING)
        if depth == 0:
            return i
    return -1


_ARGUMENT = re.compile(r"\\(frac|sqrt|binom)(?![A-Za-z])\s*(\[[^\]]*\])?\s*")
_BARE = re.compile(r"\s*(\\[A-Za-z]+|[A-Za-z0-9])")
_ROOT_BARE = re.compile(r"\s*(\d+(?:\.\d+)?|\\[A-Za-z]+|[A-Za-z])")


def _brace_arguments(text: str) -> str:
    r"""Returns `\frac34`, `\frac{270}7`, `\sqrt2`, `\sqrt(2)` with their arguments in braces."""
    out, position = [], 0
    while (match := _ARGUMENT.search(text, position)) is not None:
        out.append(text[position : match.start()] + "\\" + match.group(1) + (match.group(2) or ""))
        position = match.end()
        for _ in range(1 if match.group(1) == "sqrt" else 2):
            argument, position = _argument(text, position, root=match.group(1) == "sqrt")
            out.append("{" + _brace_arguments(argument) + "}")
    out.append(text[position:])
    return "".join(out)


def _argument(text: str, position: int, *, root: bool) -> tuple[str, int]:
    while position < len(text) and text[position] == " ":
        position += 1
    if position < len(text) and text[position] in ("{(" if root else "{"):
        end = matching(text, position)
        if end > 0:
            return text[position + 1 : end], end + 1
    # A root without braces in plain text ("√13") covers the whole number; a TeX macro takes one digit.
    match = (_ROOT_BARE if root else _BARE).match(text, position)
    return (match.group(1), match.end()) if match else ("", position)
