"""The base that an adapter was trained on: its name, the formats of its kernels, and how far they are from this model's."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.adapters.registry import BaseName, registry_of, set_registry
from peftjax.core import variables
from peftjax.quant import quantize
from peftjax.quant.base import Quantized


def formats(model: nnx.Module) -> dict[str, str]:
    """Return the format of every quantized kernel, by path."""
    return formats_of({path: leaf.get_value() for path, leaf in variables.flat(model)[1].items()})


def formats_of(parameters: Mapping[str, Any]) -> dict[str, str]:
    """Return the format of those parameters, given by path, that are quantized."""
    return {path: value.format for path, value in parameters.items() if isinstance(value, Quantized)}


def base_name(model: nnx.Module, name: str) -> BaseName | None:
    """Return the name of the base in the file that adapter `name` was loaded from; None if the file does not name it."""
    return dict(registry_of(model).bases).get(name)


def remember_base(model: nnx.Module, name: str, base: BaseName | None) -> None:
    """Record the name of the base in the file of adapter `name`, if the file names it."""
    if base is not None:
        set_registry(model, registry_of(model).with_base(name, base))


def moved(model: nnx.Module, name: str) -> dict[str, float]:
    """Return ||W' - W|| / ||W|| by path, for each kernel W whose quantized version W' the adapter was trained on.

    Kernels that are quantized in this model are left out. The value is the expected relative error of x W' for an x of
    independent components.
    """
    recorded = dict(dict(registry_of(model).trained_on).get(name, ()))
    found = {}
    for path, leaf in variables.flat(model)[1].items():
        if path in recorded and not isinstance(leaf.get_value(), Quantized):
            kernel = leaf.get_value()
            found[path] = distance(quantize(kernel, recorded[path]), kernel)
    return found


def distance(one: jax.Array | Quantized, other: jax.Array | Quantized) -> float:
    """||one - other|| / ||other|| of two kernels [in, out] or two stacks of them, decoding one layer at a time."""

    def squares(pair: tuple[jax.Array | Quantized, jax.Array | Quantized]) -> tuple[jax.Array, jax.Array]:
        a, b = (kernel.astype(jnp.float32) for kernel in pair)
        return jnp.sum(jnp.square(a - b)), jnp.sum(jnp.square(b))

    over = squares if other.ndim == 2 else lambda pair: jax.lax.map(squares, pair)
    difference, norm = jax.jit(over)((one, other))
    return float(jnp.sqrt(difference.sum() / norm.sum()))


def describe_errors(errors: Mapping[str, float]) -> str:
    """Describe the mean and the largest of relative errors, which are given by path."""
    worst = max(errors, key=lambda path: errors[path])
    return f"{sum(errors.values()) / len(errors):.2%} on average, at most {errors[worst]:.2%} ({worst})"
