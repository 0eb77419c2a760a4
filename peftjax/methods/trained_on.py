"""On what base an adapter was trained: in which formats its kernels were, and by how much that moved them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from peftjax.core import variables
from peftjax.quant import FORMATS
from peftjax.quant.base import Quantized


def formats(model: Any) -> dict[str, str]:
    """The format of every quantized kernel, by path."""
    leaves = variables.flat(model)[1]
    values = {path: leaf.get_value() for path, leaf in leaves.items()}
    return {path: value.format for path, value in values.items() if isinstance(value, Quantized)}


def remember(model: Any, name: str, recorded: Mapping[str, str]) -> None:
    """Keep with the model in which formats the kernels were that the adapter called `name` was trained on."""
    others = tuple(item for item in getattr(model, "trained_on", ()) if item[0] != name)
    model.trained_on = (*others, (name, tuple(sorted(recorded.items()))))


def forget(model: Any, name: str) -> None:
    """Undo `remember`."""
    if hasattr(model, "trained_on"):
        model.trained_on = tuple(item for item in model.trained_on if item[0] != name)


def moved(model: Any, name: str) -> dict[str, float]:
    """||W' - W|| / ||W|| for each kernel W that is not quantized here but was, as W', where the adapter was trained. It is
    the expected error of x W' for an x of independent parts."""
    recorded = dict(dict(getattr(model, "trained_on", ())).get(name, ()))
    found = {}
    for path, leaf in variables.flat(model)[1].items():
        if path in recorded and not isinstance(leaf.get_value(), Quantized):
            found[path] = error(FORMATS[recorded[path]], leaf.get_value())
    return found


def error(encode: Callable[[jax.Array], Quantized], kernel: jax.Array) -> float:
    """||encode(W) - W|| / ||W|| over a kernel [in, out] or a stack of them, one layer in memory at a time."""

    def squares(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        exact = kernel.astype(jnp.float32)
        return jnp.sum(jnp.square(encode(kernel).astype(jnp.float32) - exact)), jnp.sum(jnp.square(exact))

    layers = kernel.reshape(-1, *kernel.shape[-2:])
    difference, norm = jax.jit(lambda layers: jax.lax.map(squares, layers))(layers)
    return float(jnp.sqrt(difference.sum() / norm.sum()))


def change(old: Quantized, new: jax.Array) -> float:
    """||new - old|| / ||old||."""
    exact = old.astype(jnp.float32)
    return float(jnp.linalg.norm((new - exact).ravel()) / jnp.linalg.norm(exact.ravel()))


def told(errors: Mapping[str, float]) -> str:
    """The mean and the largest of some errors, in words."""
    worst = max(errors, key=lambda path: errors[path])
    return f"{sum(errors.values()) / len(errors):.2%} on average, {worst} most, by {errors[worst]:.2%}"
