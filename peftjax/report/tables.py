"""The tables of a run: its training data, and the confusions between classes."""

from collections.abc import Mapping
from typing import Any

from peftjax.report.classes import Classes
from peftjax.report.data import ReportData
from peftjax.report.text import format_percent

MOST_CLASSES = 12  # of a confusion matrix; with more classes, the most frequent confusions are listed
MOST_CONFUSED = 12


def data_rows(data: ReportData, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the counts of the training data with their names. `config` is flat: {"section.field": value}."""
    limit = f"{config['data.max_length']:,} tokens" if "data.max_length" in config else "the limit"
    fates = {"truncate": "truncated", "drop": "dropped", "split": "split", "error": "refused"}
    fate = fates.get(config.get("data.too_long", ""), "")
    names = {
        "records": "Records read",
        "too_long": f"Longer than {limit}" + f", {fate}" * bool(fate),
        "pieces": "Pieces of these",
        "empty": "Dropped, no tokens in the loss",
        "rows": "Rows",
        "tokens": "Tokens",
        "loss_tokens": "Targets in the loss",
    }
    counts = data.counts
    if data.padding is None:  # images
        names = {"records": "Records read"}
    rows = [(name, f"{counts[key]:,}") for key, name in names.items() if key in counts]
    return rows + ([("Padding", format_percent(data.padding))] if data.padding is not None else [])


def confusion_matrix(classes: Classes | None) -> list[tuple[str, list[tuple[int, float, bool]]]]:
    """Return each class with its row of the confusion matrix; empty for many classes, or a multi-label task.

    A row has, for each prediction, the number of examples, its percentage of the row, and whether it is the class itself.
    """
    if classes is None or not classes.confusions or len(classes.scores) > MOST_CLASSES:
        return []
    counts = {(true, predicted): count for true, predicted, count in classes.confusions}
    rows = []
    for true, score in enumerate(classes.scores):
        row = [counts.get((true, predicted), 0) for predicted in range(len(classes.scores))]
        examples = score.examples or 1
        cells = [(count, round(100 * count / examples, 1), true == predicted) for predicted, count in enumerate(row)]
        rows.append((score.name, cells))
    return rows


def most_confused(classes: Classes | None) -> list[tuple[str, str, int]]:
    """Return the most frequent confusions as (class, prediction, number of examples)."""
    if classes is None:
        return []
    wrong = sorted((one for one in classes.confusions if one[0] != one[1]), key=lambda one: -one[2])
    names = [score.name for score in classes.scores]
    return [(names[true], names[predicted], count) for true, predicted, count in wrong[:MOST_CONFUSED]]
