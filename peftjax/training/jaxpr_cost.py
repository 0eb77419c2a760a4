"""The cost of a program before it is compiled, counted in its jaxpr.

Layers and microbatches are loops in this code base. The body of a loop counts as often as it runs.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from peftjax.quant.grouped import IN_USE

Atom = core.Var | core.Literal  # an operand


def bits(dtype: jnp.dtype) -> int:
    """Return the number of bits in which an element is stored: 4 for int4, 8 for bool."""
    random_key = jnp.issubdtype(dtype, jax.dtypes.extended)
    return 8 * int(dtype.itemsize) if random_key else jax.dtypes.itemsize_bits(dtype)


def matmul_flops(jaxpr: core.Jaxpr, blocks_in_use: float = 1.0) -> int:
    """Return the sum of 2 M N K over all matrix products that the program runs, on all devices together.

    `blocks_in_use` is the share of the blocks of a mixture of experts that are in use; see `quant.grouped`.
    """
    return round(_matmul_flops(jaxpr, blocks_in_use))


def _matmul_flops(jaxpr: core.Jaxpr, blocks_in_use: float) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = _shape(equation.invars[0])
            total += 2 * math.prod(_shape(equation.outvars[0])) * math.prod(left[axis] for axis in contracted)
        inner = [trips * _matmul_flops(body, blocks_in_use) for body, trips in _inner(equation)]
        if equation.primitive.name == "cond":
            skipped = IN_USE in str(equation.source_info.name_stack)
            total += max(inner, default=0) * (blocks_in_use if skipped else 1)
        else:
            total += sum(inner)
    return total


def live_bytes(jaxpr: core.Jaxpr) -> int:
    """Return an estimate of the peak memory of the program's intermediate values, its arguments excluded.

    The model: one operation runs after the other. An array is kept until its last use. An element-wise result is written
    to memory only where `_materialized` says so; elsewhere a compiler fuses it into its consumer. A loop holds its
    results, such as the values of every layer that the backward pass reads, and the peak of one pass through its body.
    """
    last = {var: index for index, equation in enumerate(jaxpr.eqns) for var in _variables(equation.invars)}
    last |= dict.fromkeys(_variables(jaxpr.outvars), len(jaxpr.eqns))
    materialized = _materialized(jaxpr)
    held: dict[core.Var, int] = {}
    peak = 0
    for index, equation in enumerate(jaxpr.eqns):
        inside = _devices(equation) * max((live_bytes(body) for body, _ in _inner(equation)), default=0)
        written = _is_written(equation)
        made = {var: _bytes(var) if written or var in materialized else 0 for var in equation.outvars}
        own = sum(made.values())
        peak = max(peak, sum(held.values()) + (own + inside if _is_loop(equation) else max(own, inside)))
        held |= {var: size for var, size in made.items() if last.get(var, -1) > index}
        for var in _variables(equation.invars):
            if last[var] == index:
                held.pop(var, None)
    return peak


def stored_bytes(jaxpr: core.Jaxpr) -> int:
    """Return a lower bound of the memory of the program's intermediate values: the most that one of its loops stores.

    A loop's stacked results, such as the values of every layer that the backward pass reads, exist together when it ends.
    Arrays of one size count once, because a compiler may find two of them to be equal. Loops of one trip, arrays that
    nothing reads, and those that are sent to another memory do not count.
    """
    read = {*_variables(var for equation in jaxpr.eqns for var in equation.invars), *_variables(jaxpr.outvars)}
    most = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan" and equation.params["length"] > 1:
            ((body, _),) = _inner(equation)
            pairs = zip(equation.outvars, body.outvars, strict=True)  # the carry, then what each trip adds to a stack
            stacked = [var for var, one in pairs if len(_shape(var)) > len(_shape(one))]
            kept = {_bytes(var) for var in stacked if var in read and _aval(var).memory_space != jax.memory.Space.Host}
            most = max(most, sum(kept))
        most = max([most, *(stored_bytes(body) for body, _ in _inner(equation))])
    return most


def _devices(equation: core.JaxprEqn) -> int:
    """The number of devices that run what is inside of an operation, each on its shards."""
    return int(equation.params["mesh"].size) if equation.primitive.name == "shard_map" else 1


def _is_loop(equation: core.JaxprEqn) -> bool:
    """Whether an operation is a loop of more than one trip."""
    return equation.primitive.name == "while" or equation.params.get("length", 1) > 1


def _materialized(jaxpr: core.Jaxpr) -> set[core.Var]:
    """The variables that a product reads, or both a reduction and another operation, such as a softmax's numerators."""
    readers: dict[core.Var, list[str]] = {}
    for equation in jaxpr.eqns:
        for var in _variables(equation.invars):
            readers.setdefault(var, []).append(equation.primitive.name)
    return {
        var
        for var, names in readers.items()
        if "dot_general" in names or (len(names) > 1 and any(name.startswith("reduce_") for name in names))
    }


# These write their results to memory. All other operations are taken to be fused into their consumers.
_WRITTEN = ("dot_general", "conv", "scan", "while", "sort", "scatter", "concatenate", "dynamic_update", "cum")


def _is_written(equation: core.JaxprEqn) -> bool:
    return equation.primitive.name.startswith(_WRITTEN) or any(
        _is_written(own) for body, _ in _inner(equation) for own in body.eqns
    )


def _variables(operands: Iterable[Atom]) -> list[core.Var]:
    """The operands that are not literals."""
    return [operand for operand in operands if isinstance(operand, core.Var)]


def _shape(var: Atom) -> tuple[int, ...]:
    return tuple(_aval(var).shape)


def _bytes(var: Atom) -> int:
    return math.prod(_shape(var)) * bits(_aval(var).dtype) // 8


def _aval(var: Atom) -> Any:
    return var.aval  # of an array, or of a reference to one inside of a kernel


def _inner(equation: core.JaxprEqn) -> Iterator[tuple[core.Jaxpr, int]]:
    """The programs inside of an operation, and how often each of them runs."""
    trips = _devices(equation)
    if equation.primitive.name == "scan":
        trips = equation.params["length"]
    elif equation.primitive.name == "pallas_call":
        trips = math.prod(size for size in equation.params["grid_mapping"].grid if isinstance(size, int))
    for parameter in equation.params.values():
        for value in parameter if isinstance(parameter, tuple | list) else (parameter,):
            if isinstance(value, core.ClosedJaxpr):
                yield value.jaxpr, trips
            elif isinstance(value, core.Jaxpr):
                yield value, trips
