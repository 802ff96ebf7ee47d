"""Uncertainty of a share of right answers."""

from math import sqrt
from statistics import NormalDist


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a binomial proportion (E. B. Wilson, JASA 1927).

    Unlike the normal approximation it stays inside [0, 1], and has a width at 0 and at 1.

    Args:
        successes: number of successes, 0 to `trials`.
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
    return max(0.0, center - half_width), min(1.0, center + half_width)
