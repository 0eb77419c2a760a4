"""The classes of a task: their names, and the numbers of the classes in records."""

import re
from collections.abc import Mapping
from typing import Any

from peftjax.core.errors import UserError
from peftjax.core.paths import suggest
from peftjax.models.heads import stored_labels
from peftjax.tasks.base import Task


class Labels:
    """The class names of a task, in the order of their numbers.

    Attributes:
        names: task.labels if there are any, else those of the checkpoint's own head.
    """

    def __init__(self, task: Task, architecture: str, example: tuple[str, ...] = ()) -> None:
        """
        Args:
            task: The task, with the labels it was given.
            architecture: The ending of transformers' names for models with this kind of head, such as
                "ForSequenceClassification".
            example: Names to suggest if there are none.

        Raises:
            UserError: There are no names, or one occurs twice.
        """
        self.names = task.given_labels or _stored(task.hf_config, architecture)
        self._field = task.data.label_field
        if not self.names:
            raise UserError(
                f"task.labels is empty, and the checkpoint in {task.directory} has no head with class names. Name the "
                f"classes in the order of their numbers, for example task.labels={example or ('negative', 'positive')}"
            )
        self._numbers = {name: number for number, name in enumerate(self.names)}
        self._numeric = all(name.removeprefix("-").isdecimal() for name in self.names)
        if twice := [name for number, name in enumerate(self.names) if self._numbers[name] != number]:
            raise UserError(f"task.labels has {twice[0]!r} twice")

    def number(self, label: Any, record: str) -> int:
        """The number of a class that a record gives by number or by name.

        If all names are whole numbers, such as "1" to "5", a number in a record is a name.

        Raises:
            UserError: There is no such class.
        """
        if self._numeric and type(label) is int:
            label = str(label)
        if isinstance(label, str):
            if label not in self._numbers:
                raise UserError(
                    f"{record}: field {self._field!r} has the class {label!r}, which is not in task.labels."
                    f"{suggest(label, self.names)} Classes: {', '.join(map(repr, self.names[:20]))}{self._why(label)}"
                )
            return self._numbers[label]
        if not isinstance(label, int) or not 0 <= label < len(self.names):
            raise UserError(
                f"{record}: field {self._field!r} has the class {label!r}; it must be a whole number from 0 to "
                f"{len(self.names) - 1} or one of the {len(self.names)} names in task.labels{self._why(label)}"
            )
        return label

    def _why(self, label: Any) -> str:
        """The end of a message: where a label that is no class may come from; empty if that is not known."""
        if label == -1:
            return "; records of GLUE's test splits have no labels"
        if isinstance(label, float):
            return "; pandas turns a column with a missing value into floats: 1 is 1.0, and the missing value is NaN"
        if isinstance(label, str) and re.fullmatch(r"\d+\.0" if self._numeric else r"\d+(\.0)?", label, re.ASCII):
            return "; it is text, as all values of a CSV column are if one of them is missing or is not a number"
        return ""


def _stored(config: Mapping[str, Any], architecture: str) -> tuple[str, ...]:
    """The classes of a checkpoint's own head; empty if its head is of another kind, or it has none."""
    if not any(name.endswith(architecture) for name in config.get("architectures") or ()):
        return ()
    return stored_labels(dict(config))
