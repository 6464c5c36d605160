"""The study's tasks: their traces, what they refuse, their splits."""

import random
import re

import pytest
from test_study import task  # noqa: F401

from study import chain, countdown
from study.settings import FULL
from study.task import EOS, decode, encode, encoded


def test_every_expert_trace_earns_the_reward_and_fits(task):  # noqa: F811
    rng = random.Random(0)
    for length in task.lengths * 30:
        instance = task.sample(rng, length)
        assert task.is_right(instance.prompt, instance.answer, instance.trace), instance
        assert len(instance.trace) + 1 <= task.max_response
        assert decode(encode(instance.prompt)) == instance.prompt


def test_chain_traces_work_out_what_the_prompt_says():
    rng = random.Random(1)
    for _ in range(200):
        instance = chain.Chain().sample(rng, rng.randrange(3, 9))
        operations = re.findall(r"([-+*@&])([0-9X])", instance.prompt)
        value = chain.DIGITS.index(instance.prompt[0])
        values, written = [value], ""
        for op, operand in operations:
            d = chain.DIGITS.index(operand)
            value = (
                chain.TABLES[op][d][value] if op in "@&" else {"+": value + d, "-": value - d, "*": value * d}[op] % 11
            )
            written += f"{chain.DIGITS[values[-1]]}{op}{operand}={chain.DIGITS[value]};"
            values.append(value)
        assert instance.trace == f"{written}>{chain.DIGITS[values[-2]]}{chain.DIGITS[values[-1]]}"


@pytest.mark.parametrize("response", [">53", "3+5=8;>53", "3+5=8;8*2=4;4@7=3;>53", "3+5=8;8*2=5;>85", ""])
def test_the_chain_refuses_anything_but_the_whole_working(response):
    task = chain.Chain()  # noqa: F811
    assert not task.is_right("3+5*2@7:", "53", response)
    last = chain.DIGITS[chain.apply("@", 5, 7)]
    assert task.is_right("3+5*2@7:", f"5{last}", f"3+5=8;8*2=5;5@7={last};>5{last}")


def test_every_operation_of_the_chain_is_a_bijection_so_mistakes_do_not_heal():
    for op in chain.KNOWN + chain.NEW:
        for operand in range(1, chain.P):
            assert sorted(chain.apply(op, value, operand) for value in range(chain.P)) == list(range(chain.P))


@pytest.mark.parametrize(
    "response",
    [
        "3*4=12;12+6=19;",
        "3*6=18;",
        "6*3=18;4+18=22;",
        "3*4=12;12+6=18;9+9=18;",
        "12+6=18;",
        "3*4=12;12+6=18;>",
        "",
        "18",
    ],
    ids=["false", "number left out", "other target", "goes on", "not given", "text after", "empty", "claimed"],
)
def test_countdown_refuses(response):
    assert not countdown.Countdown().is_right("346=18:", "18", response)


def test_countdown_accepts_any_way_to_the_target():
    for response in ("3*4=12;12+6=18;", "4*3=12;6+12=18;"):
        assert countdown.Countdown().is_right("346=18:", "18", response)


def test_no_problem_is_in_two_splits(task):  # noqa: F811
    keys = {}
    for split, count in (
        ("train", FULL.traces),
        ("validation", FULL.validation_problems),
        ("test", FULL.test_problems),
    ):
        found = {task.key(i.prompt) for i in task.problems(split, count)}
        assert len(found) == count
        keys[split] = found
    rng = random.Random(0)
    keys["corpus"] = {task.key(task.corpus_line(rng)[0]) for _ in range(3000)}
    names = list(keys)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not keys[a] & keys[b], (a, b)


def test_the_corpus_says_nothing_about_the_new_operators():
    rng, right, seen = random.Random(0), 0, 0
    for _ in range(8000):
        prompt, response = chain.Chain().corpus(rng)
        if match := re.fullmatch(r"([0-9X])([@&])([0-9X]):", prompt):
            value, operand = chain.DIGITS.index(match[1]), chain.DIGITS.index(match[3])
            seen += 1
            right += response[-1] == chain.DIGITS[chain.TABLES[match[2]][operand][value]]
    assert seen > 300
    assert abs(right / seen - 1 / 11) < 4 * (1 / 11 / seen) ** 0.5


def test_step_ends_are_where_the_steps_end(task):  # noqa: F811
    problem = encoded(task, task.problems("train", 3))[0]
    trace = problem.traces[0]
    text = decode(trace.token_ids)
    assert [text[i] for i in trace.blank_lines] == [";"] * text.count(";")
    assert trace.token_ids[-1] == EOS


# Engine
