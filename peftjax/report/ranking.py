"""Which score ranks runs, and their order."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from peftjax.report.charts import main_scores
from peftjax.tasks.best import sort_key
from peftjax.tasks.metrics import OF_ANSWERS


def loss_of(names: Collection[str]) -> str:
    """The held-out loss if it is one of these scores, or else the training loss."""
    return "eval_loss" if "eval_loss" in names else "loss"


def main_score(names: Collection[str]) -> str | None:
    """The task's main score among these names; if generated answers are scored, their score."""
    answers = [name for name in OF_ANSWERS if name in names]
    return next(iter(answers or main_scores([dict.fromkeys(names)])), None)


def ranking_score(entries: Sequence[Mapping[str, Any]]) -> str:
    """The score that ranks the runs of a sweep, from the entries of sweep.json.

    That is `checkpoint.best_score` if it was set, or else the main score of the task, or else the loss. Token accuracy does not
    count as a main score here: the loss is more informative.
    """
    names = {name for entry in entries for name in entry["scores"]}
    chosen = [entry["best_score"] for entry in entries if entry.get("best_score") in names]
    main = main_score(names - {"token_accuracy"})
    return next(filter(None, [*chosen, main]), loss_of(names))


def rank(scores: Mapping[str, float], by: str) -> tuple[float, float]:
    """The sort key of a run with these scores, lowest for the best run: its score `by`, then its loss. A missing score ranks
    last."""
    return _cost(scores, by), _cost(scores, loss_of(scores))


def _cost(scores: Mapping[str, float], name: str) -> float:
    value = scores.get(name, math.nan)
    return math.inf if math.isnan(value) else -sort_key(name, value)
