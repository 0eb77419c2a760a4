"""The kinds of tasks, one per file, and the registry that finds them by name.

A task owns its records, rows of padding, loss, metrics, unit and lengths. Adding one is a file here and an entry in
`TASKS`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftjax.core.config import field
from peftjax.core.errors import UserError
from peftjax.data.config import DataConfig
from peftjax.tasks.base import Task
from peftjax.tasks.causal_lm import CausalLM
from peftjax.tasks.classification import Classification
from peftjax.tasks.image_classification import ImageClassification
from peftjax.tasks.regression import Regression
from peftjax.tasks.seq2seq import Seq2Seq
from peftjax.tasks.token_classification import TokenClassification

TASKS: dict[str, type[Task]] = {
    cls.kind: cls for cls in (CausalLM, Seq2Seq, Classification, Regression, TokenClassification, ImageClassification)
}
Task.registry = TASKS

__all__ = ["TASKS", "Task", "TaskConfig", "make_task"]


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """The task type and its options."""

    kind: str = field(
        "causal_lm",
        "Task type: causal language modeling, sequence-to-sequence (T5), classification or regression of a text or a text "
        "pair, token classification, or image classification",
        choices=tuple(TASKS),
    )
    labels: tuple[str, ...] = field(
        (), "Class names in the order of their indices; empty: those of the checkpoint's head"
    )
    multi_label: bool = field(False, "Whether a text may have several classes at once, or none; for classification")
    router_aux_loss_coef: float = field(
        0.0,
        "Coefficient of the load-balancing loss that is added to the training loss of a mixture of experts; for causal_lm",
        low=0.0,
    )

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            readers = [kind for kind, task in TASKS.items() if each.name in task.options]
            if readers and self.kind not in readers and (value := getattr(self, each.name)) != each.default:
                raise UserError(
                    f"task.{each.name}={value!r} requires task.kind={' or '.join(map(repr, readers))}, not {self.kind!r}; "
                    f"set it to {each.default}"
                )


def make_task(
    config: TaskConfig,
    data: DataConfig,
    directory: Path,
    loss_chunk: int = 128,
    hf_config: Mapping[str, Any] | None = None,
) -> Task:
    """The task of a configuration, for the model in a directory; see `Task` for the arguments."""
    task = TASKS[config.kind]
    options = {name: getattr(config, name) for name in task.options}
    return task(data, directory, labels=config.labels, loss_chunk=loss_chunk, hf_config=hf_config, **options)
