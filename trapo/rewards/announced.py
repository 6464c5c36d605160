r"""This file finds the answer that the last sentence of a text announces: "So the answer is 24."

| part | what it may be |
| --- | --- |
| before it | nothing, "So", "Therefore,", "We see that", "I think", "He has 3 * 8, so", "Since 3 * 8 = 24," |
| announcement | "the answer is", "our answer equals", "the answer to the question is", "the correct option is" |
| after it | the answer to the end of the text, also as a displayed formula; a reason ("because ...") is cut off |

Where the text goes on after that sentence, or the sentence asks, supposes ("if"), doubts ("might"), tells words of
others or thoughts of before or goes on itself ("24, but", "24 so we"), it was in passing, and there is no answer.
"""

from __future__ import annotations

import re

_LONGEST = 2000  # characters from the end of the text in which the sentence begins

_ANNOUNCEMENT = re.compile(
    r"""(?ix) \b (?:(?:the|our|my)\s+)?
    (?: (?:(?:correct|right|required|desired|exact|numerical|only|best)\s+)* answers?
      | (?:correct|right)\s+(?:option|choice) )
    (?:\s+(?:to|of|for)\s+(?:the|this|our)\s+(?:(?:original|given|whole)\s+)?(?:problem|question|exercise|puzzle))?
    (?:\s*,?\s+(?: in\s+(?:(?:its|the)\s+)?[a-z]{1,15}(?:\s+(?:form|terms|notation))?
      | (?:rounded|expressed|written)\s+[a-z\s]{1,40}? | \((?:in|as)\s[a-z\s]{1,30}\) | here )\s*,?)?
    [\s*_]* (?: (?:is|are|equals|(?:must|will|has\s+to|turns\s+out\s+to)\s+be|comes\s+(?:out\s+)?to) \b | [:=] )
    [\s*_:]* (?:(?:thus|therefore|hence|then|indeed|simply|just)\b[\s,:]*)?"""
)
# A period of an abbreviation ends no sentence, nor does the one in "C. 24"; a line ends one unless its words run on.
_END = r"(?:(?<![.\\])(?<!\b(?:sq|cu|ft|vs))(?<!\bapprox)[.?]|!(?=[*\"')$]*\s+[A-Z])|(?:\.\.\.|…)(?=\s+[A-Z]))"
_BREAK = re.compile(
    rf"{_END}[*\"')$]*\s+|(?<=[\w$)]\.)(?=[A-Z][a-z])|</?\w+>\s*|\n\s*\n|(?<![,A-Za-z])\n|(?<=[A-Za-z])\n(?![a-z])"
)
_LEADS = re.compile(
    r"""(?ix) [\s*_\#>-]* (?:
    (?: so|thus|hence|therefore|and|then|now|finally|consequently|accordingly|overall|ultimately
      | clearly|obviously|evidently|altogether|all\s+in\s+all|in\s+other\s+words|of\s+course|in\s+my\s+(?:opinion|view)
      | in\s+(?:conclusion|summary|short|total|the\s+end) | as\s+a\s+result | to\s+(?:conclude|sum\s+up|summari[sz]e)
      | (?:conclusion|solution|summary|result|step\s+\d+|a)(?=\s*[*_]*:)
      | (?:yes|no|ok|okay|actually|wait|right)(?=\s*[,!.])
      | we\s+(?:can\s+|now\s+)?(?:conclude|find|see|get|have|know|deduce)(?:\s+that)?
      | (?:this|that|which|it)\s+(?:means|implies|shows|follows)(?:\s+that)? | \\therefore | ∴ | [=-]> | ⇒ )
    [\s,:;.!*_]* )*"""
)
_CLAUSE = re.compile(
    r"(?is)(?:.*(?<!\bnot\s)\b(?:so|thus|hence|therefore|means|implies)(?:\s+that)?[\s,:]*|.*,\s*and\s+"
    r"|[\s*_]*(?:so\s+|and\s+)?(?:since|because|as|given|using|by|after|from|based\s+on|\w+ing|rounded)\b.*,\s*)"
)
# What the text itself holds now; "I thought" and "they think" say what it or others held.
_OPINION = re.compile(
    r"""(?x) (?:^|(?<=[\s,:*_])) (?:I|[Ww]e) (?:
      [ ](?:(?:do|really|now|strongly|still)[ ])?(?:think|believe|reckon)
      | (?:[ ]am|[ ]are|['’]m|['’]re)[ ](?:(?:very|quite|fairly|pretty)[ ])?(?:sure|certain|confident|convinced)
    ) (?:[ ]that)? ,? [ *_]*\Z"""
)
# Words that make a clause or an answer a condition, a guess or somebody's words.
_DOUBT = re.compile(
    r"(?i)\b(?:if|unless|whether|suppos\w*|assum\w*|imagin\w*|pretend\w*|maybe|perhaps|possibly|probably|might|could|"
    r"would|think\w*|thought|believ\w*|guess\w*|say|says|said|saying|claim\w*|wrote|writes|unsure|not sure|wonder\w*)\b"
)
_GOES_ON = re.compile(r"(?i)\b(?:but|however|though|although|so|then|until|before|yet|wait|while|according|when)\b")
_OPEN_END = re.compile(r"(?i)[?,]$|\b(?:and|or)$")  # a question, or cut short
_REASON = re.compile(r"(?is)(?:,?\s+\(?(?:because|since)|,\s+as)\b.*")
_TEXT_MACRO = re.compile(r"\\(?:text\w*|mbox|mathrm)\s*\{[^{}]*\}")
_DISPLAYED = re.compile(r"(?s)(\$\$|\\\[|\$|\\\()\s*((?:(?!\$\$|\\\]).)+?)\s*(\$\$|\\\]|\$|\\\))\s*\.?")
_HOPE_OR_MARKS = re.compile(r"(?i)(?:[.,]?\s*I hope (?:it|this) is correct\.?)?[\s∎■-➿\U0001f300-\U0001faff\ufe0f]*\Z")


def announced_answer(text: str) -> str | None:
    """Returns what the last sentence of `text` announces as the answer; None where it announces none."""
    end = text[-_LONGEST:]
    found = list(_ANNOUNCEMENT.finditer(end))
    if not found:
        return None
    last = found[-1]
    starts = [0] if len(text) <= _LONGEST else []
    starts += [m.end() for m in _BREAK.finditer(end) if m.end() <= last.start()]
    if not starts or not _leads(end[starts[-1] : last.start()]):
        return None
    return _value(end[last.end() :])


def _leads(clause: str) -> bool:
    """Returns whether what stands before an announcement leaves it an assertion of the text's own."""
    clause = _OPINION.sub("", clause)
    return bool(_LEADS.fullmatch(clause)) or bool(_CLAUSE.fullmatch(clause) and not _DOUBT.search(clause))


def _value(rest: str) -> str | None:
    """Returns the answer in the rest of an announcing sentence; None where the text goes on, asks or doubts."""
    rest = _HOPE_OR_MARKS.sub("", rest, count=1).strip()
    if (formula := _DISPLAYED.fullmatch(rest)) is not None:
        rest = " ".join(formula.group(2).split())
    rest = _REASON.sub("", rest).strip().strip("*_").strip()
    rest = re.sub(r"(?<=[$*])!+$|(?<=[A-Za-z]{3})!+$", "", rest)
    said = _TEXT_MACRO.sub("", re.sub(r"^[*(]*[A-J][*)]*[.:]\s", "", rest))
    if _BREAK.search(said) or _OPEN_END.search(rest) or _DOUBT.search(said) or _GOES_ON.search(said):
        return None
    return rest or None
