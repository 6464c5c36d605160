r"""This file reads numbers as exact values: `read_number` of an undressed text, and when two numbers count as one.

| accepted as the same | example |
| --- | --- |
| any spelling of one value | `1,234` `1 234` `1234.0`, `1/2` `\frac{1}{2}` `0.5`, `4\frac{2}{3}` `4 2/3`, `4.5e33` |
| a decimal of six places and six digits that is the value, rounded or cut | `0.333333` for 1/3; not `4.67` for 14/3 |
| values closer than 1e-9 of their size (noise of floats) | `0.30000000000000004` for 0.3 |
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction

_PLAIN = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d{1,3}(?:'\d{3})+|\d+)?(?:\.\d*)?"
_TEN = r"(?:\\times|\\cdot|\*|[xX])?\s*10\s*\^\s*(?:\{\s*(?P<power>[+-]?\s*\d+)\s*\}|(?P<digit>\d))"
_NUMBER = re.compile(rf"(?P<mantissa>{_PLAIN})\s*(?:[eE](?P<e>[+-]?\d+)|{_TEN})?")
_POWER_OF_TEN = re.compile(r"10\s*\^\s*(?:\{\s*(?P<power>[+-]?\s*\d+)\s*\}|(?P<digit>\d))")
_LATEX_FRACTION = re.compile(r"(?:(?P<whole>\d+)\s*\+?)?\s*\\frac\s*\{(?P<top>[^{}]*)\}\s*\{(?P<bottom>[^{}]*)\}")
_SLASH_FRACTION = re.compile(
    r"(?:(?P<whole>\d+)(?:\s+|\s*\+\s*(?=\d+/)))?(?P<top>-?[\d.,]+)\s*/\s*(?P<bottom>-?[\d.,]+)"
)
_REPEATING = re.compile(
    r"(?P<whole>\d*)\.(?P<fixed>\d*)(?:\\(?:overline|bar|dot)\s*\{?\s*(?P<again>\d+)\s*\}?|\((?P<round>\d+)\))"
)
_LARGEST_EXPONENT = 20_000


@dataclass(frozen=True)
class Number:
    """Is a number as it was written. value: without regard to `percent`. places: of a decimal that may be rounded;
    None: an integer or a fraction."""

    value: Fraction
    percent: bool = False
    places: int | None = None
    digits: int = 0  # significant ones, of a decimal
    finished: bool = True  # not a quotient whose value is whole, as in 48/2


@functools.lru_cache(maxsize=4096)
def read_number(text: str) -> Number | None:
    """Returns the number that the whole of `text` is; None for anything else."""
    text, percent = _without_percent(text.strip())
    negative = False
    while text[:1] in ("+", "-"):
        negative ^= text[0] == "-"
        text = text[1:].strip()
    if not text or len(text) > 4000:
        return None
    try:
        number = _fraction(text) or _repeating(text) or _decimal(text)
    except (ValueError, ArithmeticError, InvalidOperation):  # 5/0, an exponent out of reach
        return None
    if number is None:
        return None
    value = -number.value if negative else number.value
    return Number(value, percent, number.places, number.digits, number.finished)


def _without_percent(text: str) -> tuple[str, bool]:
    bare = text.removesuffix("%").strip()
    return bare, bare != text


def _decimal(text: str) -> Number | None:
    if power := _POWER_OF_TEN.fullmatch(text):
        return Number(_ten_to(power))
    match = _NUMBER.fullmatch(text)
    if match is None or not any(c.isdigit() for c in match.group("mantissa")):
        return None
    plain = re.sub(r"[, ']", "", match.group("mantissa"))
    value = Fraction(Decimal(plain.rstrip(".") or "0"))
    places = len(plain.partition(".")[2])
    if match.group("e"):
        value *= _power(int(match.group("e")))
    elif match.group("power") or match.group("digit"):
        value *= _ten_to(match)
    return Number(value, places=places if "." in plain else None, digits=len(plain.replace(".", "").lstrip("0")))


def _ten_to(match: re.Match[str]) -> Fraction:
    return _power(int((match.group("power") or match.group("digit")).replace(" ", "")))


def _power(exponent: int) -> Fraction:
    if abs(exponent) > _LARGEST_EXPONENT:
        raise ValueError("exponent")
    return Fraction(10) ** exponent


def _fraction(text: str) -> Number | None:
    match = _LATEX_FRACTION.fullmatch(text) or _SLASH_FRACTION.fullmatch(text)
    if match is None:
        return None
    top, bottom = read_number(match.group("top")), read_number(match.group("bottom"))
    if top is None or bottom is None or top.percent or bottom.percent:
        return None
    quotient = top.value / bottom.value
    whole = int(match.group("whole") or 0)
    if whole and quotient < 0:
        return None
    return Number(whole + quotient, finished=quotient.denominator != 1 or abs(bottom.value) == 1)


def _repeating(text: str) -> Number | None:
    match = _REPEATING.fullmatch(text)
    if match is None:
        return None
    again = match.group("again") or match.group("round")
    fixed, whole = match.group("fixed"), int(match.group("whole") or 0)
    period = Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(fixed))
    return Number(whole + Fraction(int(fixed or 0), 10 ** len(fixed)) + period)


def same_number(gold: Number, given: Number) -> bool:
    """Returns whether two numbers, percent signs aside, are one (see the module's docstring)."""
    if gold.value == given.value:
        return True
    if is_close(gold.value, given.value):
        return True
    return _rounds_to(given, gold.value) or _rounds_to(gold, given.value)


def is_close(a: Fraction, b: Fraction) -> bool:
    return abs(a - b) <= max(abs(a), abs(b)) / 10**9 and not (a.denominator == b.denominator == 1)


def _rounds_to(decimal: Number, value: Fraction) -> bool:
    """Returns whether `decimal` is `value` rounded or cut, and `value` has no end in decimals."""
    if decimal.places is None or decimal.places < 6 or decimal.digits < 6 or _ends(value.denominator):
        return False
    return abs(decimal.value - value) < Fraction(1, 10**decimal.places)


def _ends(denominator: int) -> bool:
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1


def percent_agrees(gold: Number, given: Number, gold_text: str) -> bool:
    """Returns whether the two mean one value although one of them alone has a percent sign.

    "17.5%" is also 0.175, and 17.5 where a unit is dropped. A gold without the sign may have dropped it (GSM8K's do),
    unless it is a number of another kind: a fraction of 1, or a float ("36.0").
    """
    if gold.percent == given.percent:
        return same_number(gold, given)
    hundredth = Fraction(1, 100)
    if gold.percent:
        scaled = Number(gold.value * hundredth, finished=gold.finished)
        return same_number(scaled, given) or same_number(Number(gold.value), given)
    if same_number(gold, Number(given.value * hundredth)):
        return True
    drops_unit = abs(gold.value) > 1 and not re.fullmatch(r"-?[\d,]+\.0+", gold_text.strip())
    return drops_unit and same_number(gold, given)
