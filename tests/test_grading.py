"""The math reward: tables of right and wrong answers, and the golds of the real problem sets in every usual dress."""

import json
import random
import re
import time
from pathlib import Path

import pytest

from trapo.data.loading import load_problems
from trapo.rewards import grade, math_reward
from trapo.rewards.dress import undress
from trapo.rewards.numbers import read_number
from trapo.rewards.rules import RULES

CASES = [json.loads(line) for line in (Path(__file__).parent / "grading_cases.jsonl").read_text("utf-8").splitlines()]
SHARED = Path(__file__).resolve().parents[2] / "shared"
SETS = {
    "aime.parquet": 29,
    "aime25.parquet": 30,
    "amc.parquet": 45,
    "math.parquet": 301,
    "minerva.parquet": 255,
    "olympiad_bench.parquet": 490,
    "gsm8k-test.jsonl": 250,
}


@pytest.mark.parametrize("kind", sorted({c["class"] for c in CASES if c["right"]}))
def test_answers_that_a_reader_would_accept_earn_one(kind):
    missed = [c for c in CASES if c["class"] == kind and c["right"] and not math_reward(c["text"], c["gold"])]
    assert not missed


@pytest.mark.parametrize("kind", sorted({c["class"] for c in CASES if not c["right"]}))
def test_answers_that_a_reader_would_not_accept_earn_nothing(kind):
    taken = [c for c in CASES if c["class"] == kind and not c["right"] and math_reward(c["text"], c["gold"])]
    assert not taken


def test_hand_graded_pairs_are_graded_as_by_hand():
    file = SHARED / "bugs" / "math_pairs.jsonl"
    if not file.exists():
        pytest.skip(f"no {file}")
    pairs = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    wrong = [p for p in pairs if math_reward(p["text"], p["gold"]) != p["right"]]
    right = sum(p["right"] for p in pairs)
    assert sum(p["right"] for p in wrong) <= 0.04 * right
    assert sum(not p["right"] for p in wrong) <= 0.01 * (len(pairs) - right)


# ------------------------------------------------------------------------------------------- the real sets


def plain(gold):
    """Without what stands for display: dollars and text macros."""
    return re.sub(r"\\(?:text|mbox)\s*\{([^{}]*)\}", r"\1", re.sub(r"(?<!\\)\$", "", gold))


# Dresses of any gold, and of a gold that is a plain number.
DRESSES = {
    "box": "so $\\boxed{{{g}}}$.",
    "fbox": "so \\fbox{{{g}}}",
    "mark": "so\n#### {g}",
    "bold mark": "#### **{g}**",
    "heading": "#### Answer\n{g}",
    "announced": "#### The answer is {g}.",
    "boxed announcement": "\\boxed{{\\text{{Answer: }}{g}}}",
    "check after it": "so \\boxed{{{g}}}.\n\n#### Check\nIt fits.",
    "last sentence": "We add them. So the answer is {g}.",
    "last sentence in bold": "**The answer is ${p}$.**",
    "phrase": "Final Answer: The final answer is ${p}$. I hope it is correct.",
    "displayed": "\\[\\boxed{{\\displaystyle {p}}}\\]",
    "left and right": "\\boxed{{\\left({p}\\right)}}",
}
OF_NUMBERS = {
    "money": "\\boxed{{\\${g}}}",
    "money in words": "#### ${g} per week",
    "sentence": "#### She makes ${g}.",
    "unit": "\\boxed{{{g}\\text{{ cm}}^2}}",
    "things": "#### {g} apples",
    "choice": "\\boxed{{(C) {g}}}",
    "named": "\\boxed{{x={g}}}",
    "percent": "#### {g}%",
    "zeros": "#### {g}.00",
}
NEIGHBOURS = {
    "one more": "\\boxed{{{p}+1}}",
    "another member": "\\boxed{{{p}, 77717}}",
    "cut short": "so \\boxed{{{g}",
    "in passing": "So {g} it is.",
    "negated": "#### not {p}",
    "announced and left": "The answer is {g}. Now 1 + 1 = 2 is added.",
    "announced in a condition": "If the answer is {g}, then it fits.",
    "asked": "Is it so that the answer is {g}?",
    "cited": "Tom says the answer is {g}.",
}
NEIGHBOURS_OF_NUMBERS = {
    "heading": "### Plan\n#### Step {g}\nWe go on",
    "numbered heading": "#### {g}. Check the result",
    "root": "#### sqrt({g})",
    "pi": "#### {g} pi",
    "dozen": "#### {g} dozen",
    "million": "#### {g} million",
    "more": "#### more than {g}",
    "logarithm": "#### log {g}",
    "letter": "\\boxed{{{g}x}}",
    "square": "\\boxed{{{g}^2}}",
    "factorial": "\\boxed{{{g}!}}",
    "negative": "\\boxed{{-{g}}}",
    "half": "#### half of {g}",
    "choice of values": "#### {g} or 77717",
    "inequality": "\\boxed{{x \\ge {g}}}",
    "not equal": "\\boxed{{\\neq {g}}}",
    "unfinished": "#### {g} + 1",
    "longer": "#### 9{g}",
}


def golds(file):
    path = SHARED / "data" / file
    if not path.exists():
        pytest.skip(f"no {path}")
    return list(dict.fromkeys(p.answer for p in load_problems(path)))


def sampled(answers, count):
    return answers if len(answers) <= count else random.Random(0).sample(answers, count)


def wrongly_graded(answers, of_any, of_numbers, expected):
    found = []
    for gold in answers:
        bare = re.fullmatch(r"\d+", gold) is not None and int(gold) > 2
        for name, form in {**of_any, **(of_numbers if bare else {})}.items():
            if name == "left and right" and ("," in gold or "=" in gold or re.search("[a-z]{2}", plain(gold))):
                continue
            text = form.format(g=gold, p=plain(gold))
            if math_reward(text, gold) != expected:
                found.append((name, gold, grade(text, gold)))
    return found


@pytest.mark.parametrize("count", [12, pytest.param(10**6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("file", SETS)
def test_every_gold_of_the_real_sets_earns_one_in_every_usual_dress(file, count):
    assert not wrongly_graded(sampled(golds(file), count), DRESSES, OF_NUMBERS, 1.0)


@pytest.mark.parametrize("count", [12, pytest.param(10**6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("file", SETS)
def test_every_gold_of_the_real_sets_with_a_wrong_neighbour_earns_nothing(file, count):
    assert not wrongly_graded(sampled(golds(file), count), NEIGHBOURS, NEIGHBOURS_OF_NUMBERS, 0.0)


@pytest.mark.parametrize("file", SETS)
def test_no_gold_earns_anything_for_another_one_of_its_set(file):
    answers = sampled(golds(file), 40)
    for gold, other in zip(answers, answers[1:] + answers[:1], strict=True):
        if read_number(undress(gold)) != read_number(undress(other)) or read_number(undress(gold)) is None:
            assert math_reward(f"\\boxed{{{other}}}", gold) == 0.0, (gold, other)


# ------------------------------------------------------------------------------------------------- the rules


def test_each_rule_decides_a_case_and_a_grade_names_it():
    decided = {grade(c["text"], c["gold"]).rule for c in CASES}
    assert {rule.name for rule in RULES} <= decided
    assert len({rule.name for rule in RULES}) == len(RULES)


def test_undressing_twice_changes_nothing_more():
    for case in CASES:
        once = undress(case["gold"])
        assert undress(once) == once


def test_easy_answers_are_graded_at_two_thousand_a_second():
    texts = [
        ("so\n#### {}", "{}"),
        ("\\boxed{{{}}}", "{}"),
        ("#### ${}", "{}"),
        ("#### {} apples", "{}"),
        ("#### {}", "7"),
    ]
    pairs = [(t.format(n), g.format(n)) for n in range(10_000, 10_400) for t, g in texts]
    math_reward(*pairs[0])
    started = time.process_time()
    for text, gold in pairs:
        math_reward(text, gold)
    assert len(pairs) / (time.process_time() - started) > 2000


@pytest.mark.parametrize(
    "text",
    [
        "#### " + "9" * 10**6,
        "#### " + " " * 10**6 + "4",
        "\\boxed{" * 3000,
        "####" * 50_000,
        "\n" * 10**5,
        "#### Step\n" * 50_000,
        "\\boxed{2880000!}",
        "So the answer is " * 50_000,
        "since so, and " * 50_000 + "the answer is 5",
        "The answer" + "*_ " * 10**5 + "is " + "5 (" * 10**5,
        "The answer is " + "$" * 10**5 + "because" * 10**4 + "." * 10**5,
    ],
)
def test_long_texts_are_graded_in_a_moment(text):
    started = time.process_time()
    math_reward(text, "4")
    assert time.process_time() - started < 3
