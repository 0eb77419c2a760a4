"""How well a model tells classes apart: scores by class, confusions, and examples of its predictions."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from peftjax.core.json_numbers import with_numbers
from peftjax.tasks import metrics


@dataclasses.dataclass(frozen=True)
class ClassScore:
    """The scores of one class.

    Attributes:
        name: The class.
        precision: The fraction of its predictions that are right.
        recall: The fraction of its examples that are predicted.
        f1: The harmonic mean of the two.
        examples: Number of examples.
        predictions: Number of predictions.
    """

    name: str
    precision: float
    recall: float
    f1: float
    examples: int
    predictions: int


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The prediction for one example.

    Attributes:
        record: Name of the record.
        text: Its text; empty for an image.
        expected: The class, or the classes.
        predicted: The predicted class, or classes.
        correct: Whether they are equal.
        probability: The probability of the predicted class; None if there may be several.
        image: A JPEG file in base64; empty for a text.
    """

    record: str
    text: str
    expected: str
    predicted: str
    correct: bool
    probability: float | None = None
    image: str = ""


@dataclasses.dataclass(frozen=True)
class Classes:
    """The predictions of an evaluation.

    Attributes:
        step: Number of completed steps.
        scores: The scores of each class, in the order of the classes.
        confusions: (class, predicted class, number of examples) of all pairs that occur; empty for a multi-label task.
        examples: Some predictions, the wrong ones first.
    """

    step: int
    scores: tuple[ClassScore, ...]
    confusions: tuple[tuple[int, int, int], ...] = ()
    examples: tuple[Prediction, ...] = ()

    @classmethod
    def from_json(cls, fields: dict[str, object]) -> "Classes":
        """Build it from the fields of a JSON object.

        Raises:
            TypeError: It is not an object with these fields.
        """
        values = {**fields}
        for name, kind in (("scores", ClassScore), ("examples", Prediction), ("confusions", None)):
            items = values.get(name)
            if isinstance(items, list):
                values[name] = tuple(
                    kind(**with_numbers({**item}, {"probability"})) if kind else tuple(item) for item in items
                )
            elif name in values:
                raise TypeError(f"classes.{name} is not a list")
        return cls(**values)  # type: ignore[arg-type]


def score_classes(
    names: Sequence[str], logits: np.ndarray, labels: np.ndarray, step: int, examples: Sequence[Prediction] = ()
) -> Classes:
    """Return the scores and the confusions of predictions.

    Args:
        names: The classes.
        logits: [N, C].
        labels: int [N], or float [N, C] of a multi-label task.
        step: Number of completed steps.
        examples: Some of the predictions.
    """
    columns = metrics.by_class(logits, labels)
    scores = tuple(ClassScore(name, *values) for name, *values in zip(names, *columns, strict=True))
    confusions: tuple[tuple[int, int, int], ...] = ()
    if labels.ndim == 1:
        pairs, counts = np.unique(np.stack([labels, logits.argmax(-1)], 1), axis=0, return_counts=True)
        confusions = tuple((int(true), int(other), int(n)) for (true, other), n in zip(pairs, counts, strict=True))
    return Classes(step, scores, confusions, tuple(examples))


def collapse(classes: Classes | None) -> str:
    """Why the predictions look collapsed: they are all of one class; empty if they are not."""
    if classes is None:
        return ""
    predicted = [score for score in classes.scores if score.predictions]
    if len(predicted) > 1 or sum(score.examples > 0 for score in classes.scores) < 2:
        return ""
    total = sum(score.examples for score in classes.scores)
    what = f"{predicted[0].name!r} for all" if predicted else "no class for any of the"
    found = f"{what} {total:,} held-out labels"
    if predicted and not classes.confusions:  # a multi-label task: some examples may have no predicted class
        found = f"no class but {predicted[0].name!r} on the held-out data"
    return f"the model predicts {found}; check optim.learning_rate and the balance of the classes, or train longer"
