r"""This file finds where a text says its final answer.

| form | what counts |
| --- | --- |
| box | the braces of the last `\boxed{}` or `\fbox{}`; a single number may go without braces |
| mark | the rest of the line after the last `####`; after a bare heading such as `#### Answer` the next line |
| phrase | without both: what follows "final answer is", "Final answer:", a line's "Answer:", a heading "Final answer" |
| tag | where none of these is: the last `<answer>...</answer>` |
| announcement | where none of these is: what the text's last sentence says the answer is (announced.py) |

A box wins, unless a mark after it stands before a bare value (`\boxed{2}`, then `#### 1`): chat models write headings
with the same mark. A heading ("#### Step 24", "#### 2. Verify") is no answer, and a number in passing is none either.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from trapo.rewards.announced import announced_answer

# The one form that the tasks and the GSM8K reader write.
ANSWER_MARK = "####"
FINAL_ANSWER = ANSWER_MARK + " {answer}"

_BOX = re.compile(r"\\f?boxed(?![A-Za-z])|\\fbox(?![A-Za-z])")
_BARE_BOX = re.compile(r"\s*(-?\d[\d,.]*\d|-?\d)")
# Words that a heading begins with and an answer does not.
_HEADINGS = (
    "step|part|case|plan|check|checking|verif\\w*|problem|question|section|solution|approach|method|analysis|note|notes|"
    "explanation|reasoning|proof|lemma|claim|theorem|example|exercise|chapter|figure|equation|summary|conclusion|"
    "observation|setup|given|goal|idea|strategy|calculation|calculations|computation|option(?!\\s+\\(?[A-J]\\b)|round|stage|phase|hint|page"
)
_HEADING = re.compile(rf"(?i)[*_\s]*(?:(?:{_HEADINGS})\b(?!\s*(?:is|=))|\d+\s*[.)]\s+[A-Za-z])")
_ANSWER_HEADING = re.compile(
    r"(?i)[*_\s]*(?:the\s+)?(?:final\s+|correct\s+)?(?:answer|result)s?(?:\s+is)?\s*[:.]?[*_\s]*"
)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_TEXT_MACRO = re.compile(r"\\(?:text\w*|mbox|mathrm|operatorname)\s*\{[^{}]*\}")
_PHRASE = re.compile(
    r"(?i)(?:\bfinal\s+answer\s*[*_]*\s*(?:is|:)|^[*_#> \t]*(?:the\s+)?(?:correct\s+)?answer\s*[*_]*\s*:)"
    r"[*_:\s]*(?P<rest>[^\n]+)",
    re.MULTILINE,
)
_HEADED = re.compile(
    r"(?im)^(?:#{1,6}|\*\*)\s*(?:\*\*)?\s*(?:the\s+)?(?:final\s+)?answer\s*:?\s*(?:\*\*)?\s*:?[ \t]*\n+\s*([^\n]+)"
)
_TAG = re.compile(r"(?is)<answer>((?:(?!<answer>).)*?)</answer>")
_BLANKS = re.compile(r"[ \t]{9,}|\s{40,}")  # patterns below try every way to share a run of them
_LONGEST, _MARKS = 20_000, 50  # characters of an answer, headings looked at from the end
_I_HOPE = re.compile(r"(?i)[.,]?\s*I hope (?:it|this) is correct.*$")


class Found(NamedTuple):
    """Holds a final answer as written. said: it stands in a sentence, not in a box, a tag or alone after a mark."""

    answer: str
    said: bool


def final_answer(text: str) -> str | None:
    """Returns the final answer as written in `text`, or None when there is none (see the module's docstring)."""
    found = find_answer(text)
    return found.answer if found is not None else None


def find_answer(text: str) -> Found | None:
    """Returns the same with how it was said."""
    # A chat model's end mark may stand in the text when it was decoded with its special tokens.
    text = re.sub(r"<\|[^|<>\n]*\|>\s*$", "", _BLANKS.sub(lambda m: m.group()[:9], text).rstrip())
    boxes = list(_BOX.finditer(text))
    mark = _marked(text, after=boxes[-1].end() if boxes else 0)
    if boxes and (mark is None or not _is_bare_value(mark)):
        box = _boxed(text, boxes[-1].end())
        return Found(box, said=False) if box is not None else None
    return Found(mark, said=_has_words(mark)) if mark is not None else _phrased(text)


def joined_boxes(text: str) -> str | None:
    r"""Returns the last boxes as one list, where a text gives its values in boxes of their own (`\boxed{1} and
    \boxed{2}`)."""
    boxes = list(_BOX.finditer(text))
    values: list[str] = []
    end_of_earlier = None
    for box in boxes:
        value = _boxed(text, box.end())
        if value is None:
            return None
        between = text[end_of_earlier : box.start()] if end_of_earlier is not None else ""
        if end_of_earlier is not None and not re.fullmatch(
            r"[\s$,;]*(?:and|or)?[\s$]*(?:[A-Za-z]\s*=)?[\s$]*", between
        ):
            values = []
        values.append(value)
        end_of_earlier = _end_of_braces(text, box.end())
    return ", ".join(values) if len(values) > 1 else None


def _marked(text: str, after: int) -> str | None:
    """Returns the answer at the last mark past `after`; marks that are headings are passed over."""
    for mark in reversed([m.start() for m in re.finditer(r"####(?!#)", text)][-_MARKS:]):
        if mark < after:
            return None
        rest = text[mark + len(ANSWER_MARK) :][:_LONGEST].split("<|", maxsplit=1)[0]
        line, _, below = rest.strip(" \t").partition("\n")
        if not _ANSWER_HEADING.fullmatch(line) and line.strip():
            answer = _plain(line)
        else:  # the next line that says something
            answer = _plain(below.strip().split("\n", 1)[0])
        if answer and not _HEADING.match(answer):
            return answer
        if answer and re.search(r"\d", answer):
            return None  # a text that ends in a heading with a number has no answer, also not an earlier one
    return None


def _plain(line: str) -> str:
    return line.strip().strip("*").strip()


def _is_bare_value(line: str) -> bool:
    """Returns whether a marked line is a value without words, which no heading is."""
    return not _has_words(line) and bool(re.search(r"[\d\\]", line))


def _has_words(line: str) -> bool:
    return _WORD.search(_TEXT_MACRO.sub("", line)) is not None


def _boxed(text: str, start: int) -> str | None:
    """Returns what is in the box whose command ends at `start`; None when it is empty or never closes."""
    end = _end_of_braces(text, start)
    if end is not None:
        return text[text.index("{", start) + 1 : end - 1].strip() or None
    bare = _BARE_BOX.match(text, start)
    return bare.group(1) if bare else None


def _end_of_braces(text: str, start: int) -> int | None:
    match = re.compile(r"\s*\{").match(text, start)
    if match is None:
        return None
    depth, i = 1, match.end()
    while i < len(text):
        if text[i] == "\\":
            i += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        i += 1
        if depth == 0:
            return i
    return None


def _phrased(text: str) -> Found | None:
    phrases = [(m.start(), m.group("rest")) for m in _PHRASE.finditer(text)]
    phrases += [(m.start(), m.group(1)) for m in _HEADED.finditer(text)]
    tags = _TAG.findall(text)
    if phrases:
        answer = _plain(_I_HOPE.sub("", max(phrases)[1]))
    elif tags:
        answer = _plain(tags[-1])
    else:
        answer = announced_answer(text) or ""
    return Found(answer, said=bool(phrases) or not tags) if answer else None
