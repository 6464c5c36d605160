import math
import statistics
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trapo.errors import TrapoError
from trapo.rollouts import assign_advantages, group_advantages


def advantages(rewards, guided=None, own=None, **options):
    n = len(rewards)
    return group_advantages(rewards, guided=guided or [False] * n, own_tokens=own or [1] * n, **options)


def test_the_baseline_is_the_mean_of_all_rollouts_by_default():
    assert advantages([1.0, 0.0, 0.0, 0.0]) == [0.75, -0.25, -0.25, -0.25]


def test_an_unguided_baseline_leaves_guided_rollouts_out_of_the_mean():
    assert advantages([0.0, 0.0, 1.0], guided=[False, False, True], baseline="unguided") == [0.0, 0.0, 1.0]


def test_an_own_tokens_baseline_leaves_full_traces_out_of_the_mean():
    got = advantages([1.0, 0.0, 1.0], own=[5, 5, 0], baseline="own_tokens")
    assert got == [0.5, -0.5, 0.5]


@pytest.mark.parametrize("baseline", ["unguided", "own_tokens"])
def test_where_no_rollout_qualifies_the_baseline_is_all_of_them(baseline):
    assert advantages([1.0, 0.0], guided=[True, True], own=[0, 0], baseline=baseline) == [0.5, -0.5]


def test_std_divides_by_the_sample_standard_deviation():
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0]
    scale = statistics.stdev(rewards) + 1e-6
    mean = statistics.mean(rewards)
    got = advantages(rewards, std=True)
    assert all(math.isclose(a, (r - mean) / scale) for a, r in zip(got, rewards, strict=True))


@pytest.mark.parametrize("baseline", ["unguided", "own_tokens"])
def test_a_baseline_of_equal_rewards_does_not_blow_up_the_others(baseline):
    got = advantages(
        [0.0, 0.0, 1.0, 1.0], guided=[False, False, True, True], own=[3, 3, 0, 0], baseline=baseline, std=True
    )
    assert max(map(abs, got)) < 3


@given(st.floats(-5, 5), st.integers(1, 16), st.booleans())
def test_equal_rewards_give_exactly_zero(reward, n, std):
    assert advantages([reward] * n, std=std) == [0.0] * n


@given(st.lists(st.floats(0, 1), min_size=1, max_size=16), st.booleans())
def test_advantages_of_a_group_sum_to_zero(rewards, std):
    got = advantages(rewards, std=std)
    assert abs(sum(got)) < 1e-6 * max(1.0, max(map(abs, got)))


@pytest.mark.parametrize(("largest", "std"), [(1.7e308, False), (1.7e308, True), (1e160, True)])
def test_rewards_too_large_for_a_float_are_refused_in_one_line(largest, std):
    rollouts = [
        SimpleNamespace(group=0, reward=r, guided=False, own_ids=[1]) for r in (largest, largest, -largest, 0.0)
    ]
    rollouts[3].reward = largest  # their sum is beyond the largest float
    with pytest.raises(
        TrapoError, match=r"reward\.function: got rewards up to 1.*e\+\d+, whose mean or variance"
    ) as error:
        assign_advantages(rollouts, "all", std)
    assert "\n" not in str(error.value)
