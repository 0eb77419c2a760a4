"""What a Python program adds to the config of a run, and the result that it gets."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import optax

from peftjax.core.errors import UserError
from peftjax.log import PLACE
from peftjax.models.base import Model


class Trained(NamedTuple):
    """The result of a finished run.

    Attributes:
        model: The trained model with its adapter, in evaluation mode.
        scores: The metrics of the evaluation of these weights, or else of the last evaluation; empty if there was none.
        path: The directory of the adapter, or in full fine-tuning of the model.
    """

    model: Model
    scores: dict[str, float]
    path: Path


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What a Python program adds to the config of a run; `peftjax.train` describes each of them.

    Attributes:
        model: A loaded base model, to use instead of loading the one of the config.
        optimizer: An optimizer, to use instead of the one of `config.optim`.
        on_metrics: Called by process 0 with each line of metrics.jsonl.
        on_evaluate: Called at each evaluation; it returns additional scores.
    """

    model: Model | None = None
    optimizer: optax.GradientTransformation | None = None
    on_metrics: Callable[[dict[str, Any]], None] | None = None
    on_evaluate: Callable[[Model, int], Mapping[str, float]] | None = None

    def scores(self, model: Model, step: int, others: Mapping[str, float]) -> dict[str, float]:
        """The scores that `on_evaluate` returns for the model after `step` steps; `others` are the scores already known.

        Raises:
            UserError: It does not return a mapping from strings to numbers, or one of the names is taken.
        """
        assert self.on_evaluate is not None
        given = self.on_evaluate(model, step)
        try:
            scores = {name: float(value) for name, value in given.items()}
        except (AttributeError, TypeError, ValueError):
            raise UserError(f"on_evaluate must return a mapping from names to numbers, not {given!r}") from None
        if unnamed := [name for name in scores if not isinstance(name, str)]:
            raise UserError(f"on_evaluate returned a score with the name {unnamed[0]!r}; a name must be a string")
        if taken := sorted(scores.keys() & {*others, *PLACE}):
            raise UserError(f"on_evaluate returned {taken}, which are already logged; use other names")
        return scores


NO_HOOKS = Hooks()
