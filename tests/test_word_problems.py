"""The generator: every trace right, the splits apart, the same problems for the same seed."""

import re

import pytest

from trapo.data.tasks import situations
from trapo.data.tasks.word_problems import DIFFICULTIES, SPLITS, generate, templates
from trapo.rewards import final_answer, math_reward

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def question(problem):
    return problem.prompt[-1]["content"]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_every_trace_is_right_arithmetic_that_ends_in_the_answer(split, difficulty):
    level = DIFFICULTIES[difficulty]
    for problem in generate(split, 500, seed=1, difficulty=difficulty):
        (trace,) = problem.traces
        *lines, last = trace.split("\n")
        for line in lines:
            x, op, y, result = EQUATION.fullmatch(line).groups()
            exact = {"+": int(x) + int(y), "-": int(x) - int(y), "*": int(x) * int(y)}
            assert exact.get(op, int(x) / int(y)) == int(result)
            assert 2 <= int(result) <= level.limit
        assert lines[-1].endswith(f"= {problem.answer}")
        assert last == f"#### {problem.answer}"
        assert len(lines) in ({1} if level.two_step == 0 else {2} if level.two_step == 1 else {1, 2})


@pytest.mark.parametrize("split", SPLITS)
def test_the_reward_accepts_every_trace_and_refuses_it_for_another_answer(split):
    for problem in generate(split, 100):
        (trace,) = problem.traces
        assert math_reward(trace, problem.answer) == 1.0
        assert math_reward(trace, str(int(problem.answer) + 1)) == 0.0


@pytest.mark.parametrize("split", SPLITS)
def test_a_trace_uses_only_numbers_of_the_question_and_earlier_results(split):
    for problem in generate(split, 500, difficulty="hard"):
        words = {"twice": 2, "half": 2, "around": 2}
        known = {int(n) for n in re.findall(r"\d+", question(problem))}
        known |= {value for word, value in words.items() if word in question(problem)}
        for x, _, y, result in EQUATION.findall(problem.traces[0]):
            assert {int(x), int(y)} <= known, problem
            known.add(int(result))


@pytest.mark.parametrize("split", SPLITS)
def test_every_template_fills_at_every_difficulty_that_can_draw_it(split):
    keys = [t.key for t in templates(split)]
    assert len(keys) == len(set(keys))
    for template in templates(split):
        slots = set(re.findall(r"{([a-d])}", template.text))
        assert slots == set(re.findall(r"[a-d]", " ".join(template.steps))), template.key
        assert set(re.findall(r"{(\w+)}", template.text)) - slots <= {"n", "m", "o"}, template.key
    for difficulty in ("mixed", "medium"):
        drawn = {re.sub(r"\d+", "#", question(p)) for p in generate(split, 1500, difficulty=difficulty)}
        assert len(drawn) > 500


def test_there_are_enough_templates_that_none_is_memorised():
    assert len(templates("train")) >= 100
    assert len(templates("test")) >= 40


def test_no_situation_of_the_test_split_is_in_the_train_split():
    for family in (situations.OPENINGS, situations.EVENTS, situations.STORIES):
        train, test = ({(key, text) for key, _, text in family[split]} for split in SPLITS)
        assert not {key for key, _ in train} & {key for key, _ in test}
        assert not {text for _, text in train} & {text for _, text in test}
    # Nor by another name: no sentence of a test problem occurs in a training problem, whatever the numbers.
    blank = [{_skeleton(t.text) for t in templates(split)} for split in SPLITS]
    assert not blank[0] & blank[1]


def _skeleton(text):
    return re.sub(r"{\w}", "_", text)


def test_the_same_arguments_give_the_same_problems_and_others_do_not():
    assert generate("train", 50, seed=3) == generate("train", 50, seed=3)
    assert generate("train", 20, seed=3) == generate("train", 50, seed=3)[:20]
    questions = [{question(p) for p in generate("train", 300, seed=s)} for s in (3, 4)]
    assert len(questions[0] & questions[1]) < 10


PINNED = (
    "There are 2 peaches in a basket and 3 peaches on the table next to it. "
    "There is room for 16 peaches. How many more peaches would fit?",
    ("2 + 3 = 5\n16 - 5 = 11\n#### 11",),
    "word_problems/test/aeb18cdcbacd87b7",
)


def test_generation_does_not_change_from_one_release_to_the_next():
    first = generate("test", 1, seed=0)[0]
    assert (question(first), first.traces, first.id) == PINNED


def test_problems_within_a_set_are_different_and_so_are_their_ids():
    problems = generate("train", 3000)
    assert len({question(p) for p in problems}) == len({p.id for p in problems}) == 3000


def test_the_prompt_is_a_chat_with_our_own_system_message_and_one_solved_example():
    (problem,) = generate("train", 1)
    assert [m["role"] for m in problem.prompt] == ["system", "user", "assistant", "user"]
    assert math_reward(problem.prompt[2]["content"], "6") == 1.0
    assert [m["role"] for m in generate("train", 1, example=False)[0].prompt] == ["system", "user"]


def test_questions_and_traces_are_short():
    for problem in generate("test", 500, difficulty="hard"):
        assert len(question(problem).split()) <= 40
        assert len(problem.traces[0]) <= 50
        assert final_answer(problem.traces[0]) == problem.answer


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("dev", 1), "split must be one of train, test; got 'dev'"),
        (("train", 0), "n must be at least 1; got 0"),
    ],
)
def test_unknown_splits_and_empty_sets_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        generate(*args)


def test_an_unknown_difficulty_names_the_known_ones():
    with pytest.raises(ValueError, match="difficulty must be one of easy, mixed, medium, hard; got 'no'"):
        generate("train", 1, difficulty="no")
