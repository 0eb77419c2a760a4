"""The predictions of a classification task that the report shows."""

import base64
from collections.abc import Sequence

import numpy as np

from peftjax.data.batches import HeldOut
from peftjax.report.classes import Classes, Prediction, score_classes
from peftjax.tasks import Task
from peftjax.training.evaluation import Evaluation

WRONG, RIGHT = 6, 3  # numbers of examples


def summarize(held_out: HeldOut, task: Task, found: Evaluation, step: int) -> Classes | None:
    """The scores by class of an evaluation after `step` steps, with some of its predictions; None if the task has no classes."""
    if not task.labels or found.logits is None or found.labels is None:
        return None
    examples = _examples(held_out, task, found.logits, found.labels, found.records)
    return score_classes(task.labels, found.logits, found.labels, step, examples)


def _examples(
    held_out: HeldOut, task: Task, logits: np.ndarray, labels: np.ndarray, records: Sequence[str]
) -> list[Prediction]:
    """The wrong predictions of which the model is most certain, and right ones spread over the data."""
    if len(records) != len(logits):  # one prediction for each word, or rows of several processes
        return []
    if labels.ndim == 1:
        from scipy import special  # imported late: only tasks with classes need it

        predicted, certain = logits.argmax(-1), special.softmax(logits, axis=-1).max(-1)
        right = predicted == labels
    else:
        predicted, certain = logits > 0, np.abs(logits).min(-1)
        right = (predicted == (labels > 0)).all(-1)
    wrong, fine = np.flatnonzero(~right), np.flatnonzero(right)
    wrong = wrong[np.argsort(-certain[wrong], kind="stable")][:WRONG]
    chosen = [*wrong, *fine[np.linspace(0, len(fine) - 1, min(RIGHT, len(fine))).astype(int)]]
    there = {records[index]: held_out.record(records[index]) for index in chosen}
    return [
        Prediction(
            records[index],
            task.shown(there[records[index]], records[index]),
            _named(task, labels[index]),
            _named(task, predicted[index]),
            bool(right[index]),
            float(certain[index]) if labels.ndim == 1 else None,
            base64.b64encode(task.pictured(there[records[index]], records[index])).decode(),
        )
        for index in chosen
    ]


def _named(task: Task, label: np.ndarray) -> str:
    """The name of a class [], or of all classes that apply [C]."""
    if label.ndim == 0:
        return task.labels[int(label)]
    return ", ".join(task.labels[index] for index in np.flatnonzero(label)) or "none"
