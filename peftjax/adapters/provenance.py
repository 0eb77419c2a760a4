"""On what base an adapter was trained: in which formats its kernels were, and by how much that moved them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from peftjax.core import variables
from peftjax.quant import quantize
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
            kernel = leaf.get_value()
            found[path] = distance(quantize(kernel, recorded[path]), kernel)
    return found


def distance(one: jax.Array | Quantized, other: jax.Array | Quantized) -> float:
    """||one - other|| / ||other|| of two kernels [in, out] or two stacks of them, one layer decoded at a time."""

    def squares(pair: Any) -> tuple[jax.Array, jax.Array]:
        a, b = (kernel.astype(jnp.float32) for kernel in pair)
        return jnp.sum(jnp.square(a - b)), jnp.sum(jnp.square(b))

    over = squares if other.ndim == 2 else lambda pair: jax.lax.map(squares, pair)
    difference, norm = jax.jit(over)((one, other))
    return float(jnp.sqrt(difference.sum() / norm.sum()))


def told(errors: Mapping[str, float]) -> str:
    """The mean and the largest of some errors, in words."""
    worst = max(errors, key=lambda path: errors[path])
    return f"{sum(errors.values()) / len(errors):.2%} on average, {worst} most, by {errors[worst]:.2%}"
