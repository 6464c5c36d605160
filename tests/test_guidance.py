import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trapo.errors import TrapoError
from trapo.guidance import (
    ALWAYS,
    NEVER,
    OFFICIAL,
    PAPER,
    MicroGroup,
    carries_expert_term,
    is_decided,
    is_guided,
    prefix_length,
    schedule,
    thinking_part,
    trace_index,
)


def test_the_paper_preset_is_the_papers_table():
    assert [g.size for g in PAPER.micro_groups] == [4, 2, 1, 1]
    assert [g.ratio for g in PAPER.micro_groups] == [0.0, 0.2, 0.5, 1.0]
    assert [g.threshold for g in PAPER.micro_groups] == [-1, 0.5, 0.7, 0.9]
    assert PAPER.rollouts_per_prompt == OFFICIAL.rollouts_per_prompt == 8


# (right answers so far, of how many) -> guided, by level: every reachable state of 0/1 rewards.
@pytest.mark.parametrize(("level", "seen"), [(1, 4), (2, 6), (3, 7)])
def test_official_thresholds_are_the_codes_sums(level, seen):
    limit = {4: 2, 6: 4, 7: 7}[seen]
    for right in range(seen + 1):
        rewards = [1.0] * right + [0.0] * (seen - right)
        assert is_guided(OFFICIAL.micro_groups[level], rewards) == (right < limit)


@pytest.mark.parametrize(("level", "seen"), [(1, 4), (2, 6), (3, 7)])
def test_paper_and_code_differ_only_at_four_right_of_six(level, seen):
    for right in range(seen + 1):
        rewards = [1.0] * right + [0.0] * (seen - right)
        paper, code = (is_guided(s.micro_groups[level], rewards) for s in (PAPER, OFFICIAL))
        assert (paper != code) == ((right, seen) == (4, 6))


def test_the_first_micro_group_is_never_guided():
    assert not is_guided(PAPER.micro_groups[0], [])
    assert not is_guided(OFFICIAL.micro_groups[0], [])


def test_always_guides_even_when_everything_was_right_and_never_never_does():
    assert is_guided(MicroGroup(1, 0.5, ALWAYS), [1.0, 1.0])
    assert not is_guided(MicroGroup(1, 0.5, NEVER), [0.0])


@pytest.mark.parametrize(("ratio", "expected"), [(0.0, 0), (0.2, 2), (0.25, 3), (0.5, 6), (1.0, 13)])
def test_a_token_cut_takes_the_whole_part_of_length_times_ratio(ratio, expected):
    assert prefix_length(13, ratio, "token") == expected


def test_a_blank_line_cut_ends_with_the_first_near_blank_line():
    # The authors' get_prefix_end_idx looks strictly behind int(len·L): past a blank line there, or else before it.
    assert prefix_length(100, 0.25, "blank_line", [3, 25, 40]) == 41
    assert prefix_length(100, 0.25, "blank_line", [3, 25]) == 25
    assert prefix_length(100, 0.25, "blank_line", [3, 26]) == 27
    assert prefix_length(100, 0.25, "blank_line", [3, 40]) == 41
    assert prefix_length(100, 0.25, "blank_line", [3, 54]) == 55  # still before len·(L + 0.3)
    assert prefix_length(100, 0.25, "blank_line", [3, 56]) == 25  # too far: the plain cut
    assert prefix_length(100, 0.25, "blank_line", []) == 25
    assert prefix_length(100, 1.0, "blank_line", [3]) == 100


@given(st.integers(0, 500), st.floats(0, 1), st.lists(st.integers(0, 499)))
def test_a_prefix_is_never_longer_than_its_trace(n, ratio, lines):
    lines = sorted(i for i in lines if i < n)
    for cut in ("token", "blank_line"):
        assert int(n * ratio) <= prefix_length(n, ratio, cut, lines) <= n


def test_official_traces_are_the_first_for_the_middle_levels_and_the_second_for_the_last():
    rng = random.Random(0)
    assert [trace_index("in_order", 2, level, rng) for level in (1, 2, 3)] == [0, 0, 1]
    assert [trace_index("in_order", 1, level, rng) for level in (1, 2, 3)] == [0, 0, 0]


def test_random_traces_reach_all_of_them():
    rng = random.Random(0)
    assert {trace_index("random", 3, 1, rng) for _ in range(50)} == {0, 1, 2}


def test_one_per_prefix_supervises_one_rollout_of_those_that_share_it():
    assert [carries_expert_term("one_per_prefix", i) for i in range(2)] == [True, False]
    assert [carries_expert_term("every", i) for i in range(2)] == [True, True]


def test_the_thinking_part_ends_with_its_mark_and_is_everything_without_one():
    assert thinking_part("<think>a</think>answer") == "<think>a</think>"
    assert thinking_part("just text") == "just text"


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        (([1], [0.0, 1.0], [1.0]), "one entry per micro-group"),
        (([0], [0.0], [1.0]), "guidance.sizes: got 0"),
        (([1], [1.5], [1.0]), "guidance.ratios: got 1.5"),
        (([], [], []), "no micro-group"),
    ],
)
def test_impossible_schedules_are_refused(columns, named):
    with pytest.raises(TrapoError, match=named):
        schedule(*columns)


@pytest.mark.parametrize(
    ("level", "rewards", "decided"),
    [
        (0, [], False),  # nothing is known yet
        (1, [1, 1, 1, 1], True),
        (1, [1, 1, 1, 0], False),  # that one has something to learn from
        (1, [0, 0, 0, 0], False),
        (1, [0.9, 0.9, 0.9, 0.9], False),  # equal, but not the full reward
        (3, [1] * 7, True),
    ],
)
def test_a_prompt_is_decided_once_all_rollouts_so_far_got_the_full_reward(level, rewards, decided):
    assert is_decided(PAPER.micro_groups[level:], rewards) is decided


def test_a_prompt_is_not_decided_while_a_micro_group_that_remains_would_be_guided():
    always = schedule([4, 1, 1], [0.0, 0.0, 0.5], [NEVER, NEVER, ALWAYS]).micro_groups
    assert not is_decided(always[1:], [1, 1, 1, 1])
    assert is_decided(always[1:2], [1, 1, 1, 1])
