"""Scores by their definitions."""

import math

import numpy as np
import pytest

from peftjax.tasks import metrics as scores


def test_two_classes_are_scored_by_accuracy_f1_of_the_second_and_matthews() -> None:
    labels = np.array([1, 1, 1, 0, 0, 0, 0, 0])
    predicted = np.array([1, 1, 0, 1, 0, 0, 0, 0])  # 2 true positives, 1 false one, 1 missed, 4 true negatives
    found = scores.score_classification(np.eye(2)[predicted], labels)
    expected = {"accuracy": 6 / 8, "f1": 2 * 2 / (2 * 2 + 1 + 1), "matthews": (2 * 4 - 1) / math.sqrt(3 * 3 * 5 * 5)}
    assert found == pytest.approx(expected)


def test_more_classes_are_scored_by_the_mean_f1() -> None:
    labels, predicted = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 2])
    found = scores.score_classification(np.eye(3)[predicted], labels)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_a_model_that_always_says_the_same_has_no_correlation() -> None:
    found = scores.score_classification(np.eye(2)[[0, 0, 0, 0]], np.array([0, 1, 0, 1]))
    assert found == {"accuracy": 0.5, "f1": 0.0, "matthews": 0.0}
    found = scores.score_classification(np.eye(2)[[1, 1]], np.array([1, 1]))
    assert found == {"accuracy": 1.0, "f1": 1.0, "matthews": 0.0}
    assert all(math.isnan(value) for value in scores.score_regression(np.zeros((3, 1)), np.arange(3.0)).values())


def test_several_classes_are_told_where_their_logits_are_above_0() -> None:
    labels = np.array([[1, 0, 1], [0, 1, 0]])
    found = scores.score_multi_label(np.array([[2.0, -1, 0.5], [-1, 3, 0.1]]), labels)
    assert found == pytest.approx({"accuracy": 0.5, "micro_f1": 6 / 7, "macro_f1": (1 + 1 + 2 / 3) / 3})


def test_numbers_are_scored_by_their_correlations() -> None:
    labels, predicted = np.array([0.0, 1, 2, 3]), np.array([0.0, 1, 4, 9])[:, None]
    found = scores.score_regression(predicted, labels)
    assert found == pytest.approx({"pearson": np.corrcoef(predicted[:, 0], labels)[0, 1], "spearman": 1.0})


def test_nearly_equal_predictions_have_exact_correlations() -> None:
    predicted = np.array([1, 1, 1 + 2**-23], np.float32)  # SciPy warns of fewer digits
    found = scores.score_regression(predicted[:, None], np.array([0, 1, 2], np.float32))
    assert found == pytest.approx({"pearson": 0.75**0.5, "spearman": 0.75**0.5}, rel=1e-12)


def test_answers_are_scored_by_equality_by_bleu_and_by_common_subsequences() -> None:
    answers, expected = ["the cat sat on the mat", " yes "], ["the cat sat on the mat today", "yes"]
    found = scores.score_answers(answers, expected, scores.OF_ANSWERS)
    assert found["exact_match"] == 0.5
    assert found["rouge_l"] == pytest.approx((2 * 6 / 13 + 1) / 2)
    # every n-gram is right, and 7 words stand for 8
    assert found["bleu"] == pytest.approx(100 * math.exp(1 - 8 / 7))
    assert scores.score_answers(answers, expected, ("exact_match",)).keys() == {"exact_match"}
