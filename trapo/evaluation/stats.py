"""This file has intervals and estimators for evaluation results. NumPy only; everything random is seeded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Values = Sequence[float] | npt.NDArray[np.floating]


class Interval(NamedTuple):
    """Holds a two-sided confidence interval, in the unit of the estimate."""

    low: float
    high: float


class PairedDifference(NamedTuple):
    """Holds `second - first`: its mean, interval, and two-sided bootstrap p-value for "no difference"."""

    mean: float
    low: float
    high: float
    p_value: float


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Returns the Wilson score interval of a success rate: `successes` of `n` independent trials.

    Unlike the mean ± 1.96 standard errors it stays inside [0, 1] and is honest at 0 and n successes.
    Raises ValueError unless 0 <= successes <= n, n >= 1 and 0 < confidence < 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"wilson_interval: needs 0 <= successes <= n and n >= 1; got {successes} of {n}")
    return _wilson(successes / n, n, _z(confidence, "wilson_interval"))


def _wilson(rate: float, n: int, z: float) -> Interval:
    z2 = z**2
    center = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At the ends the formula gives 0 and 1 exactly, but for rounding.
    low = 0.0 if rate == 0 else max(0.0, center - half)
    high = 1.0 if rate == 1 else min(1.0, center + half)
    return Interval(low, high)


def mean_interval(values: Values, confidence: float = 0.95) -> Interval:
    """Returns an interval of the mean of `values`, one value per problem: the bootstrap's, unless all values are equal.

    A bootstrap of equal values claims certainty: resampling them can give nothing else. Where they lie in [0, 1] the
    interval is then Wilson's for that rate over as many problems, which no set of values in [0, 1] makes too narrow.
    Raises ValueError for no values or values that are not finite.
    """
    data = _finite(values, "mean_interval: values")
    if data.min() == data.max() and 0 <= data[0] <= 1:
        return _wilson(float(data[0]), len(data), _z(confidence, "mean_interval"))
    return bootstrap_interval(data, confidence)


def bootstrap_interval(values: Values, confidence: float = 0.95, *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Returns the percentile bootstrap interval of the mean of `values`, one value per problem.

    With several samples per problem pass the problem's mean (avg@k): the problems are the independent units,
    the samples are not. Raises ValueError for no values or values that are not finite.
    """
    data = _finite(values, "bootstrap_interval: values")
    _z(confidence, "bootstrap_interval")
    return _percentiles(_resampled_means(data, resamples, seed), confidence)


def paired_bootstrap(
    first: Values, second: Values, confidence: float = 0.95, *, resamples: int = 10_000, seed: int = 0
) -> PairedDifference:
    """Compares two runs on the same problems, `first[i]` and `second[i]` being their values for problem i.

    Resampling problems, and not each run on its own, takes the problems' difficulty out of the comparison.
    Raises ValueError for empty, unequal or non-finite inputs.
    """
    a = _finite(first, "paired_bootstrap: first")
    b = _finite(second, "paired_bootstrap: second")
    if len(a) != len(b):
        raise ValueError(f"paired_bootstrap: needs the same problems; got {len(a)} and {len(b)} values")
    _z(confidence, "paired_bootstrap")
    means = _resampled_means(b - a, resamples, seed)
    # +1: with finitely many resamples a p-value of exactly 0 would claim too much.
    tail = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
    p_value = min(1.0, 2 * (int(tail) + 1) / (resamples + 1))
    return PairedDifference(float((b - a).mean()), *_percentiles(means, confidence), p_value)


def paired_interval(first: Values, second: Values, confidence: float = 0.95) -> Interval:
    """Returns an interval of the mean of `second - first`: the paired bootstrap's, unless all differences are equal.

    Of equal differences the bootstrap claims certainty. Then it is Agresti and Min's for matched pairs ("Simple
    improved confidence intervals for comparing matched proportions", 2005): half a problem is added to each of the four
    cells right/right, right/wrong, wrong/right and wrong/wrong.
    Raises ValueError for empty, unequal or non-finite inputs.
    """
    found = paired_bootstrap(first, second, confidence)
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    if differences.min() != differences.max() or abs(differences[0]) > 1:
        return Interval(found.low, found.high)
    n = len(differences) + 2
    gained, lost = np.maximum(differences, 0).sum() + 0.5, np.maximum(-differences, 0).sum() + 0.5
    center = (gained - lost) / n
    half = _z(confidence, "paired_interval") * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
    return Interval(max(-1.0, float(center - half)), min(1.0, float(center + half)))


def mcnemar_exact(first_only: int, second_only: int) -> float:
    """Returns the two-sided exact p-value for "both runs are right equally often", from the problems that one run alone
    got right.

    Under it each such problem is a fair coin, so the tail is a binomial's. Raises ValueError for negative counts.
    """
    if min(first_only, second_only) < 0:
        raise ValueError(f"mcnemar_exact: counts must not be negative; got {first_only} and {second_only}")
    n = first_only + second_only
    tail = sum(math.comb(n, i) for i in range(min(first_only, second_only) + 1))
    return min(1.0, 2 * tail / 2**n)


def sign_flip_test(differences: Values, *, resamples: int = 20_000, seed: int = 0) -> float:
    """Returns the two-sided p-value for "differences are symmetric around 0": how often random signs give as large a
    sum.

    Exact (all signs) for up to 16 differences that are not 0, else from `resamples` random ones.
    Raises ValueError for no values or values that are not finite.
    """
    data = _finite(differences, "sign_flip_test: differences")
    data = data[data != 0]
    if data.size == 0:
        return 1.0
    observed = abs(data.sum()) * (1 - 1e-12)  # sums of the same terms in another order differ by rounding
    if data.size <= 16:
        signs = 1.0 - 2.0 * ((np.arange(2**data.size)[:, None] >> np.arange(data.size)) & 1)
        return float(np.mean(np.abs(signs @ data) >= observed))
    rng = np.random.default_rng(seed)
    rows = max(1, 2**22 // data.size)
    hits = 0
    for start in range(0, resamples, rows):
        signs = rng.choice([-1.0, 1.0], size=(min(rows, resamples - start), data.size))
        hits += int(np.count_nonzero(np.abs(signs @ data) >= observed))
    return (hits + 1) / (resamples + 1)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Returns the unbiased estimate of pass@k from `n` samples of a problem, `c` of them right (Chen et al. 2021).

    1 - C(n - c, k) / C(n, k): the chance that k samples drawn without replacement hold a right one.
    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k: needs 0 <= c <= n and 1 <= k <= n; got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def _z(confidence: float, who: str) -> float:
    """Returns the normal quantile of a two-sided interval."""
    if not 0 < confidence < 1:
        raise ValueError(f"{who}: confidence must be between 0 and 1; got {confidence}")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _finite(values: Values, who: str) -> npt.NDArray[np.float64]:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or data.size == 0 or not np.isfinite(data).all():
        raise ValueError(f"{who} must be a non-empty list of finite numbers; got shape {data.shape}")
    return data


def _resampled_means(data: npt.NDArray[np.float64], resamples: int, seed: int) -> npt.NDArray[np.float64]:
    if resamples < 1:
        raise ValueError(f"bootstrap: resamples must be at least 1; got {resamples}")
    rng = np.random.default_rng(seed)
    rows = max(1, 2**22 // len(data))  # at most 32 MiB of indices at a time
    chunks = [
        data[rng.integers(len(data), size=(min(rows, resamples - start), len(data)))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(chunks)


def _percentiles(means: npt.NDArray[np.float64], confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(low), float(high))
