"""report.json: what a run records for its report beside its config and its log."""

import dataclasses
import json
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.core.errors import UserError
from peftjax.core.files import write_atomically
from peftjax.core.variables import PeftParam

DATA, PAGE = "report.json", "report.html"


@dataclasses.dataclass(frozen=True)
class Part:
    """The parameters of a group of modules, over all layers. adapter: a method added them; trained: it trains them."""

    name: str
    parameters: int
    bytes: int
    adapter: bool
    trained: bool


@dataclasses.dataclass(frozen=True)
class Sample:
    """One answer of the model. expected, correct: None where there is no one right answer."""

    record: str
    prompt: str
    answer: str
    expected: str | None = None
    correct: bool | None = None


@dataclasses.dataclass(frozen=True)
class ReportData:
    """What the report shows that is neither in config.json nor in metrics.jsonl; report.json has these very fields.

    Each may be left empty, and its section is then left out. The train command saves `before` when it starts, since a
    resumed run cannot answer as the untrained model any more, and the rest when it ends.
    """

    title: str = ""  # of the page; empty: the name of the workdir
    parts: tuple[Part, ...] = ()
    optimizer_bytes: int = 0
    adapter_file_bytes: int = 0
    before: tuple[Sample, ...] = ()  # answers before the first step
    after: tuple[Sample, ...] = ()  # answers to the same prompts after the last one; paired by record and prompt
    timings: Mapping[str, float] = dataclasses.field(default_factory=dict)  # seconds by what took them
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # as config.json, with no field changed

    def save(self, workdir: Path) -> None:
        """Write report.json."""
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(workdir / DATA, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, workdir: Path) -> "ReportData":
        """Read report.json; all fields are empty where there is none.

        Raises:
            UserError: it is not what `save` writes.
        """
        path = workdir / DATA
        values = read_object(path) if path.exists() else {}
        try:
            for name, kind in (("parts", Part), ("before", Sample), ("after", Sample)):
                values[name] = tuple(kind(**fields) for fields in values.get(name, ()))
            return cls(**values)
        except TypeError as error:
            raise UserError(f"{path}: {error}. Remove the file, and run the training command again") from None


def count_parts(leaves: Mapping[str, nnx.Variable], trains: type[nnx.Variable]) -> tuple[Part, ...]:
    """The model's parameters by part: the base's by the first two names of their path, an adapter's by its module.

    leaves: from `variables.flat`; trains: the type that the method trains. Constants and keys are no parameters.
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


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays in a tree, counted once however many devices hold a copy; two int4 take one byte."""
    return sum(math.ceil(leaf.size * _bits(leaf.dtype) / 8) for leaf in jax.tree.leaves(tree))


def _bits(dtype: Any) -> int:
    if jnp.issubdtype(dtype, jnp.integer):
        return int(jnp.iinfo(dtype).bits)
    return int(jnp.finfo(dtype).bits) if jnp.issubdtype(dtype, jnp.floating) else 8 * jnp.dtype(dtype).itemsize


def versions() -> dict[str, str]:
    """Of what a run is made of, and the devices it runs on."""
    import flax

    count, kind = jax.device_count(), jax.devices()[0].device_kind
    found = {"Python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__}
    return found | {"device": f"{count} x {kind}" if count > 1 else kind}


def read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object but {type(values).__name__}")
    return values
