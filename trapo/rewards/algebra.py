r"""This file decides whether two formulas are one, by math-verify's parser and exact arithmetic at chosen points.

math-verify parses; the comparison is our own where its rounding would decide: two expressions are equal when they agree
to 50 digits, in relative error, at several points (1/2006! is not 1/2004!), at whole numbers where floors or factorials
stand. What is no expression (sets, logic) is left to math-verify's `verify`.
"""

from __future__ import annotations

import functools
import logging
import re
import zlib
from fractions import Fraction
from typing import Any

from trapo.rewards.numbers import Number, read_number

_LONGEST = 1500  # characters of a formula that are worth parsing

# Of millions of digits, which take half a minute; and 24!!, which is read as (24!)! and never ends.
_HUGE_FACTORIAL = re.compile(r"\d{6,}\s*\}?\)?\s*!|!(?:\s|\\right|[)}])*!")

_NOT_IN_MACRO = "".join(rf"(?<!\\[A-Za-z]{{{k}}})" for k in range(14))  # a letter of its own, also in a run: rx(t)
_SUBSCRIPTED = re.compile(
    rf"(\\[A-Za-z]+(?![A-Za-z])|{_NOT_IN_MACRO}[A-Za-z])" + r"\s*_\s*(\{[^{}]*\}|[A-Za-z0-9]|\\[A-Za-z]+)"
)
_NAME = r"(\\?[A-Za-z]+(?:_\{?\w+\}?)?)"
_PRIMED = re.compile(_NOT_IN_MACRO + r"([A-Za-z](?:_\{?\w+\}?)?)('+)(?:\(([A-Za-z])\))?")
_DERIVATIVE = re.compile(
    r"\\frac\s*\{\s*d\s*(?:\^\s*\{?\s*(\d)\s*\}?)?\s*" + _NAME + r"\s*(?:\(\s*\w\s*\))?\s*\}"
    r"\s*\{\s*d\s*[A-Za-z]\s*(?:\^\s*\{?\s*\d\s*\}?)?\s*\}"
)
_DOTTED = re.compile(r"\\(d{0,3})dot(?![A-Za-z])\s*\{?\s*" + _NAME + r"\s*\}?(?:\s*\(\s*[A-Za-z]\s*\))?")
_APPLIED = re.compile(rf"({_NOT_IN_MACRO}[A-Za-z]|\\(?:delta|theta|phi|psi|Phi|Psi|mho))\s*\(\s*([A-Za-z]|\d+)\s*\)")
_FUNCTION_NAMES = """
    frac sqrt binom pi cdot times infty log ln exp sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh
    sum prod int lim lfloor rfloor lceil rceil begin end left right pm mp le ge ne approx in cup cap pmod bmod
    gcd max min det mod
"""
_FUNCTIONS = frozenset(_FUNCTION_NAMES.split())


def same_expression(gold: str, given: str) -> bool:
    """Returns whether two expressions are one; False for what cannot be read."""
    if max(len(gold), len(given)) > _LONGEST:
        return False
    if "\\ln" in gold and "\\log" not in gold:  # what others write log
        given = re.sub(r"\\log(?![A-Za-z]|\s*_)", r"\\ln", given)
    a, b = _parsed(gold), _parsed(given)
    if a is None or b is None:
        return False
    equal = _agree(a, b)
    if equal is False and (gold, given) != (lowered := (_lowered(gold), _lowered(given))) and _one_case(gold):
        a, b = _parsed(lowered[0]), _parsed(lowered[1])
        return a is not None and b is not None and _agree(a, b) is True
    return _verified(a, b) if equal is None else equal


_LETTER = re.compile(r"\\[A-Za-z]+|[A-Za-z]")


def _one_case(text: str) -> bool:
    """Returns whether no letter stands in both cases, which would be two variables."""
    letters = {m for m in _LETTER.findall(text) if len(m) == 1}
    return len({letter.lower() for letter in letters}) == len(letters)


def _lowered(text: str) -> str:
    return _LETTER.sub(lambda m: m.group().lower() if len(m.group()) == 1 else m.group(), text)


def same_equation(gold: tuple[str, str], given: tuple[str, str]) -> bool:
    """Returns whether two equations say the same: the difference of the sides is the same, but for a factor."""
    differences = []
    for left, right in (gold, given):
        a, b = _parsed(left), _parsed(right)
        if a is None or b is None:
            return False
        try:
            differences.append(a - b)
        except TypeError:
            return False
    return _proportional(*differences)


def close_to_decimal(formula: str, decimal: Number) -> bool:
    """Returns whether a decimal with six places and seven digits is the value of `formula`, rounded or cut."""
    if decimal.places is None or decimal.places < 6 or decimal.digits < 7 or len(formula) > _LONGEST:
        return False
    expression = _parsed(formula)
    if expression is None or getattr(expression, "free_symbols", True):
        return False
    value = _evaluated(expression, {})
    return value is not None and abs(value - _sympy_fraction(decimal.value)) < Fraction(1, 10**decimal.places)


# ------------------------------------------------------------------------------------------------- parsing


def _symbol(text: str) -> str:
    """Returns a name that the parser takes as one symbol."""
    return f" w_{{{zlib.crc32(re.sub(r'[ {}]', '', text).encode()) % 10**7}}} "


def _derivative(name: str, order: int) -> str:
    return _symbol(f"derivative {order} {name}")


def _one_symbol(match: re.Match[str]) -> str:
    macro = match.group(0).lstrip("\\ ")
    name = re.match(r"[A-Za-z]+", macro)
    return match.group(0) if name and name.group() in _FUNCTIONS else _symbol(match.group(0))


def _for_parser(text: str) -> str:
    # dx/dt, \dot{x} and x' are one symbol, whatever they are derived by.
    text = _DERIVATIVE.sub(lambda m: _derivative(m.group(2), int(m.group(1) or 1)), text)
    text = _DOTTED.sub(lambda m: _derivative(m.group(2), 1 + len(m.group(1))), text)
    text = _PRIMED.sub(lambda m: _derivative(m.group(1), len(m.group(2))), text)
    text = _SUBSCRIPTED.sub(_one_symbol, text)
    text = _APPLIED.sub(lambda m: _symbol(m.group(0)), text)
    text = re.sub(r"(?<![A-Za-z\\])I(?![A-Za-z])", lambda m: _symbol("I"), text)
    text = re.sub(r"\\(?:mho|odot)(?![A-Za-z])", lambda m: _symbol(m.group(0)), text)
    text = re.sub(r"\^\s*\(([^()]*)\)", r"^{\1}", text)
    return re.sub(r"(?<=[\d)}A-Za-z])!(?=\s*[A-Za-z(\\])", r"! \\cdot ", text)


@functools.lru_cache(maxsize=512)
def _parsed(text: str) -> Any:
    """Returns a sympy object, or None. math-verify's own clean-up of units is off: it drops letters that may be
    variables."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy  # 0.3 s: only those who grade pay
    from math_verify.grader import should_treat_as_complex

    text = _for_parser(text)
    if _HUGE_FACTORIAL.search(text):
        return None
    try:
        return latex2sympy(
            text,
            is_real=not should_treat_as_complex(text),
            convert_degrees=False,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except Exception:
        return None


# ------------------------------------------------------------------------------------------------- comparing


def _points(names: list[str]) -> list[dict[str, Any]]:
    import sympy

    points = []
    for k, size in enumerate((1, 1, 3, 11)):  # large ones too, where floors differ
        seeds = {n: zlib.crc32(f"{n}/{k}".encode()) for n in names}
        points.append({n: sympy.Rational(size * (seed % 9973 + 4001), 5003) for n, seed in seeds.items()})
    return points


def _whole_points(names: list[str]) -> list[dict[str, Any]]:
    import sympy

    return [{n: sympy.Integer((zlib.crc32(n.encode()) + 3 * k) % 11 + k + 2) for n in names} for k in range(8)]


def _agree(a: Any, b: Any) -> bool | None:
    """Returns whether two expressions agree at all points; None: not for points to decide."""
    import sympy

    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)):
        return None
    names = sorted({s.name for s in a.free_symbols | b.free_symbols if isinstance(s, sympy.Symbol)})
    if _agree_at(a, b, _points(names)):
        return True
    by_whole_numbers = a.has(sympy.floor, sympy.ceiling, sympy.factorial, sympy.binomial, sympy.Mod) or b.has(
        sympy.floor, sympy.ceiling, sympy.factorial, sympy.binomial, sympy.Mod
    )
    if names and by_whole_numbers and _agree_at(a, b, _whole_points(names)):
        return True
    if "i" in names:  # the imaginary unit, unless it is an index
        return _agree_at(a, b, [{**point, "i": sympy.I} for point in _points(names)])
    return False


def _agree_at(a: Any, b: Any, points: list[dict[str, Any]]) -> bool:
    compared = 0
    for point in points:
        x, y = _evaluated(a, point), _evaluated(b, point)
        if x is None or y is None:
            if (x is None) != (y is None):
                return False
            continue
        compared += 1
        if not _near(x, y):
            return False
    return compared > 0


def _near(x: Any, y: Any) -> bool:
    if x == y or (_vanishes(x) and _vanishes(y)):
        return True
    if (x.is_Rational and y.is_Rational) or x.is_infinite or y.is_infinite:
        return False
    try:
        return bool(abs(x - y) <= max(abs(x), abs(y)) / 10**50)
    except TypeError:
        return False


def _vanishes(value: Any) -> bool:
    """Returns whether a value is zero, or what exact cancellation leaves: a float without a single digit of its own."""
    return value == 0 or all(getattr(part, "_prec", 53) == 1 for part in value.as_real_imag())


_DIGITS = 80


def _evaluated(expression: Any, point: dict[str, Any]) -> Any:
    """Returns the value at a point exactly or to 80 digits; None where it has none."""
    import sympy

    floats = {f: sympy.Rational(str(f)) for f in expression.atoms(sympy.Float)}
    values = {s: point[s.name] for s in expression.free_symbols if isinstance(s, sympy.Symbol)}
    try:
        value = expression.xreplace(floats).xreplace(values).doit()
        if value.is_Rational:
            return value  # exact: 2^1009 + 1 is not 2^1009
        value = sympy.N(value, _DIGITS)
        if value.has(sympy.nan, sympy.zoo) or not value.is_number:
            return None
        return value
    except Exception:
        return None


def _sympy_fraction(value: Fraction) -> Any:
    import sympy

    return sympy.Rational(value.numerator, value.denominator)


def _proportional(a: Any, b: Any) -> bool:
    """Returns whether a / b is one constant at all points, and neither vanishes throughout."""
    import sympy

    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)):
        return False
    names = sorted({s.name for s in a.free_symbols | b.free_symbols if isinstance(s, sympy.Symbol)})
    if not names:
        return False
    ratios = []
    for point in _points(names):
        x, y = _evaluated(a, point), _evaluated(b, point)
        if x is None or y is None or x == 0 or y == 0:
            return False
        ratios.append(x / y)
    return all(_near(ratio, ratios[0]) for ratio in ratios)


def _verified(a: Any, b: Any) -> bool:
    """Returns math-verify's verdict on what is no plain expression."""
    from math_verify import verify

    # It warns once that its timeouts are off. They are off on purpose: they need SIGALRM and the main thread.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    try:
        return bool(verify(a, b, timeout_seconds=None))
    except Exception:
        return False


def is_numeric(text: str) -> bool:
    """Returns whether a formula holds no variable."""
    macros = set(re.findall(r"\\([A-Za-z]+)", text))
    letters = re.sub(r"\\[A-Za-z]+", "", text)
    return macros <= _FUNCTIONS and not re.search(r"[A-Za-df-z]", letters) and read_number(text) is None
