"""Calls of a model outside of JAX transformations, such as `model(tokens)` in a notebook, run as one compiled program."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
from flax import nnx

from peftjax.nn.slot import RECORD, active_view

F = TypeVar("F", bound=Callable[..., Any])


def compiled(forward: F) -> F:
    """Compile a model's forward pass outside of JAX transformations, once for each structure of the model with its active
    adapters and each shape of the inputs.

    Run operation by operation, it would compile its scan over the layers again in every call.
    """

    @functools.wraps(forward)
    def call(self: nnx.Module, *inputs: Any, **named: Any) -> Any:
        graph, state = nnx.split(self)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((state, inputs, named))):
            return forward(self, *inputs, **named)
        if RECORD in vars(self):
            graph, state = nnx.split(active_view(self))
        return _run(forward, graph, state, inputs, named)

    return cast(F, call)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    forward: Callable[..., Any], graph: nnx.GraphDef, state: nnx.State, inputs: tuple[Any, ...], named: dict[str, Any]
) -> Any:
    return forward(nnx.merge(graph, state), *inputs, **named)
