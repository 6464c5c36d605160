"""Intervals and estimators, against closed forms and known values."""

from itertools import combinations

import numpy as np
import pytest

from trapo.evaluation.stats import (
    bootstrap_interval,
    mcnemar_exact,
    mean_interval,
    paired_bootstrap,
    paired_interval,
    pass_at_k,
    sign_flip_test,
    wilson_interval,
)


def test_wilson_interval_gives_the_textbook_value():
    # Newcombe 1998, table I: 81 of 263, method 3.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)


@pytest.mark.parametrize(("successes", "low", "high"), [(0, 0.0, 0.161), (20, 0.839, 1.0)])
def test_wilson_interval_is_not_a_point_when_none_or_all_succeed(successes, low, high):
    assert wilson_interval(successes, 20) == pytest.approx((low, high), abs=1e-3)


def test_wilson_interval_covers_the_true_rate_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [wilson_interval(int(c), 40) for c in rng.binomial(40, 0.3, size=4000)]
    assert np.mean([low <= 0.3 <= high for low, high in hits]) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("args", [(-1, 5), (6, 5), (0, 0), (1, 5, 1.0)])
def test_wilson_interval_refuses_impossible_counts(args):
    with pytest.raises(ValueError, match="wilson_interval"):
        wilson_interval(*args)


def test_bootstrap_interval_agrees_with_the_normal_interval_of_a_large_sample():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=2000)
    half = 1.96 * values.std() / np.sqrt(2000)
    expected = (values.mean() - half, values.mean() + half)
    assert bootstrap_interval(values) == pytest.approx(expected, abs=0.01)


def test_bootstrap_interval_is_the_same_for_the_same_seed_only():
    values = np.random.default_rng(2).random(50)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_bootstrap_interval_of_one_constant_is_that_constant():
    assert bootstrap_interval([0.25] * 7) == (0.25, 0.25)


@pytest.mark.parametrize(("value", "successes"), [(0.0, 0), (1.0, 7)])
def test_the_interval_of_problems_that_all_came_out_the_same_is_wilsons(value, successes):
    assert mean_interval([value] * 7) == wilson_interval(successes, 7)


def test_the_interval_of_equal_means_between_the_ends_is_not_a_point_and_holds_them():
    low, high = mean_interval([0.25] * 8)
    assert low < 0.25 < high
    assert mean_interval([0.25] * 8) == wilson_interval(2, 8)


def test_the_interval_of_problems_that_differ_is_the_bootstraps():
    values = [0.0, 0.5, 1.0, 0.25]
    assert mean_interval(values) == bootstrap_interval(values)
    assert mean_interval([3.0, 3.0]) == (3.0, 3.0)  # outside [0, 1] no rate stands behind it


def test_the_interval_of_equal_differences_is_the_adjusted_wald_one_for_matched_pairs():
    # Agresti and Min 2005: no discordant pairs of 98; (0 ± 1.96 sqrt(1)) / 100.
    assert paired_interval([1.0] * 98, [1.0] * 98) == pytest.approx((-0.0196, 0.0196), abs=1e-4)
    low, high = paired_interval([0.0] * 5, [1.0] * 5)
    assert high == 1.0
    assert 0 < low < 1


def test_the_interval_of_differences_that_differ_is_the_paired_bootstraps():
    first, second = [0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0]
    assert paired_interval(first, second) == paired_bootstrap(first, second)[1:3]


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0]]])
def test_bootstrap_interval_refuses_what_has_no_mean(values):
    with pytest.raises(ValueError, match="bootstrap_interval: values"):
        bootstrap_interval(values)


def test_paired_bootstrap_finds_a_small_gain_that_difficulty_would_hide():
    difficulty = np.random.default_rng(4).random(100)
    result = paired_bootstrap(difficulty, difficulty + 0.01 * np.arange(100) / 50)
    assert result.mean == pytest.approx(0.0099)
    assert result.low > 0
    assert result.p_value < 0.001


def test_paired_bootstrap_sees_no_difference_between_equal_runs():
    result = paired_bootstrap([0, 1, 1, 0], [0, 1, 1, 0])
    assert (result.mean, result.low, result.high, result.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_paired_bootstrap_turns_its_sign_with_the_order_of_the_runs():
    a, b = [0.0, 1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0, 1.0]
    assert paired_bootstrap(a, b).mean == -paired_bootstrap(b, a).mean == pytest.approx(0.4)


def test_paired_bootstrap_refuses_runs_over_different_problems():
    with pytest.raises(ValueError, match="same problems; got 2 and 3"):
        paired_bootstrap([0, 1], [0, 1, 1])


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_sample(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations([i < c for i in range(n)], k))
            assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(s) for s in subsets]))


def test_pass_at_1_is_the_mean_and_large_counts_do_not_overflow():
    assert pass_at_k(1000, 250, 1) == pytest.approx(0.25)
    assert 0.999 < pass_at_k(10_000, 500, 500) <= 1.0


@pytest.mark.parametrize("args", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_impossible_counts(args):
    with pytest.raises(ValueError, match="pass_at_k"):
        pass_at_k(*args)


def test_mcnemars_test_is_the_binomial_tail_of_a_fair_coin():
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(5, 5) == 1.0
    assert mcnemar_exact(0, 10) == pytest.approx(2 / 2**10)
    assert mcnemar_exact(1, 9) == mcnemar_exact(9, 1) == pytest.approx(2 * 11 / 2**10)
    with pytest.raises(ValueError, match="must not be negative"):
        mcnemar_exact(-1, 2)


def test_sign_flips_of_differences_of_one_are_mcnemars_test():
    for worse, better in [(1, 9), (3, 5), (0, 4), (6, 10)]:
        differences = [-1.0] * worse + [1.0] * better + [0.0] * 30
        assert sign_flip_test(differences) == pytest.approx(mcnemar_exact(worse, better))


def test_sampled_sign_flips_agree_with_the_exact_tail():
    differences = [-1.0] * 30 + [1.0] * 50
    exact = mcnemar_exact(30, 50)
    sampled = sign_flip_test(differences, resamples=20_000)
    assert abs(sampled - exact) < 4 * (exact * (1 - exact) / 20_000) ** 0.5
    assert sign_flip_test([0.0, 0.0]) == 1.0
    assert sign_flip_test([1e-3] * 200) == pytest.approx(1 / 20_001)  # never 0
