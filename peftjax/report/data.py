"""report.json: what a run records for its report in addition to its config and its log."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from peftjax.core.errors import UserError
from peftjax.core.files import write_atomically
from peftjax.core.json_numbers import to_json
from peftjax.core.variables import PeftParam
from peftjax.report.classes import Classes

DATA, PAGE = "report.json", "report.html"


@dataclasses.dataclass(frozen=True)
class Part:
    """The parameters of a group of modules, summed over all layers.

    Attributes:
        name: Path of the module, or of the group of modules.
        parameters: Number of parameters.
        bytes: Their size.
        adapter: Whether a method added them.
        trained: Whether they are trained.
    """

    name: str
    parameters: int
    bytes: int
    adapter: bool
    trained: bool


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer of the model.

    Attributes:
        record: Name of the record.
        prompt: The prompt.
        answer: The model's answer.
        expected: The expected answer.
        correct: Whether the answer equals the expected one, up to surrounding spaces; None if answers are not scored.
    """

    record: str
    prompt: str
    answer: str
    expected: str
    correct: bool | None = None


@dataclasses.dataclass(frozen=True)
class ReportData:
    """The data of a report that is in neither config.json nor metrics.jsonl. report.json has exactly these fields.

    Each field may be empty; its section is then left out of the page. The train command saves `before` when it starts,
    because a resumed run no longer has the untrained model, and the other fields when it ends.

    Attributes:
        parts: The model's parameters by part.
        optimizer_bytes: Size of the optimizer state.
        adapter_file_bytes: Size of the adapter file.
        before: Answers before the first step.
        after: Answers to the same prompts after the last step, paired with `before` by record and prompt.
        classes: The predictions of the last evaluation of a classification task.
        counts: The counts of the training data, from `Batches.summary`.
        loss_unit: The unit of the loss.
        padding: The fraction of the positions in its rows that hold padding.
        sweep: Whether the run belongs to a sweep, whose page is in the parent directory.
        timings: Seconds by activity.
        origin: The command, the workdir, and the git commit.
        versions: Versions of the software, and the device.
        default_config: The defaults of the fields in config.json.
    """

    parts: tuple[Part, ...] = ()
    optimizer_bytes: int = 0
    adapter_file_bytes: int = 0
    before: tuple[Answer, ...] = ()
    after: tuple[Answer, ...] = ()
    classes: Classes | None = None
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    loss_unit: str = ""
    padding: float | None = None
    sweep: bool = False
    timings: Mapping[str, float] = dataclasses.field(default_factory=dict)
    origin: Mapping[str, str] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, workdir: Path) -> None:
        """Write report.json into the workdir."""
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(workdir / DATA, to_json(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, workdir: Path) -> "ReportData":
        """Read report.json from the workdir. All fields are empty if there is no such file.

        Raises:
            UserError: The file is not what `save` writes.
        """
        path = workdir / DATA
        values = read_recorded_object(path) if path.exists() else {}
        values.pop("title", None)  # of earlier versions, where it was always empty
        try:
            for name, kind in (("parts", Part), ("before", Answer), ("after", Answer)):
                values[name] = tuple(kind(**fields) for fields in values.get(name, ()))
            if values.get("classes") is not None:
                values["classes"] = Classes.from_json(values["classes"])
            return cls(**values)
        except TypeError as error:
            raise UserError(f"{path}: {error}; remove the file and run the training command again") from None


def count_parts(leaves: Mapping[str, nnx.Variable], trains: type[nnx.Variable]) -> tuple[Part, ...]:
    """Count a model's parameters by part: the first two names of the path for the base, the module for an adapter.

    Constants and random keys are not counted. `trains` is the variable type that the method trains.
    """
    sums: dict[tuple[str, bool, bool], list[int]] = {}
    for path, leaf in leaves.items():
        if not isinstance(leaf, nnx.Param | PeftParam):
            continue
        adapter = isinstance(leaf, PeftParam)
        module = path.split(".adapters.")[0] if adapter else ".".join(path.split(".")[:-1][:2])
        total = sums.setdefault((module, adapter, type(leaf) is trains), [0, 0])
        total[0] += math.prod(leaf.get_value().shape)
        total[1] += tree_bytes(leaf.get_value())
    return tuple(
        Part(name, parameters, size, adapter, trained) for (name, adapter, trained), (parameters, size) in sums.items()
    )


def count_trained(parts: Sequence[Part]) -> tuple[int, int]:
    """Return the number of trainable parameters, and the number of parameters in the base."""
    trained = sum(part.parameters for part in parts if part.trained)
    return trained, sum(part.parameters for part in parts if not part.adapter)


def tree_bytes(tree: Any) -> int:
    """Return the bytes of all arrays in a tree. An array on several devices counts once; two int4 take one byte."""
    return sum(math.ceil(leaf.size * jax.dtypes.itemsize_bits(leaf.dtype) / 8) for leaf in jax.tree.leaves(tree))


def read_recorded(path: Path) -> Any:
    """Read a JSON file that a run has written. Unlike in `io.json_files`, it may hold paths that are not valid Unicode.

    Raises:
        UserError: The file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None


def read_recorded_object(path: Path) -> dict[str, Any]:
    """Read a JSON object that a run has written.

    Raises:
        UserError: The file does not hold one.
    """
    values = read_recorded(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object but {type(values).__name__}")
    return values
