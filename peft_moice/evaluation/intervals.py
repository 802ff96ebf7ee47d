"""Uncertainty of a share of right answers, and of means."""

import random
from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist


def wilson_interval(successes: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a binomial proportion (E. B. Wilson, JASA 1927).

    Unlike the normal approximation it stays inside [0, 1], and has a width at 0 and at 1. It holds the share of
    successes, which rounding would put just outside of it at 0 and at 1.

    Args:
        successes: number of successes, 0 to `trials`; a sum of shares need not be whole.
        trials: number of trials, at least 1.
        confidence: probability of covering the true proportion, in (0, 1). Default: 0.95.

    Raises:
        ValueError: a value out of its range.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(
            f"{successes} successes in {trials} trials is impossible; give 0 <= successes <= trials >= 1."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` is {confidence}, but has to lie strictly between 0 and 1.")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, scale = successes / trials, 1 + z**2 / trials
    center = (share + z**2 / (2 * trials)) / scale
    half_width = z / scale * sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return max(0.0, min(share, center - half_width)), min(1.0, max(share, center + half_width))


def bootstrap_interval(
    groups: Sequence[Sequence[float]], confidence: float = 0.95, *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of values that come in groups (Efron, Annals of Statistics 1979).

    Groups are drawn with replacement, so that values that belong together stay together.

    Args:
        groups: the values of each group; at least one group, none empty.
        confidence: probability of covering the true mean, in (0, 1). Default: 0.95.
        resamples: number of draws. Default: 1000.
        seed: of the draws. Default: 0.

    Raises:
        ValueError: a value out of its range.
    """
    if not groups or not all(groups):
        raise ValueError("There is nothing to draw from; give at least one group, and at least one value in each.")
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(
            f"`confidence` {confidence} has to lie strictly between 0 and 1, `resamples` {resamples} to be at least 1."
        )
    rng = random.Random(seed)
    sums = [(sum(group), len(group)) for group in groups]
    means = []
    for _ in range(resamples):
        drawn = rng.choices(sums, k=len(sums))
        means.append(sum(total for total, _ in drawn) / sum(count for _, count in drawn))
    means.sort()
    edge = (1 - confidence) / 2 * (resamples - 1)
    return means[round(edge)], means[round(resamples - 1 - edge)]
