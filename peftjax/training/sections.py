"""The sections `train`, `eval` and `checkpoint` of the configuration."""

import dataclasses
from collections.abc import Mapping

from peftjax.core.config import field
from peftjax.core.errors import UserError
from peftjax.tasks.best import sort_key
from peftjax.tasks.metrics import check_answer_metrics

DEFAULT_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long the training is, how large its steps are, and when it logs and evaluates."""

    steps: int = field(DEFAULT_STEPS, "Number of optimizer updates", low=1)
    epochs: float = field(
        0.0, "Number of passes over data.train, in place of steps; 0: use steps", low=0, instead_of="steps"
    )
    batch_size: int = field(8, "Sequences per step, over all devices and microbatches", low=1)
    accumulate: int = field(1, "Microbatches per step, computed one after the other", low=1)
    loss_chunk: int = field(128, "Positions of a sequence whose logits are in memory at the same time", low=1)
    log_every: int = field(10, "Logging interval in steps", low=1)
    eval_every: int | str = field(
        "10%",
        "Evaluation interval: a number of steps, a percentage of the run ('10%'), or epochs ('0.5 epochs'); "
        "0: only before the first and after the last step",
        low=0,
        interval=True,
    )
    eval_batches: int = field(0, "Batches per evaluation; 0: all held-out records", low=0)
    patience: int = field(
        0,
        "Number of evaluations in a row without a better score (checkpoint.best_score) after which the run stops; 0: never",
        low=0,
    )

    def __post_init__(self) -> None:
        if self.epochs and self.steps != DEFAULT_STEPS:
            raise UserError(
                f"train.epochs={self.epochs:g} and train.steps={self.steps} both give the length of the run; set "
                f"train.epochs=0, or leave train.steps at its default, {DEFAULT_STEPS}"
            )
        if self.batch_size % self.accumulate:
            raise UserError(
                f"train.batch_size={self.batch_size} must be a multiple of train.accumulate={self.accumulate}"
            )
        if self.patience and not self.eval_every:
            raise UserError(
                f"train.patience={self.patience} requires evaluations during the training; set train.eval_every, or "
                "train.patience=0"
            )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The evaluation of generated answers."""

    exact_match: int = field(0, "Number of held-out prompts to answer and score; 0: none", low=0)
    metrics: tuple[str, ...] = field(("exact_match",), "Metrics of the generated answers: exact_match, bleu, rouge_l")
    max_new_tokens: int = field(64, "Maximum length of a generated answer in tokens", low=1)
    samples: int = field(
        0, "Number of generated answers to print and report; with exact_match, the first of the scored answers", low=0
    )

    def __post_init__(self) -> None:
        check_answer_metrics(self.metrics)

    @property
    def marks_answers(self) -> bool:
        """Whether each answer is marked as right or wrong. BLEU and ROUGE-L alone do not tell which it is."""
        return self.exact_match > 0 and "exact_match" in self.metrics


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved, and which of them are kept."""

    every: int | str = field(
        100,
        "Checkpoint interval: a number of steps, a percentage of the run ('10%'), or epochs ('0.5 epochs')",
        low=1,
        interval=True,
    )
    minutes: float = field(
        10.0,
        "Maximum age of the last checkpoint in minutes, checked whenever metrics are logged; 0: never save by time",
        low=0,
    )
    keep: int = field(2, "Number of most recent checkpoints to keep", low=1)
    keep_best: bool = field(True, "Also keep the checkpoint with the best score")
    best_score: str = field(
        "eval_loss",
        "Score that selects the best checkpoint: the lowest loss or perplexity, or the highest value of any other evaluation "
        "score, such as accuracy or exact_match",
    )
    export: str = field("last", "Checkpoint whose weights are the result of the run", choices=("last", "best"))
    adapter: bool = field(False, "Also write adapter/ with every checkpoint, not only at the end")

    def __post_init__(self) -> None:
        if self.export == "best" and not self.keep_best:
            raise UserError(
                "checkpoint.export='best' needs the best checkpoint; set checkpoint.keep_best=True, or checkpoint.export='last'"
            )

    def score(self, scores: Mapping[str, float]) -> float | None:
        """What ranks a checkpoint with these scores, higher for a better one; None without an evaluation."""
        return sort_key(self.best_score, scores[self.best_score]) if self.best_score in scores else None
