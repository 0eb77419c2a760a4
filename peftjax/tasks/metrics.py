"""Metrics of predictions, computed by scikit-learn, SciPy, sacrebleu and rouge-score.

BLEU is from 0 to 100; all others are at most 1.
"""

from collections.abc import Sequence

import numpy as np

from peftjax.core.errors import UserError
from peftjax.core.paths import suggest

OF_ANSWERS = ("exact_match", "bleu", "rouge_l")


def score_classification(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Metrics of a single class per example.

    accuracy; f1 of class 1 if there are two classes, else macro_f1, the mean over the classes; matthews, the Matthews
    correlation coefficient.

    Args:
        logits: [N, C].
        labels: int [N].
    """
    from sklearn import metrics

    predicted, classes = logits.argmax(-1), logits.shape[-1]
    f1 = metrics.f1_score(labels, predicted, average="binary" if classes == 2 else "macro", zero_division=0)
    several = (
        len(np.union1d(labels, predicted)) > 1
    )  # scikit-learn warns about a single class, where the correlation is 0
    return {
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "f1" if classes == 2 else "macro_f1": float(f1),
        "matthews": float(metrics.matthews_corrcoef(labels, predicted)) if several else 0.0,
    }


def score_multi_label(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Metrics of any number of classes per example, each predicted if its probability exceeds one half.

    accuracy, the fraction of examples with all classes right; micro_f1, over all classes of all examples; macro_f1, the
    mean over the classes.

    Args:
        logits: [N, C].
        labels: [N, C], 0 or 1.
    """
    from sklearn import metrics

    predicted, labels = logits > 0, labels > 0
    return {"accuracy": float(metrics.accuracy_score(labels, predicted))} | {
        f"{mean}_f1": float(metrics.f1_score(labels, predicted, average=mean, zero_division=0))
        for mean in ("micro", "macro")
    }


def by_class(
    logits: np.ndarray, labels: np.ndarray
) -> tuple[list[float], list[float], list[float], list[int], list[int]]:
    """The precision, recall and F1 of each class, and the numbers of its examples and of its predictions, each [C].

    Precision and recall are 0 where their denominator is 0.

    Args:
        logits: [N, C].
        labels: int [N], or [N, C], 0 or 1.
    """
    from sklearn import metrics

    count = logits.shape[-1]
    if labels.ndim == 1:
        true, predicted = labels, logits.argmax(-1)
        predictions = np.bincount(predicted, minlength=count)
    else:
        true, predicted = labels > 0, logits > 0
        predictions = predicted.sum(0)
    precision, recall, f1, examples = metrics.precision_recall_fscore_support(
        true, predicted, labels=range(count), average=None, zero_division=0
    )
    return precision.tolist(), recall.tolist(), f1.tolist(), examples.tolist(), predictions.tolist()


def score_regression(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """pearson and spearman, the correlations of the numbers and of their ranks; NaN if either is constant.

    Args:
        logits: [N, 1].
        labels: float [N].
    """
    from scipy import stats

    predicted, labels = logits[:, 0].astype(float), labels.astype(float)  # SciPy would round to float32
    if np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return {"pearson": float("nan"), "spearman": float("nan")}
    return {
        "pearson": float(stats.pearsonr(predicted, labels).statistic),
        "spearman": float(stats.spearmanr(predicted, labels).statistic),
    }


def check_answer_metrics(names: Sequence[str]) -> None:
    """Raises a UserError for a name that is not in `OF_ANSWERS`."""
    if unknown := [name for name in names if name not in OF_ANSWERS]:
        raise UserError(
            f"eval.metrics has {unknown[0]!r}.{suggest(unknown[0], OF_ANSWERS)} Metrics of generated answers: "
            f"{', '.join(OF_ANSWERS)}; those of other tasks are always computed"
        )


def same(answer: str, expected: str) -> bool:
    """Whether two texts are equal up to surrounding spaces."""
    return answer.strip() == expected.strip()


def score_answers(answers: Sequence[str], expected: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """Metrics of generated answers.

    exact_match: the fraction of answers equal to the expected ones up to surrounding spaces; bleu: corpus BLEU with
    sacrebleu's defaults (Post 2018, arXiv:1804.08771); rouge_l: mean F-measure of the longest common subsequence of
    words, without stemming (Lin 2004).
    """
    found: dict[str, float] = {}
    for name in names:
        pairs = list(zip(answers, expected, strict=True))
        if name == "exact_match":
            found[name] = float(np.mean([same(one, other) for one, other in pairs]))
        elif name == "bleu":
            import sacrebleu

            found[name] = float(sacrebleu.corpus_bleu(list(answers), [list(expected)]).score)
        else:
            from rouge_score.rouge_scorer import RougeScorer

            scorer = RougeScorer(["rougeL"])
            found[name] = float(np.mean([scorer.score(other, one)["rougeL"].fmeasure for one, other in pairs]))
    return found
