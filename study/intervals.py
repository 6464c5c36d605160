"""Intervals over seeds and problems together: both are resampled, both the same for the two sides of a comparison."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Estimate:
    mean: float
    low: float
    high: float
    seed_std: float  # standard deviation over seeds (n − 1); 0 for one seed

    def as_dict(self) -> dict[str, float]:
        return {k: round(v, 5) for k, v in dataclasses.asdict(self).items()}


def estimate(values: np.ndarray, *, resamples: int = 4000, seed: int = 0, confidence: float = 0.95) -> Estimate:
    """Returns the mean of values [seeds, problems] with a percentile interval; for a paired difference pass the
    differences.

    Seeds are resampled and, independently, problems: the runs share the problems. With five seeds the interval of the
    seeds' part is on the narrow side, as every bootstrap of five values is; the standard deviation is given beside it.
    """
    values = np.asarray(values, dtype=np.float64)
    seeds, problems = values.shape
    rng = np.random.default_rng(seed)
    seed_weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds  # [R, S]
    means = np.empty(resamples)
    for start in range(0, resamples, 500):
        block = seed_weights[start : start + 500]
        weights = rng.multinomial(problems, np.full(problems, 1 / problems), size=len(block)) / problems
        means[start : start + 500] = ((block @ values) * weights).sum(1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    by_seed = values.mean(1)
    return Estimate(float(values.mean()), float(low), float(high), float(by_seed.std(ddof=1)) if seeds > 1 else 0.0)
