"""The search for the best learning rate of a method: which rate to try next."""

import math
from collections.abc import Mapping

MOST_RATES = 8


def more_rates(scores: Mapping[float, float], *, lower: bool) -> list[float]:
    """The next rate to try, about three times the best one or a third of it, if that is the highest or the lowest so far.

    Args:
        scores: The validation score of each rate so far.
        lower: Whether a lower score is better.
    """
    best = best_rate(scores, lower=lower)
    if min(scores) < best < max(scores) or len(scores) >= MOST_RATES:
        return []
    return [float(f"{best * (10 / 3 if best == max(scores) else 3 / 10):.0g}")]


def best_rate(scores: Mapping[float, float], *, lower: bool) -> float:
    """The rate with the best validation score. Runs that failed have NaN or infinity."""
    finite = {rate: -score if lower else score for rate, score in scores.items() if math.isfinite(score)}
    return max(finite, key=lambda rate: finite[rate])
