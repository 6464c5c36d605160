r"""This file knows the words around a value: units and sentences that change nothing, and words that change everything.

| words | what becomes of them |
| --- | --- |
| units and things counted ("24 apples", "15 cm^2") | dropped; but a unit that the gold names must not be another one |
| a sentence around one value ("She makes 18.") | dropped |
| multipliers ("24 million", "2 dozen") | the value is multiplied |
| negations, comparisons, guesses ("not 24", "more than 24", "maybe 24") | no value |
| names of operations ("half of 24", "24 squared"), headings ("Step 24") | no value |
"""

from __future__ import annotations

import re
from fractions import Fraction

from trapo.rewards.dress import LETTER_UNITS

WORD = re.compile(r"(?<![\\A-Za-z_^])[A-Za-z]{2,}(?:'[a-z]+)?")
MULTIPLIERS = {
    "dozen": 12, "dozens": 12, "hundred": 100, "hundreds": 100, "thousand": 10**3, "thousands": 10**3,
    "million": 10**6, "millions": 10**6, "mn": 10**6, "billion": 10**9, "billions": 10**9, "bn": 10**9,
    "trillion": 10**12, "trillions": 10**12,
}  # fmt: skip
_NO_VALUE_WORDS = """
    not no never none nor neither isn't isnt aren't cannot can't doesn't don't wasn't without except excluding
    impossible undefined unknown unclear wrong incorrect false

    more less than least most fewer greater larger smaller bigger over under above below exceeds exceeding beyond
    between within maximum minimum max min bounds bound almost nearly close near upto

    maybe perhaps possibly probably might guess if unless

    half halves third thirds quarter quarters fourth fifth sixth tenth tenths hundredth hundredths thousandths double
    twice thrice triple squared cubed root roots times plus minus divided multiplied sum product quotient modulo mod
    power factorial choose sqrt log ln exp score gross pairs negative

    step steps part case chapter section problem question example exercise figure equation lemma theorem page note stage
    phase round item line method approach option version hint check plan
"""  # negations; comparisons; guesses; operations; parts of a text
_NO_VALUE = frozenset(_NO_VALUE_WORDS.split())
# "at least" and "up to" begin with small words that may stand in any sentence.
_NO_VALUE_PHRASES = re.compile(
    r"(?i)\b(?:up to|at least|at most|out of|one of|some of|all but)\b"
    # What a number of another one's making is said of: "a multiple of 24", "divisible by 24", "the value at n = 24".
    r"|\b(?:multiples?|divisors?|factors?|logarithm|set|list|sequence)\s+of\s+-?[\d\\]|\bdivisible\s+by\b"
    r"|\bdegree\s+-?\d|\b(?:at|with|using)\s+[A-Za-z]\s*="
)
_LESS_OR_MORE_NOUN = re.compile(
    r"(?i)^\s*-?[\d.,/{}\\ ]+(?:frac[\d{}]+)?\s*(?:more|less|fewer)\b(?!\s*than)(?:\s+[a-z]+)*$"
)

_UNIT_POWER = r"(?:\s*\^\s*\{?\s*-?[23]\s*\}?)"
_COMPOUND = re.compile(
    rf"(?:/\s*)?(?<![\\A-Za-z_^{{])(?:o'clock|[A-Za-z]{{2,}}(?:'[a-z]+)?)(?:-[A-Za-z]+)*\.?{_UNIT_POWER}?"
    rf"(?:\s*(?:/|\\cdot)\s*[A-Za-z]+{_UNIT_POWER}?)*"
)
_LETTER_PER = re.compile(rf"(?<=[\d}}) ])\s*(?:m|s|g|J|N|W|K|L|kg|km){_UNIT_POWER}?\s*/\s*[A-Za-z]+{_UNIT_POWER}?\s*$")
# A letter behind a number and a blank is a unit; "4x" and "4 x" are products.
LETTER_UNIT = re.compile(
    rf"(?<=[\d}})])\s+(?P<letter>[msghLJNWVKCF])(?![A-Za-z])(?:{_UNIT_POWER})?(?:\s*/\s*[A-Za-z]+{_UNIT_POWER}?)?\s*$"
)
_ARTICLE = re.compile(r"(?<![\\A-Za-z])[aAI](?=\s+[A-Za-z]{2})")

# Units that the gold may name, in one spelling; a known unit of another name is another value.
_UNITS = {
    name: names.split()[0]
    for names in (
        "in inch inches", "ft foot feet", "yd yard yards", "mi mile miles", "metres meter meters metre",
        "mm millimeter millimeters millimetre millimetres", "cm centimeter centimeters centimetre centimetres",
        "km kilometer kilometers kilometre kilometres",
        "degrees degree deg", "radians radian rad", "cents cent", "dollars dollar usd", "seconds second sec secs",
        "minutes minute min mins", "hours hour hr hrs", "days day", "weeks week", "months month", "years year yr yrs",
        "grams gram", "kg kilogram kilograms", "lb lbs pound pounds", "oz ounce ounces", "litres litre liters liter",
        "ml milliliter milliliters millilitre millilitres",
    )
    for name in names.split()
}  # fmt: skip


def has_words(text: str) -> bool:
    return WORD.search(text) is not None


def unit_of(text: str) -> str | None:
    """Returns the unit that `text` names, in one spelling; None where there is none that is known."""
    found = {_UNITS[w] for w in (m.group().lower() for m in WORD.finditer(text)) if w in _UNITS}
    if (letter := LETTER_UNIT.search(text)) is not None:
        found.add(LETTER_UNITS[letter.group("letter")])
    return found.pop() if len(found) == 1 else None


def units_differ(gold: str, given: str) -> bool:
    a, b = unit_of(gold), unit_of(given)
    return a is not None and b is not None and a != b


def refuses_value(text: str) -> bool:
    """Returns whether a word in `text` says that its number is not the answer."""
    if _LESS_OR_MORE_NOUN.match(text):  # "24 more apples": a count, not a comparison
        return False
    return bool(_NO_VALUE_PHRASES.search(text)) or any(m.group().lower() in _NO_VALUE for m in WORD.finditer(text))


def without_words(text: str) -> tuple[str, Fraction] | None:
    """Returns the one value that words stand around, and what a multiplier among them makes of it; None: several, or
    none."""
    times = Fraction(1)
    for match in WORD.finditer(text):
        times *= MULTIPLIERS.get(match.group().lower(), 1)
    bare = _ARTICLE.sub("\x00", text)
    bare = _COMPOUND.sub("\x00", bare)
    bare = _LETTER_PER.sub("\x00", bare)
    bare = LETTER_UNIT.sub("\x00", bare)
    bare = re.sub(r"\(\s*\x00[\s\x00]*\)", "\x00", bare)
    parts = [part.strip(" ,;:'\"").rstrip(".").strip() for part in bare.split("\x00")]
    values = list(dict.fromkeys(part for part in parts if part))
    return (values[0], times) if len(values) == 1 else None
