"""Loops that stack bfloat16 arrays as integers, for XLA's CPU backend.

The loop over layers stores the activations of each layer for the backward pass, and the loop of the backward pass stores the
gradients of stacked parameters. XLA's CPU backend cannot write bfloat16 into part of an array: each layer converts the whole stack to
float32 and back, which takes time proportional to the square of the number of layers. It writes integers in place.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.extend import core, source_info_util

P = ParamSpec("P")
R = TypeVar("R")


def with_integer_stacks(function: Callable[P, R]) -> Callable[P, R]:
    """Make the loops of a function stack their bfloat16 results as uint16. The results do not change.

    The function cannot be differentiated afterwards: integers have no gradient.
    """

    @wraps(function)
    def rewritten(*args: P.args, **kwargs: P.kwargs) -> R:
        traced, results = jax.make_jaxpr(function, return_shape=True)(*args, **kwargs)
        values = _evaluate(traced, jax.tree.leaves((args, kwargs)))
        returned: R = jax.tree.unflatten(jax.tree.structure(results), values)
        return returned

    return rewritten


class _Bits(NamedTuple):
    """A stack of bfloat16 that is stored as uint16."""

    stored: jax.Array


def _evaluate(program: core.ClosedJaxpr, arguments: Sequence[Any]) -> list[Any]:
    """Run a program, with loops that store integers."""
    jaxpr = program.jaxpr
    values: dict[core.Var, Any] = dict(
        zip([*jaxpr.constvars, *jaxpr.invars], [*program.consts, *arguments], strict=True)
    )

    def read(operand: core.Var | core.Literal) -> Any:
        return operand.val if isinstance(operand, core.Literal) else values[operand]

    for equation in jaxpr.eqns:
        operands = [read(operand) for operand in equation.invars]
        names = source_info_util.current_name_stack() + equation.source_info.name_stack
        origin = source_info_util.user_context(equation.source_info.traceback, name_stack=names)
        with origin, equation.ctx.manager:  # for the names of operations in a profile
            if equation.primitive.name == "scan":
                results = _scan(equation, operands)
            else:
                parameters = equation.primitive.get_bind_params(equation.params)
                results = equation.primitive.bind(*map(_restored, operands), **parameters)
        results = results if equation.primitive.multiple_results else [results]
        values |= zip(equation.outvars, results, strict=True)
    return [_restored(read(result)) for result in jaxpr.outvars]


def _scan(equation: core.JaxprEqn, operands: list[Any]) -> list[Any]:
    """A loop [*constants, *carry, *stacks] -> [*carry, *stacks]."""
    body = equation.params["jaxpr"]
    carried = sum(map(_same_shape, equation.outvars, body.jaxpr.outvars))
    constants = sum(map(_same_shape, equation.invars, body.jaxpr.invars)) - carried
    shared, initial = operands[:constants], operands[constants : constants + carried]
    stacks = operands[constants + carried :]
    is_bits = [isinstance(stack, _Bits) for stack in stacks]

    def step(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        slices = [_restored(_Bits(one)) if bits else one for one, bits in zip(slices, is_bits, strict=True)]
        results = _evaluate(body, [*map(_restored, shared), *carry, *slices])
        return results[:carried], [_stored(result) for result in results[carried:]]

    options = {name: equation.params[name] for name in ("length", "reverse", "unroll")}
    inputs = [stack.stored if bits else stack for stack, bits in zip(stacks, is_bits, strict=True)]
    carry, outputs = jax.lax.scan(step, list(map(_restored, initial)), inputs, **options)
    given = equation.outvars[carried:]
    return [
        *carry,
        *(_Bits(one) if _aval(var).dtype == jnp.bfloat16 else one for one, var in zip(outputs, given, strict=True)),
    ]


def _same_shape(whole: core.Var | core.Literal, one: core.Var | core.Literal) -> bool:
    """Whether an operand of a loop is passed to every iteration unsliced."""
    return len(_aval(whole).shape) == len(_aval(one).shape)


def _aval(operand: core.Var | core.Literal) -> Any:
    return operand.aval


def _stored(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _restored(x: Any) -> Any:
    return jax.lax.bitcast_convert_type(x.stored, jnp.bfloat16) if isinstance(x, _Bits) else x
