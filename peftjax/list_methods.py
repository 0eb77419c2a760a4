"""Every method beside the others, for one model: what it trains, its share of the base, the size of its adapter file.

    python -m peftjax.list_methods [--model=DIR] [--method=lora]

Counted from the shapes alone: of a model directory only config.json is read. `--method` shows the options of one.
"""

import argparse
import dataclasses
import inspect
import math
from typing import Any, NamedTuple

import jax
from flax import nnx
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftjax import adapters, methods
from peftjax.core import cli
from peftjax.core.units import format_bytes
from peftjax.io.hf_adapter import adapter_tensors
from peftjax.io.hf_files import read_json, resolve
from peftjax.models import from_hf_config

# What a method cannot do without, for the table: AdaLoRA's size does not depend on it, that of tokens is of one token.
NEEDED: dict[str, dict[str, Any]] = {"adalora": {"total_steps": 1000}, "trainable_tokens": {"token_indices": (0,)}}


class Row(NamedTuple):
    """A method with its default options on a model; refused: why it does not fit this one, empty if it does."""

    name: str
    trained: int
    share: float
    file_bytes: int
    refused: str


def row(config: Any, name: str) -> Row:
    """What the method called `name` would train on a model, without making either."""
    counted = {"base": 0, "trained": 0}

    def attached() -> dict[str, jax.Array]:
        method = methods.METHODS[name](**NEEDED.get(name, {}))
        model = config.make(nnx.Rngs(0))
        counted["base"] = counted["trained"] = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
        if method.trains is nnx.Param:
            return {}
        adapters.attach(model, method, rngs=nnx.Rngs(0))
        counted["trained"] = adapters.count_trainable(model)
        return adapter_tensors(model, "default")

    try:
        tensors = jax.eval_shape(attached)
    except ValueError as error:
        return Row(name, 0, 0.0, 0, str(error))
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in tensors.values())
    return Row(name, counted["trained"], counted["trained"] / counted["base"], size, "")


def table(config: Any) -> Table:
    """All methods with their default options; for one that does not fit so, why."""
    shown = Table(box=box.SIMPLE, expand=True, padding=(0, 1, 0, 0))
    shown.add_column("method", no_wrap=True)
    for heading in ("trains", "of base", "file"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("", ratio=1)
    for name in sorted(methods.METHODS):
        found = row(config, name)
        if found.refused:
            shown.add_row(name, "-", "-", "-", Text(found.refused))
        else:
            size = format_bytes(found.file_bytes) if found.file_bytes else "the model"
            told = ", ".join(f"{option}={value!r}" for option, value in NEEDED.get(name, {}).items())
            told = f"with {told}" if told else first_line(methods.METHODS[name])
            said = Text(told, no_wrap=True, overflow="ellipsis")
            shown.add_row(name, f"{found.trained:,}", f"{found.share:.2%}", size, said)
    return shown


def first_line(cls: type) -> str:
    """The equation at the head of a method's file."""
    module = inspect.getmodule(cls)
    assert module is not None
    return (module.__doc__ or "").strip().partition("\n")[0]


def options(name: str) -> Table:
    """The options of a method with their defaults."""
    shown = Table("option", "default", box=box.SIMPLE)
    for field in dataclasses.fields(methods.METHODS[name]):
        shown.add_row(field.name, repr(field.default))
    return shown


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m peftjax.list_methods", description="Methods beside each other.")
    parser.add_argument("--model", default="embedded", help='a model directory, a hub id, or "embedded" (default)')
    parser.add_argument("--method", help="show the options of this one")
    given = parser.parse_args(argv)
    console = Console()
    if given.method:
        cls = methods.method_class(given.method)
        console.print(inspect.getdoc(inspect.getmodule(cls)), highlight=False, markup=False, soft_wrap=True)
        for part in cls.__mro__[: cls.__mro__.index(adapters.Method)]:  # options are explained where they are declared
            console.print("\n" + (inspect.getdoc(part) or ""), highlight=False, markup=False, soft_wrap=True)
        console.print(options(given.method))
        return
    directory = resolve(given.model)
    console.print(table(from_hf_config(read_json(directory / "config.json"))))


if __name__ == "__main__":
    cli.run(main)
