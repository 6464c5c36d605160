import dataclasses

import pytest

from trapo.data.encode import EncodedProblem, decode_text
from trapo.data.problem import Problem
from trapo.report.rollout_log import rollout_row, sample_rollouts
from trapo.rollouts import Rollout

MESSAGES = ({"role": "system", "content": "Think."}, {"role": "user", "content": "What is 3 + 4?"})


def make(tokenizer, prefix="", own=" = 7.", ratio=0.0, cut=None, **more):
    problem = EncodedProblem(Problem("p/1", MESSAGES, "7", (), "p"), (1, 2), ())
    ids = tokenizer(prefix + own, add_special_tokens=False)["input_ids"]
    cut = len(tokenizer(prefix, add_special_tokens=False)["input_ids"]) if cut is None else cut
    return Rollout(problem, 0, 0, ratio, tuple(ids[:cut]), tuple(ids[cut:]), bool(cut), True, **more)


def test_a_row_holds_the_texts_of_prompt_prefix_and_own_tokens(tokenizer):
    rollout = make(tokenizer, "3 + 4", " = 7.", ratio=0.5, reward=1.0, advantage=0.25)
    row = rollout_row(6, rollout, tokenizer, scored=True)
    assert (row["step"], row["prompt"], row["answer"]) == (6, "What is 3 + 4?", "7")
    assert (row["prefix"], row["own"]) == ("3 + 4", " = 7.")
    assert row["prefix_tokens"] + row["own_tokens"] == len(rollout.response_ids)
    assert (row["ratio"], row["reward"], row["advantage"]) == (0.5, 1.0, 0.25)


def test_rewards_that_nobody_gave_are_not_reported_as_zero(tokenizer):
    row = rollout_row(1, make(tokenizer), tokenizer, scored=False)
    assert row["reward"] is None
    assert row["advantage"] is None


def test_a_character_that_is_cut_in_two_does_not_lose_the_rest(tokenizer):
    text = "π 🦉 done"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    cut = next(i for i in range(1, len(ids)) if "�" in decode_text(tokenizer, ids[:i]))
    row = rollout_row(1, make(tokenizer, "", text, ratio=0.5, cut=cut), tokenizer, scored=True)
    assert row["own"].endswith(" done")
    assert row["prefix"]


def groups(tokenizer, *ratios):
    """Rollouts of a step: for each prompt the prefix ratios of its group."""
    return [
        dataclasses.replace(make(tokenizer, own=f" {i}", ratio=ratio), group=i)
        for i, group in enumerate(ratios)
        for ratio in group
    ]


def test_prompts_are_sampled_whole_and_every_kind_before_one_is_sampled_twice(tokenizer):
    alone, guided, whole = (0.0, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.5, 1.0)
    rollouts = groups(tokenizer, *[alone] * 9, guided, whole)
    chosen = sample_rollouts(rollouts, 9, seed=3)
    assert sorted(r.ratio for r in chosen) == [0.0] * 6 + [0.5, 0.5, 1.0]
    assert len({r.group for r in chosen}) == 3
    assert chosen == sample_rollouts(rollouts, 9, seed=3)
    assert len(sample_rollouts(rollouts, 1, seed=3)) == 3  # a prompt at least
    assert len(sample_rollouts(rollouts, 100, seed=3)) == 33


@pytest.mark.parametrize("seed", range(5))
def test_the_sample_is_not_always_the_first_rollouts(tokenizer, seed):
    rollouts = groups(tokenizer, *[(0.0,)] * 50)
    assert sample_rollouts(rollouts, 3, seed) != rollouts[:3]


def test_a_prompt_with_examples_says_who_says_what(tokenizer):
    rollout = make(tokenizer)
    examples = ({"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}, MESSAGES[1])
    several = dataclasses.replace(rollout.problem.problem, prompt=(MESSAGES[0], *examples))
    rollout.problem = dataclasses.replace(rollout.problem, problem=several)
    row = rollout_row(1, rollout, tokenizer, scored=True)
    assert row["prompt"] == "user: 1 + 1?\n\nassistant: 2\n\nuser: What is 3 + 4?"
