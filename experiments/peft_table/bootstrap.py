"""Whether the test scores of two methods differ by more than chance: a paired bootstrap over seeds and test records.

Seeds and records are drawn with replacement, 10,000 times, and both methods are scored on the same draws: runs of a seed share
the data order and the initial head (Efron and Tibshirani 1993; Koehn 2004). BLEU is not a mean over records, so each draw adds
up the n-gram counts of its records.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from sacrebleu.metrics.bleu import BLEU

from experiments.peft_table.setting import overlaps

SAMPLES = 10_000


class Difference(NamedTuple):
    """A difference of mean scores, in percent, and the ends of its 95% interval."""

    mean: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        return not self.low <= 0 <= self.high


class Records(NamedTuple):
    """What the scores of a method are computed from.

    Attributes:
        values: Statistics of each test record, [seeds, records, statistics].
        score: The scores in percent from sums of statistics and numbers of records, [..., statistics] -> [...].
    """

    values: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]


def compare(one: Records, other: Records) -> Difference:
    """How much higher the mean score of the first method is."""
    rng = np.random.default_rng(0)
    seeds, records, _ = one.values.shape
    of_seeds = rng.multinomial(seeds, [1 / seeds] * seeds, SAMPLES) / seeds
    of_records = rng.multinomial(records, [1 / records] * records, SAMPLES)

    def means(method: Records) -> np.ndarray:
        sums = np.tensordot(of_records, method.values, (1, 1))  # [samples, seeds, statistics]
        return (of_seeds * method.score(sums)).sum(-1)

    mean = float((one.score(one.values.sum(1)) - other.score(other.values.sum(1))).mean())
    low, high = np.percentile(means(one) - means(other), [2.5, 97.5])
    return Difference(mean, float(low), float(high))


def records_of(result: dict[str, Any], score: str, references: list[list[str]]) -> Records:
    """The statistics of a result file for accuracy, bleu or rouge_l; the references are those of each test record of E2E."""
    predictions = [seed["predictions"] for seed in result["seeds"].values()]
    if score == "accuracy":
        packed = np.stack([np.frombuffer(bytes.fromhex(one), np.uint8) for one in predictions])
        count = int(next(iter(result["seeds"].values()))["epochs"][-1]["eval_labels"])
        return _shares(np.unpackbits(packed, axis=-1, count=count))
    if score == "rouge_l":
        return _shares(np.array([overlaps(texts, references) for texts in predictions]))
    counts = [[_counts(*pair) for pair in zip(texts, references, strict=True)] for texts in predictions]
    return Records(np.array(counts), _bleu)


def _shares(values: np.ndarray) -> Records:
    """Scores that are means over records, from values [seeds, records]."""
    counted = np.stack([values, np.ones_like(values)], axis=-1).astype(np.float64)
    return Records(counted, lambda sums: 100 * sums[..., 0] / sums[..., 1])


def _counts(text: str, references: list[str]) -> list[int]:
    """The n-gram counts of an answer, its length, and the length of its reference, which BLEU sums up."""
    found = BLEU(effective_order=True).sentence_score(text, references)
    return [*found.counts, *found.totals, found.sys_len, found.ref_len]


def _bleu(sums: np.ndarray) -> np.ndarray:
    def one(counts: np.ndarray) -> float:
        correct, total, (length, expected) = counts[:4].tolist(), counts[4:8].tolist(), counts[8:].tolist()
        return float(BLEU.compute_bleu(correct, total, length, expected, smooth_method="exp").score)

    return np.apply_along_axis(one, -1, sums)
