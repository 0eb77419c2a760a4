"""What a program costs before a compiler has seen it, counted in its jaxpr.

Layers and microbatches are loops here, and what is in a loop counts as often as it runs.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax.extend import core


def bits(dtype: Any) -> int:
    """Of an element as it is stored: 4 of int4."""
    if jnp.issubdtype(dtype, jnp.integer):
        return int(jnp.iinfo(dtype).bits)
    return int(jnp.finfo(dtype).bits) if jnp.issubdtype(dtype, jnp.floating) else 8 * int(dtype.itemsize)


def matmul_flops(jaxpr: core.Jaxpr) -> int:
    """2 M N K of every product of the program, summed, those in loops as often as they run: of all devices together."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = _shape(equation.invars[0])
            total += 2 * math.prod(_shape(equation.outvars[0])) * math.prod(left[axis] for axis in contracted)
        inner = [trips * matmul_flops(body) for body, trips in _inner(equation)]
        total += max(inner, default=0) if equation.primitive.name == "cond" else sum(inner)
    return total


def live_bytes(jaxpr: core.Jaxpr) -> int:
    """The most bytes of arrays beside its arguments that the program holds at one time, if it ran one operation after the
    other, kept an array until its last use, and wrote down what is computed element by element only where it is read as
    `_read_whole` says (elsewhere a compiler computes it where it is used). A loop holds its results, such as what the backward
    pass reads of each layer, and what one pass through its body holds."""
    last = {var: index for index, equation in enumerate(jaxpr.eqns) for var in equation.invars if _is_var(var)}
    last |= dict.fromkeys((var for var in jaxpr.outvars if _is_var(var)), len(jaxpr.eqns))
    factors = _read_whole(jaxpr)
    held: dict[Any, int] = {}
    peak = 0
    for index, equation in enumerate(jaxpr.eqns):
        loop = (
            equation.primitive.name == "while" or equation.params.get("length", 1) > 1
        )  # one of a single trip is none
        inside = max((live_bytes(body) for body, _ in _inner(equation)), default=0)
        written = _is_written(equation)
        made = {var: _bytes(var) if written or var in factors else 0 for var in equation.outvars}
        own = sum(made.values())
        peak = max(peak, sum(held.values()) + (own + inside if loop else max(own, inside)))
        held |= {var: size for var, size in made.items() if last.get(var, -1) > index}
        for var in equation.invars:
            if _is_var(var) and last[var] == index:
                held.pop(var, None)
    return peak


def _read_whole(jaxpr: core.Jaxpr) -> set[Any]:
    """What a product reads, or a reduction and another operation, such as the numerators of a softmax."""
    readers: dict[Any, list[str]] = {}
    for equation in jaxpr.eqns:
        for var in equation.invars:
            if _is_var(var):
                readers.setdefault(var, []).append(equation.primitive.name)
    return {
        var
        for var, names in readers.items()
        if "dot_general" in names or (len(names) > 1 and any(name.startswith("reduce_") for name in names))
    }


# An array that these make is written to memory; what others make, element by element, is computed where it is read.
_WRITTEN = ("dot_general", "conv", "scan", "while", "sort", "scatter", "concatenate", "dynamic_update", "cum")


def _is_written(equation: Any) -> bool:
    return equation.primitive.name.startswith(_WRITTEN) or any(
        _is_written(own) for body, _ in _inner(equation) for own in body.eqns
    )


def _is_var(var: Any) -> bool:
    return isinstance(var, core.Var)


def _shape(var: Any) -> tuple[int, ...]:
    return tuple(var.aval.shape)


def _bytes(var: Any) -> int:
    return math.prod(_shape(var)) * bits(var.aval.dtype) // 8


def _inner(equation: Any) -> Iterator[tuple[core.Jaxpr, int]]:
    """The programs inside of an operation, and how often each runs."""
    trips = equation.params["length"] if equation.primitive.name == "scan" else 1
    for parameter in equation.params.values():
        for value in parameter if isinstance(parameter, tuple | list) else (parameter,):
            if isinstance(value, core.ClosedJaxpr):
                yield value.jaxpr, trips
            elif isinstance(value, core.Jaxpr):
                yield value, trips
