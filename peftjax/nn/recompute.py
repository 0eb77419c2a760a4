"""Recomputation of functions in the backward pass."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def recomputed(function: Callable[P, R]) -> Callable[P, R]:
    """Make the backward pass of a function recompute it from its arguments.

    For norms, activation functions and attention weights. Otherwise a scan over layers would keep their intermediate results
    for every layer, in float32 and with parameters broadcast to the shape of the activations: several times the memory of
    the arguments, which the backward pass needs for other gradients anyway.
    """
    # A scan needs no barrier against common-subexpression elimination.
    return wraps(function)(jax.checkpoint(function, prevent_cse=False))
