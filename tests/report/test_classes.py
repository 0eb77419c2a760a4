"""Scores by class, confusions, the warning about a collapsed model, and the predictions that a run shows."""

import json
from pathlib import Path

import numpy as np
import pytest

from peftjax.report.classes import Classes, ClassScore, collapse, score_classes
from peftjax.report.data import ReportData
from peftjax.report.tables import confusion_matrix, most_confused

LABELS = np.array([0, 0, 0, 1, 1, 2])
PREDICTED = np.array([0, 0, 1, 1, 2, 2])


def test_scores_and_confusions_are_those_of_a_calculation_by_hand() -> None:
    classes = score_classes(("a", "b", "c", "d"), np.eye(4)[PREDICTED], LABELS, step=7)
    assert classes.scores == (
        ClassScore("a", 1.0, 2 / 3, pytest.approx(0.8), 3, 2),
        ClassScore("b", 0.5, 0.5, 0.5, 2, 2),
        ClassScore("c", 0.5, 1.0, pytest.approx(2 / 3), 1, 2),
        ClassScore("d", 0.0, 0.0, 0.0, 0, 0),
    )
    assert classes.confusions == ((0, 0, 2), (0, 1, 1), (1, 1, 1), (1, 2, 1), (2, 2, 1))
    name, row = confusion_matrix(classes)[1]
    assert (name, row) == ("b", [(0, 0.0, False), (1, 50.0, True), (1, 50.0, False), (0, 0.0, False)])
    assert most_confused(classes) == [("a", "b", 1), ("b", "c", 1)]


def test_of_many_classes_the_most_frequent_confusions_are_listed() -> None:
    labels = np.arange(20).repeat(3)
    predicted = np.where(labels == 4, 9, labels)
    classes = score_classes([f"class {i}" for i in range(20)], np.eye(20)[predicted], labels, step=1)
    assert confusion_matrix(classes) == []
    assert most_confused(classes) == [("class 4", "class 9", 3)]


def test_a_multi_label_task_has_scores_and_no_confusions() -> None:
    labels = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    classes = score_classes(("a", "b"), np.array([[1.0, 1.0], [2.0, -1.0], [-1.0, -1.0]]), labels, step=1)
    assert classes.scores == (ClassScore("a", 1.0, 1.0, 1.0, 2, 2), ClassScore("b", 0.0, 0.0, 0.0, 1, 1))
    assert classes.confusions == ()
    assert collapse(classes) == ""
    silent = score_classes(("a", "b"), np.full((3, 2), -1.0), labels, step=1)
    assert collapse(silent).startswith("the model predicts no class for any of the 3 held-out labels; check")
    some = score_classes(("a", "b"), np.array([[1.0, -1.0], [-1.0, -1.0], [-1.0, -1.0]]), labels, step=1)
    assert collapse(some).startswith("the model predicts no class but 'a' on the held-out data; check")


def test_a_model_that_predicts_one_class_of_several_has_collapsed() -> None:
    ones = np.eye(3)[np.ones(6, int)]
    why = collapse(score_classes(("a", "b", "c"), ones, LABELS, step=1))
    assert why.startswith("the model predicts 'b' for all 6 held-out labels; check optim.learning_rate")
    assert collapse(score_classes(("a", "b", "c"), np.eye(3)[PREDICTED], LABELS, step=1)) == ""
    assert collapse(score_classes(("a", "b", "c"), ones, np.ones(6, int), step=1)) == ""  # there is only one class
    assert collapse(None) == ""


def test_what_json_makes_of_classes_is_read_back(tmp_path: Path) -> None:
    classes = score_classes(("a", "b", "c"), np.eye(3)[PREDICTED], LABELS, step=7)
    ReportData(classes=classes).save(tmp_path)
    assert ReportData.load(tmp_path).classes == classes
    for damaged in ({"step": 1}, {"step": 1, "scores": 3}, {"step": 1, "scores": [{"name": "a"}]}):
        with pytest.raises(TypeError, match=r"scores|missing"):
            Classes.from_json(json.loads(json.dumps(damaged)))
