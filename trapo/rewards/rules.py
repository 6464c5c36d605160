r"""This file decides whether a given answer is the gold one: `RULES`, tried in order until one decides.

Every rule reads both answers undressed (dress.py). `docs/rewards.md` has examples of each; `trapo grade` shows which
one decided. Adding one: a function (Answer, Answer) -> bool, or None to leave it to the next, and its line in `RULES`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from trapo.rewards import algebra, structure, units
from trapo.rewards.dress import undress
from trapo.rewards.extract import find_answer, joined_boxes
from trapo.rewards.numbers import Number, percent_agrees, read_number


@dataclass(frozen=True)
class Grade:
    """Is one text's verdict. given: its final answer as written, None where there is none; rule: which one decided."""

    value: float
    rule: str
    given: str | None


class Answer:
    """Is one answer, undressed, with what rules ask of it. said: it stands in a sentence, which a mark may end."""

    def __init__(self, raw: str, *, said: bool = False) -> None:
        self.raw = raw
        self.said = said
        self.text = structure.without_outer_brackets(undress(raw))
        self.key = _key(self.text)

    @functools.cached_property
    def number(self) -> Number | None:
        return read_number(self.text)

    @functools.cached_property
    def items(self) -> list[str]:
        return structure.items(self.text) if self.number is None else [self.text]

    @functools.cached_property
    def sides(self) -> list[str]:
        return structure.sides(self.text)

    @functools.cached_property
    def words(self) -> list[str]:
        return [m.group() for m in units.WORD.finditer(self.text)]

    @functools.cached_property
    def value_of_unit(self) -> str | None:
        """Returns the value in front of a unit ("5.4 cents"), where the answer is just that."""
        if not self.words or not _BEGINS_AS_VALUE.match(self.text) or units.refuses_value(self.text):
            return None
        found = units.without_words(self.text)
        return found[0] if found is not None and found[1] == 1 and self.text.startswith(found[0]) else None

    @functools.cached_property
    def is_text(self) -> bool:
        """Returns whether it is words and no formula, so that only the same words are the same answer."""
        if not self.words or self.value_of_unit is not None:
            return False
        if len(self.items) > 1 and all(_BEGINS_AS_VALUE.match(item) for item in self.items):
            return False  # values with units
        return not re.search(r"[=+^<>\\]|\d\s*[-/(]|[-/]\s*\d", self.text)


_BEGINS_AS_VALUE = re.compile(r"[-+(]?\s*[\d\\.]")


def _key(text: str) -> str:
    """Returns a spelling for comparison as text: no case, articles, or blanks (but between digits); `{x}` as `x`."""
    text = re.sub(r"(?i)(?<![A-Za-z\\])(?:the|an?)\s+(?=[A-Za-z]{2})", "", text)
    text = re.sub(r"(?<!\\)\{\s*([A-Za-z0-9])\s*\}", r"\1", text)
    text = re.sub(r"(?<=\d)\s+(?=\d)", "\x00", text)
    return re.sub(r"[\s\"`*]|\.+$|(?<=[A-Za-z]{3})!+$", "", text).casefold()


@functools.lru_cache(maxsize=4096)
def _gold(answer: str) -> Answer:
    return Answer(answer)


def grade(text: str, answer: str) -> Grade:
    """Returns the verdict on a whole text: its final answer against `answer`."""
    if (found := find_answer(text)) is None:
        return Grade(0.0, "no final answer", None)
    given = found.answer
    right, rule = decide(_gold(answer), Answer(given, said=found.said))
    if not right and len(_gold(answer).items) > 1 and (several := joined_boxes(text)) is not None:
        joined, joined_rule = decide(_gold(answer), Answer(several))
        if joined:
            return Grade(1.0, joined_rule, several)
    return Grade(float(right), rule, given)


def decide(gold: Answer, given: Answer) -> tuple[bool, str]:
    """Returns (whether they are one answer, the rule that said so)."""
    if not given.text:
        return False, "no final answer"
    for rule in RULES:
        verdict = rule.decide(gold, given)
        if verdict is not None:
            return verdict, rule.name
    return False, "different"


def _equal(gold: str, given: str) -> bool:
    return decide(_gold(gold), Answer(given))[0]


# ---------------------------------------------------------------------------------------------------- the rules


def _same_text(gold: Answer, given: Answer) -> bool | None:
    return True if gold.key == given.key and gold.key else None


def _exclamation(gold: Answer, given: Answer) -> bool | None:
    bare = given.text.rstrip("! ")
    return True if given.said and bare and given.text.endswith("!") and _equal(gold.text, bare) else None


_CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\s+)?(?:\(\s*([A-Ja-j])\s*\)|([A-J])\s*[).:](?=\s|$)|([A-J])$)(?:\s*[:.])?(.*)",
    re.I | re.S,
)


def _choice_letter(gold: Answer, given: Answer) -> bool | None:
    wanted, found = _CHOICE.fullmatch(gold.text), _CHOICE.fullmatch(given.text)
    if found is None:
        return None
    letter, rest = next(g for g in found.groups()[:3] if g), found.group(4).strip()
    if re.match(r"[+*/^=_,;!]|-(?!\S)", rest) or (rest.startswith("-") and not found.group(4)[0].isspace()):
        return None
    if wanted is not None:
        if re.search(r"(?i)(?:\bor|\band|,)\s*\(?[A-J]\b", rest):
            return False
        same = letter.upper() == next(g for g in wanted.groups()[:3] if g).upper()
        if not wanted.group(4):
            return same if rest or same or gold.raw != gold.text else None
        return same and (not rest or _equal(wanted.group(4), rest))
    return _equal(gold.text, rest) if rest and "(" + letter not in gold.text else None


def _says_no_value(gold: Answer, given: Answer) -> bool | None:
    if gold.is_text:
        return None
    extra = {w.lower() for w in given.words} - {w.lower() for w in gold.words}
    if extra and units.refuses_value(given.text) and not units.refuses_value(gold.text):
        return False
    return None


def _text(gold: Answer, given: Answer) -> bool | None:
    if not gold.is_text:
        return None
    if len(gold.items) > 1 and len(gold.items) == len(given.items):
        return structure.same_members(gold.items, given.items, lambda a, b: _key(a) == _key(b))
    return False


def _list(gold: Answer, given: Answer) -> bool | None:
    wanted, found = _members(gold), _members(given)
    if len(wanted[0]) != len(found[0]):  # 135,189,216 may be a number, or a list without blanks
        wanted, found = _regrouped(gold, wanted, found), _regrouped(given, found, wanted)
    if all(len(reading) == 1 for reading in wanted + found):
        return None
    if any(structure.same_members(a, b, _equal) for a in wanted for b in found):
        return not _names_disagree(wanted[0], found[0])
    if (pair := structure.brackets(gold.text)) is not None and pair[0] in "(" and pair[2] == ")":
        inside = structure.items(pair[1], grouped=False)
        return len(inside) > 1 and "\\infty" not in pair[1] and _in_order(inside, given.items)
    return False


def _regrouped(answer: Answer, own: list[list[str]], other: list[list[str]]) -> list[list[str]]:
    parts = structure.items(answer.text, grouped=False)
    return [*own, parts] if len(parts) == len(other[0]) > 1 else own


def _members(answer: Answer) -> list[list[str]]:
    """Returns the members of a list or of a set in braces, in each way of reading both signs."""
    text, name = answer.text, ""
    if len(answer.items) == 1 and len(answer.sides) == 2 and structure.is_name(answer.sides[0]):
        name, text = answer.sides
    pair = structure.brackets(text)
    inside = structure.items(pair[1], grouped=False) if pair is not None else []
    if pair is not None and (pair[0] == "{" or (pair[0] == "[" and pair[2] == "]" and len(inside) > 2)):
        parts = inside
    elif name:
        parts = [text]
    else:
        parts = answer.items
    readings: list[list[str]] = [[]]
    for part in parts:
        readings = [reading + choice for reading in readings for choice in structure.both_signs(part)][:8]
    return readings


def _names_disagree(gold: list[str], given: list[str]) -> bool:
    """Returns whether x = 1, y = 2 is answered with x = 2, y = 1, or in another order without names."""
    a, b = [structure.sides(part) for part in gold], [structure.sides(part) for part in given]
    named = [side[0] for side in a if len(side) == 2]
    if len(set(map(_key, named))) < 2 or len(named) != len(gold):
        return False
    if all(len(side) == 1 for side in b):
        return not _in_order([side[-1] for side in a], [side[-1] for side in b])
    return False


def _in_order(gold: list[str], given: list[str]) -> bool:
    return len(gold) == len(given) and all(_equal(a, b) for a, b in zip(gold, given, strict=True))


def _membership(gold: Answer, given: Answer) -> bool | None:
    r"""Returns the interval of a membership: `x \in [-2,7]` says what `[-2,7]` says."""
    pattern = re.compile(r"([^,=]{1,20}?)\\in(?![A-Za-z])(.+)", re.S)
    a, b = pattern.fullmatch(gold.text), pattern.fullmatch(given.text)
    if a is None and b is None:
        return None
    return _equal(a.group(2).strip() if a else gold.text, b.group(2).strip() if b else given.text)


def _equation(gold: Answer, given: Answer) -> bool | None:
    a, b = gold.sides, given.sides
    if len(a) < 2 and len(b) < 2:
        return None
    if re.search(r"\\ne(?![A-Za-z])", given.text) or _ends_open(given.text):
        return False
    if len(a) < 2:
        if gold.number is not None and structure.is_unsolved(b[0]):
            return False  # 3x = 24 is on its way
        if _equal(gold.text, b[-1]):
            return True
        named_last = structure.is_name(b[-1]) or (
            algebra.is_numeric(b[-1]) and algebra.same_expression(gold.text, b[-1])
        )
        return len(b) == 2 and named_last and _equal(gold.text, b[0])
    if len(b) < 2:
        if all(re.fullmatch("[A-Z]{2,}", side) for side in a):
            return False  # MR = SRMC: the relation is the answer
        return structure.is_name(a[0]) and _equal(a[-1], given.text)
    if structure.is_name(a[0]) and structure.is_name(b[0]):
        if structure.same_name(a[0], b[0]) and _equal(a[-1], _renamed(b[-1], b[0], a[0])):
            return True
        if structure.same_name(a[0], b[0]) and read_number(a[-1]) is not None:
            return False
    if structure.is_name(a[0]) and _key(a[0]) == _key(b[-1]) and _equal(a[-1], b[0]):
        return True
    return algebra.same_equation((a[0], a[-1]), (b[0], b[-1]))


def _ends_open(text: str) -> bool:
    return text.endswith("=") or text.startswith("=")


def _renamed(text: str, name: str, wanted: str) -> str:
    """Returns `text`, the function of one letter, in the letter that the gold uses: f(n) = 2n is f(x) = 2x."""
    old, new = structure.argument(name), structure.argument(wanted)
    if old is None or new is None or old == new:
        return text
    return re.sub(rf"(?<![A-Za-z\\]){old}(?![A-Za-z])", new, text)


def _inequality(gold: Answer, given: Answer) -> bool | None:
    a, b = structure.interval_of(gold.text), structure.interval_of(given.text)
    if a is None and b is None:
        return None
    if a is None and structure.brackets(gold.text) is None and "\\cup" not in gold.text:
        return False if gold.number is not None else None
    return _equal(a or gold.text, b or given.text)


def _approximation(gold: Answer, given: Answer) -> bool | None:
    parts = structure.approximations(given.text)
    if len(parts) == 1 and parts[0] != given.text:  # "\approx 24"
        return _equal(gold.text, parts[0])
    return any(_equal(gold.text, part) for part in (parts[0], parts[-1])) if len(parts) > 1 else None


def _union(gold: Answer, given: Answer) -> bool | None:
    a, b = structure.union(gold.text), structure.union(given.text)
    if len(a) == 1 and len(b) == 1:
        return None
    return structure.same_members(a, b, _equal)


def _bracketed(gold: Answer, given: Answer) -> bool | None:
    a, b = structure.brackets(gold.text), structure.brackets(given.text)
    if (
        b is not None
        and len(structure.items(b[1])) == 1
        and (a is None or len(structure.items(a[1])) > 1 or a[0] != b[0])
    ):
        return _equal(gold.text, structure.items(b[1])[0])
    if a is not None and len(structure.items(a[1])) == 1 and (b is None or a[0] != b[0]):
        return _equal(structure.items(a[1])[0], given.text)
    if a is None or b is None:
        return None
    inside_a, inside_b = (structure.items(pair[1], grouped=False) for pair in (a, b))
    if len(inside_a) < 2 and len(inside_b) < 2:
        return None
    return _closings(a, inside_a) == _closings(b, inside_b) and _in_order(inside_a, inside_b)


def _closings(pair: tuple[str, str, str], inside: list[str]) -> tuple[str, str]:
    """Returns the kinds of the two brackets; an end at infinity is open however it is written."""
    opening = "(" if inside and "\\infty" in inside[0] else pair[0]
    return opening, ")" if inside and "\\infty" in inside[-1] else pair[2]


def _matrix(gold: Answer, given: Answer) -> bool | None:
    a, b = structure.matrix(gold.text), structure.matrix(given.text)
    if a is None or b is None:
        if (vector := structure.vector(a or b)) is None:
            return None
        tuple_ = structure.brackets(given.text if b is None else gold.text)
        if tuple_ is None or tuple_[0] != "(" or tuple_[2] != ")":
            return None
        inside = structure.items(tuple_[1], grouped=False)
        return _in_order(vector, inside) if b is None else _in_order(inside, vector)
    return [len(row) for row in a] == [len(row) for row in b] and all(map(_in_order, a, b))


def _number(gold: Answer, given: Answer) -> bool | None:
    if gold.number is None or given.number is None:
        return None
    if not given.number.finished and gold.number.value.denominator == 1 and not given.number.percent:
        return False  # 48/2 is on its way to 24
    return percent_agrees(gold.number, given.number, gold.raw)


def _words_around(gold: Answer, given: Answer) -> bool | None:
    bare_gold = gold.value_of_unit
    if not given.words and (verdict := _letter_unit(gold, given)) is not None:
        return verdict
    if not _foreign_words(gold, given) and bare_gold is None:
        return None
    if units.units_differ(gold.text, given.text):
        return False
    found = units.without_words(given.text) if given.words else (given.text, Fraction(1))
    if found is None:
        return False
    value, times = found
    if not value or value == given.text == gold.text:
        return False
    wanted = bare_gold if bare_gold is not None else gold.text
    if times != 1:
        number, target = read_number(value), read_number(wanted)
        return number is not None and target is not None and number.value * times == target.value
    return _equal(wanted, value) if (wanted, value) != (gold.text, given.text) else None


def _foreign_words(gold: Answer, given: Answer) -> list[str]:
    """Returns the words of the given answer that are no products of the gold's letters."""
    letters = set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", gold.text))) if gold.number is None else set()
    letters |= {letter.swapcase() for letter in letters}  # constants may change their case
    return [word for word in given.words if word not in gold.words and not set(word) <= letters]


def _letter_unit(gold: Answer, given: Answer) -> bool | None:
    wanted = gold.value_of_unit or gold.text
    bare = units.LETTER_UNIT.sub("", given.text)
    if bare == given.text or read_number(wanted) is None:
        return None
    return not units.units_differ(gold.text, given.text) and _equal(wanted, bare)


def _base(gold: Answer, given: Answer) -> bool | None:
    based = re.compile(r"[\dA-F]+_\d+")
    return False if based.fullmatch(gold.key.upper()) or based.fullmatch(given.key.upper()) else None


_OPERATOR = re.compile(r"[\d)}!]\s*(?:[-+*/]|\\(?:times|cdot)(?![A-Za-z]))\s*[\d\\({]")


def _unfinished(gold: Answer, given: Answer) -> bool | None:
    if gold.number is None or not algebra.is_numeric(given.text):
        return None
    return False if _OPERATOR.search(given.text) else None


def _algebra(gold: Answer, given: Answer) -> bool | None:
    if re.search(r"\d\s+\d", given.text) or re.search(r"\\(?:ldots|cdots|dots)", given.text):
        return False  # "25 24" would be read as a product
    if ":" in given.text:
        return False
    if given.number is not None and algebra.close_to_decimal(gold.text, given.number):
        return True
    if gold.number is not None and algebra.close_to_decimal(given.text, gold.number):
        return True
    return algebra.same_expression(gold.text, given.text)


@dataclass(frozen=True)
class Rule:
    """Decides on some answers. name: what `trapo grade` shows. accepts: one line of documentation."""

    name: str
    decide: Callable[[Answer, Answer], bool | None]
    accepts: str


RULES: tuple[Rule, ...] = (
    Rule("same text", _same_text, "the gold verbatim; case, blanks, braces, text macros and articles do not matter"),
    Rule("exclamation", _exclamation, '24 in "The answer is 24!"; a factorial in a box and alone after ####'),
    Rule("choice letter", _choice_letter, "C, (C), C. and (C) 24 for the gold (C); (C) 24 for the gold 24"),
    Rule("no value", _says_no_value, "nothing: not 24, more than 24, half of 24, Step 24"),
    Rule("text", _text, "for a gold of words the same words; lists of words in any order"),
    Rule("membership", _membership, r"x \in I for I"),
    Rule("inequality", _inequality, "inequalities in one name as the intervals that they mean"),
    Rule(
        "list",
        _list,
        r"the same members in any order, by commas, and, or, \{\}, \pm; names only where the gold has them",
    ),
    Rule("approximation", _approximation, r"24 in \approx 24, and either side of a \approx b"),
    Rule(
        "equation",
        _equation,
        "the last side where the gold has no name; else the same name, or the equation multiplied through",
    ),
    Rule("union", _union, "the same parts in any order"),
    Rule(
        "brackets",
        _bracketed,
        "tuples and intervals: the same ends or members in order, the same brackets; (24) for 24",
    ),
    Rule("matrix", _matrix, "the same cells, whatever the brackets; (1, 2) for a column or a row of them"),
    Rule("base", _base, "52_8 for 52_{8}, 52_{eight} or 52 base 8; another base, or none, is another number"),
    Rule(
        "number",
        _number,
        "the same value in any spelling; a dropped percent sign; a decimal of six places, rounded or cut",
    ),
    Rule("words around", _words_around, "one value with a unit or a sentence around it; multipliers multiply"),
    Rule("unfinished", _unfinished, "nothing: 12 * 2 for 24"),
    Rule(
        "algebra",
        _algebra,
        "expressions that agree to 50 digits at several points; what math-verify says of sets and logic",
    ),
)
