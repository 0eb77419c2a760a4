"""Calls of a model outside of JAX transformations, such as `model(tokens)` in a notebook, run as one compiled program."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
from flax import nnx

from peftjax.nn.slot import RECORD

F = TypeVar("F", bound=Callable[..., Any])


def compiled(forward: F) -> F:
    """Compile a model's forward pass outside of JAX transformations, once for each structure of the model and shape of
    the inputs.

    Run operation by operation, it would compile its scan over the layers again in every call.
    """

    @functools.wraps(forward)
    def call(self: nnx.Module, *inputs: Any, **named: Any) -> Any:
        graph, state = nnx.split(_without_record(self))
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((state, inputs, named))):
            return forward(self, *inputs, **named)
        return _run(forward, graph, state, inputs, named)

    return cast(F, call)


def _without_record(model: nnx.Module) -> nnx.Module:
    """A copy of the model that shares its parts but not the record of its adapters.

    No result depends on the record. As a part of the structure, it would compile the same program again after each merge and
    for each adapter from a file that names another base.
    """
    view: nnx.Module = object.__new__(type(model))
    vars(view).update({name: value for name, value in vars(model).items() if name != RECORD})
    return view


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    forward: Callable[..., Any], graph: nnx.GraphDef, state: nnx.State, inputs: tuple[Any, ...], named: dict[str, Any]
) -> Any:
    return forward(nnx.merge(graph, state), *inputs, **named)
