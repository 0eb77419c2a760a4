"""The command that lists all methods for one model: trainable parameters, their share of the base, adapter file size.

    peftjax list-methods [--model=DIR] [--method=lora]

All figures are computed from shapes: only config.json of the model is read. `--method` explains one method and its options.
"""

import argparse
import dataclasses
import inspect
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from rich.console import Console
from rich.table import Table

from peftjax import adapters, methods
from peftjax.adapters.adapter import MethodAdapter
from peftjax.adapters.sites import adapters_named
from peftjax.core import cli
from peftjax.core.errors import UserError
from peftjax.core.terminal import make_console, simple_table
from peftjax.core.units import format_bytes
from peftjax.io.adapter_tensors import adapter_tensors
from peftjax.io.hf_config import read_fields
from peftjax.io.hf_files import find_model
from peftjax.models import from_hf_config
from peftjax.models.base import ModelConfig

# Options without which a method cannot be made, for the table. AdaLoRA's size does not depend on its total_steps;
# trainable_tokens is counted for one token.
_REQUIRED: dict[str, dict[str, Any]] = {"adalora": {"total_steps": 1000}, "trainable_tokens": {"token_indices": (0,)}}


class MethodSummary(NamedTuple):
    """A method with its default options on one model.

    Attributes:
        name: Name of the method.
        trained: Number of trainable parameters.
        share: Their share of the base's parameters.
        file_bytes: Size of the tensors in the adapter file; 0 if the method has no adapter file.
        merges: Whether the adapter can be merged into the base's weights; None if the method trains these themselves.
        refused: Why the method does not fit the model; empty if it does.
    """

    name: str
    trained: int
    share: float
    file_bytes: int
    merges: bool | None
    refused: str


def summarize(config: ModelConfig, name: str) -> MethodSummary:
    """Count the parameters that a method would train in a model with this config, from shapes alone."""
    counted = {"base": 0, "trained": 0}
    merges: bool | None = None

    def attached() -> dict[str, jax.Array]:
        nonlocal merges
        method = methods.METHODS[name](**_REQUIRED.get(name, {}))
        model = config.make(nnx.Rngs(0))
        counted["base"] = counted["trained"] = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
        if method.trains_base:
            return {}
        adapters.attach(model, method, rngs=nnx.Rngs(0))
        counted["trained"] = adapters.count_trainable(model)
        merges = all(type(one).merged is not MethodAdapter.merged for _, one in adapters_named(model, "default"))
        return adapter_tensors(model, "default")

    try:
        tensors = jax.eval_shape(attached)
    except UserError as error:
        return MethodSummary(name, 0, 0.0, 0, None, str(error))
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in tensors.values())
    return MethodSummary(name, counted["trained"], counted["trained"] / counted["base"], size, merges, "")


def methods_table(summaries: Sequence[MethodSummary]) -> Table:
    """Return the table of some methods. Methods that do not fit the model refer to a note, numbered in their order."""
    shown = simple_table()
    shown.add_column("method", no_wrap=True)
    for heading in ("trainable", "of base", "file size"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("merges")
    notes = itertools.count(1)
    for found in summaries:
        if found.refused:
            shown.add_row(found.name, "-", "-", "-", f"does not fit [{next(notes)}]")
            continue
        size = format_bytes(found.file_bytes) if found.file_bytes else "full model"
        merges = "-" if found.merges is None else "yes" if found.merges else "no"
        shown.add_row(found.name, f"{found.trained:,}", f"{found.share:.2%}", size, merges)
    return shown


def equations(names: Iterable[str]) -> Table:
    """Return a table of what some methods compute."""
    shown = Table.grid(padding=(0, 2, 0, 0))
    for name in names:
        shown.add_row(name, _equation(methods.METHODS[name]))
    return shown


def _equation(cls: type[adapters.Method]) -> str:
    """The equation of a method, from a line of its documentation.

    This is the first line of its file: "LoRA: y = x W + s (x A) B, with ..." after the colon. Of methods that share a file,
    it is the first line of the class.
    """
    module = inspect.getmodule(cls)
    shared = sum(inspect.getmodule(other) is module for other in methods.METHODS.values()) > 1
    name, _, rest = _documentation(cls if shared else module).partition("\n")[0].partition(": ")
    return (rest or name).rstrip(".")


def print_methods(config: ModelConfig, console: Console) -> None:
    """Print the table of all methods with their default options, what they compute, and why some do not fit the model."""
    summaries = [summarize(config, name) for name in sorted(methods.METHODS)]
    console.print(methods_table(summaries))
    console.print(equations(found.name for found in summaries))
    console.print()
    for name, options in _REQUIRED.items():
        given = ", ".join(f"{option}={value!r}" for option, value in options.items())
        console.print(f"{name} is counted with {given}.")
    for number, found in enumerate((found for found in summaries if found.refused), 1):
        console.print(f"[{number}] {found.name} does not fit with its default options: {found.refused}")


def explain(name: str, console: Console) -> None:
    """Print a method's equation and source, its options, and their defaults."""
    cls = methods.method_class(name)
    declaring = cls.__mro__[: cls.__mro__.index(adapters.Method)]  # options are explained where they are declared
    texts = [_documentation(part) for part in (inspect.getmodule(cls), *declaring)]
    console.print("\n\n".join(texts), soft_wrap=True)
    defaults = simple_table("option", "default")
    for field in dataclasses.fields(cls):
        defaults.add_row(field.name, _default(field))
    console.print(defaults)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "required" if field.default is dataclasses.MISSING else repr(field.default)


def _documentation(documented: Any) -> str:
    return (inspect.getdoc(documented) or "").strip()


def main(argv: list[str]) -> None:
    """Run the command: print the table of all methods, or explain one."""
    parser = argparse.ArgumentParser(
        prog=cli.program("list_methods"),
        description="List all methods with the parameters they would train in a model, or explain one method.",
    )
    parser.add_argument(
        "--model",
        default="embedded",
        metavar="DIR",
        help='Hugging Face directory, hub id, or "embedded" for the bundled model (default)',
    )
    parser.add_argument("--method", metavar="NAME", help="Explain this method and its options instead")
    given = cli.parse_options(parser, argv)
    cli.require_value(given, "model")
    console = make_console()
    if given.method:
        explain(given.method, console)
        return
    directory = find_model(given.model, files=("config.json",))
    print_methods(from_hf_config(read_fields(directory)[0]), console)


if __name__ == "__main__":
    cli.run(main)
