"""Sampling by inverse CDF with one uniform number a row."""

import pytest
import torch

from trapo.engines.inverse_cdf import Draws, greedy, sample
from trapo.errors import TrapoError

INF = float("inf")


def logits_of(case, size):
    z = torch.randn(size, generator=torch.Generator().manual_seed(size)) * (5 if case == "peaked" else 1.5)
    if case == "holes":
        z[::3] = z[-40:] = -INF
    if case == "ends":
        z[1:-1], z[0], z[-1] = -INF, 0, 1
    return z


def p_value(counts, p):
    """Of Pearson's chi-square; tokens of an expected count below 5 are taken together."""
    expected = p * counts.sum()
    rare = expected < 5
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2, dtype=torch.float64), statistic / 2))


@pytest.mark.parametrize(
    ("case", "size", "temperature"),
    [
        ("plain", 7, 1.0),
        ("plain", 7, 0.7),
        ("peaked", 50, 1.0),
        ("plain", 300, 1.3),
        ("plain", 1024, 1.0),
        ("holes", 512, 1.0),
        ("ends", 200, 1.0),
    ],
)
def test_samples_follow_the_softmax_and_the_test_would_see_another_temperature(case, size, temperature):
    rows, each = 1000, 60
    z = logits_of(case, size)
    p = torch.softmax(z.double() / temperature, -1)
    draws = [Draws(seed) for seed in range(rows)]
    counts = torch.zeros(size, dtype=torch.float64)
    for _ in range(each):
        uniform = torch.tensor([d.next() for d in draws], dtype=torch.float64)
        counts += torch.bincount(sample(z.expand(rows, size), temperature, uniform), minlength=size)
    assert counts[p == 0].sum() == 0
    assert p_value(counts, p) > 1e-4
    assert p_value(counts, torch.softmax(z.double() / (0.85 * temperature), -1)) < 1e-3


def test_a_token_is_that_of_the_whole_cdf_in_float64():
    z = torch.randn(64, 49152, generator=torch.Generator().manual_seed(0)) * 3
    uniform = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.searchsorted(torch.softmax(z.double(), -1).cumsum(-1), uniform[:, None], right=True)[:, 0]
    assert sample(z, 1.0, uniform).equal(expected)


@pytest.mark.parametrize("size", [255, 256, 257, 300, 512])
def test_the_ends_of_the_interval_give_the_first_and_the_last_possible_token(size):
    z = torch.zeros(2, size)
    z[:, 0] = z[:, -1] = -INF
    uniform = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample(z, 1.0, uniform).tolist() == [1, size - 2]


def test_16_bit_logits_are_sampled_in_float32():
    z = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    uniform = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert sample(z, 0.9, uniform).equal(sample(z.float(), 0.9, uniform))


@pytest.mark.parametrize("bad", [float("nan"), INF])
@pytest.mark.parametrize("choose", [greedy, lambda z: sample(z, 1.0, torch.full((2,), 0.5, dtype=torch.float64))])
def test_logits_that_are_no_distribution_are_refused_in_one_line(bad, choose):
    z = torch.zeros(2, 300)
    z[1, 5] = bad
    with pytest.raises(TrapoError, match=r"^rollout\.engine: .* NaN or infinite") as error:
        choose(z)
    assert "\n" not in str(error.value)
    choose(torch.zeros(2, 300))


def test_the_numbers_of_a_row_depend_on_its_seed_and_their_place_alone():
    draws = Draws(5)
    mine = [draws.next() for _ in range(200)]
    others = Draws(6)
    again = Draws(5)
    assert [(again.next(), others.next())[0] for _ in range(200)] == mine
    assert len(set(mine)) == 200
    assert [Draws(6).next(), Draws(7).next()] != [mine[0]] * 2
