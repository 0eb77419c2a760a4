"""The best evaluation of a run, and whether later ones still improve on it, from the lines of metrics.jsonl."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MetricsLine = Mapping[str, Any]


def lower_is_better(score: str) -> bool:
    """Whether lower values of a score are better, as for losses and the perplexity."""
    return score.endswith("loss") or score == "perplexity"


def sort_key(score: str, value: float) -> float:
    """What ranks the values of a score, higher for a better one."""
    return -value if lower_is_better(score) else value


def best_evaluation(lines: Iterable[MetricsLine], score: str) -> MetricsLine | None:
    """The evaluation with the best finite value of a score, the earliest of equals; None without one.

    The evaluation before the first step does not count.
    """
    found = [line for line in _trained(lines) if math.isfinite(line.get(score, math.nan))]
    return max(found, key=lambda line: sort_key(score, line[score]), default=None)


def of_result(lines: Sequence[MetricsLine], score: str, export: str) -> Sequence[MetricsLine]:
    """The lines up to the evaluation of the checkpoint that was exported, the "last" or the "best" one."""
    best = best_evaluation(lines, score) if export == "best" else None
    return lines if best is None else [line for line in lines if line["step"] <= best["step"]]


def out_of_patience(lines: Iterable[MetricsLine], score: str, patience: int) -> bool:
    """Whether the last `patience` evaluations were no better than an earlier one. Never if `patience` is 0."""
    if patience == 0:
        return False
    found = _trained(lines)
    best = best_evaluation(found, score)
    since = [line for line in found if best is None or line["step"] > best["step"]]
    return len(since) >= patience


def _trained(lines: Iterable[MetricsLine]) -> Sequence[MetricsLine]:
    """The evaluations after the first step."""
    return [line for line in lines if line["kind"] == "eval" and line["step"] > 0]
