"""The study's exact minimisers of losses (study/exact.py) against optimality conditions, descent and closed forms."""

import numpy as np
import pytest

from study import exact


def test_predicted_minimisers_meet_the_optimality_conditions():
    """At a minimiser no class has a steeper slope −∂E[ℓ]/∂π_c = p_E/max(π, α) than those that are kept."""
    partial = 0
    for name in exact.EXPERTS:
        expert = exact.EXPERTS[name] / exact.EXPERTS[name].sum()
        for alpha in exact.ALPHAS:
            policy = exact.predicted(expert, alpha)
            assert policy.sum() == pytest.approx(1)
            slope = expert / np.maximum(policy, alpha)
            assert slope[policy > 0] == pytest.approx(slope.max()), (name, alpha)
            partial += bool(((policy > 0) & (policy < 0.999 * alpha)).any())
    assert partial  # the case that Proposition 1 leaves open comes up


def test_descent_finds_the_predicted_minimiser():
    for row in exact.proposition("two modes (0.6, 0.3, ten of 0.01)", steps=2000):
        assert -1e-9 < row["loss_of_found_minus_predicted"] < 1e-3
        assert row["total_variation_found_vs_predicted"] < 0.01


def test_the_void_mass_of_nll_has_its_closed_form():
    for share in (0.5, 0.8):
        (row,) = exact.void_of_tables(share, {"NLL": exact.OBJECTIVES["NLL"]})
        assert row["void"] == pytest.approx(1 - share**5 - (1 - share) ** 5, abs=1e-4)
        assert row["style_a"] + row["style_b"] + row["void"] == pytest.approx(1)
    assert exact.masses(exact.expert_strings(0.8)) == pytest.approx({"style_a": 0.8, "style_b": 0.2, "void": 0})
