"""Tasks whose model writes text: the loss and the metrics are per token."""

import math
from typing import ClassVar

import numpy as np

from peftjax.tasks.base import Task
from peftjax.totals import Totals


class GenerationTask(Task):
    """A task that predicts tokens; its metrics follow from the sums of the loss."""

    generates: ClassVar[bool] = True
    loss_unit: ClassVar[str] = "nats per token"

    def metrics(self, totals: Totals, logits: np.ndarray | None, labels: np.ndarray | None) -> dict[str, float]:
        """eval_loss in nats per token, perplexity = exp(eval_loss), and the share of tokens with the largest logit."""
        del logits, labels
        loss, tokens, correct = map(float, totals[:3])
        return {
            "eval_loss": loss / tokens,
            "perplexity": math.exp(min(loss / tokens, 700.0)),  # no overflow
            "token_accuracy": correct / tokens,
            "eval_tokens": tokens,
        }
