"""Scores of predictions, from scikit-learn, SciPy, sacrebleu and rouge-score; all but BLEU (0 to 100) are from -1 or 0 to 1."""

from collections.abc import Sequence

import numpy as np

OF_ANSWERS = ("exact_match", "bleu", "rouge_l")


def classification(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """accuracy; f1 of class 1 where there are two classes, else macro_f1, the mean over the classes; matthews, the
    correlation coefficient of Matthews. logits [N, C], labels int [N]."""
    from sklearn import metrics

    predicted, classes = logits.argmax(-1), logits.shape[-1]
    f1 = metrics.f1_score(labels, predicted, average="binary" if classes == 2 else "macro", zero_division=0)
    return {
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "f1" if classes == 2 else "macro_f1": float(f1),
        "matthews": float(metrics.matthews_corrcoef(labels, predicted)),
    }


def multi_label(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """accuracy: the share of examples all of whose classes are told; micro_f1 over all classes of all examples; macro_f1,
    the mean over the classes. A class is told where its probability is above one half. logits, labels [N, C]."""
    from sklearn import metrics

    predicted, labels = logits > 0, labels > 0
    return {"accuracy": float(metrics.accuracy_score(labels, predicted))} | {
        f"{mean}_f1": float(metrics.f1_score(labels, predicted, average=mean, zero_division=0))
        for mean in ("micro", "macro")
    }


def regression(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """pearson and spearman: the correlations of the numbers and of their ranks; NaN where either does not vary. logits
    [N, 1], labels float [N]."""
    from scipy import stats

    predicted = logits[:, 0]
    if np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return {"pearson": float("nan"), "spearman": float("nan")}
    return {
        "pearson": float(stats.pearsonr(predicted, labels).statistic),
        "spearman": float(stats.spearmanr(predicted, labels).statistic),
    }


def same(answer: str, expected: str) -> bool:
    """Whether two texts are equal but for spaces around them."""
    return answer.strip() == expected.strip()


def of_answers(answers: Sequence[str], expected: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """Some of `OF_ANSWERS`. exact_match: the share of answers that are what was expected, but for spaces around it; bleu:
    of the corpus, as sacrebleu has it by default (Post 2018); rouge_l: mean F of the longest common subsequences of
    words, without stemming (Lin 2004)."""
    found: dict[str, float] = {}
    for name in names:
        if name == "exact_match":
            found[name] = float(np.mean([same(one, other) for one, other in zip(answers, expected, strict=True)]))
        elif name == "bleu":
            import sacrebleu

            found[name] = float(sacrebleu.corpus_bleu(list(answers), [list(expected)]).score)
        else:
            from rouge_score.rouge_scorer import RougeScorer

            scorer = RougeScorer(["rougeL"])
            found[name] = float(
                np.mean(
                    [scorer.score(other, one)["rougeL"].fmeasure for one, other in zip(answers, expected, strict=True)]
                )
            )
    return found
