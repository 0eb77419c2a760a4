"""The optimizer that a method needs, for your own training loop."""

from collections.abc import Iterable
from typing import Any

import optax
from flax import nnx

from peftjax.adapters.registry import active, attached
from peftjax.core import variables


def wrap_optimizer(tx: optax.GradientTransformation, model: nnx.Module) -> optax.GradientTransformation:
    """Add to an optimizer what the active methods of a model do in training.

    AdaLoRA prunes ranks, `Lora(lr_ratio=...)` multiplies the learning rate of B (LoRA+), and `Oft(constrained=True)` projects
    its rotations. For all other methods, the optimizer is returned as it is. AdaLoRA also has a term in the loss,
    `method.penalty(model)`. `peftjax.train` does both.

    Args:
        tx: An optax optimizer.
        model: A model with attached adapters.

    Returns:
        An optimizer for states as `nnx.split` returns them, with all trainable parameters of the model.

    Examples:
        >>> import optax
        >>> import peftjax
        >>> from flax import nnx
        >>> model = peftjax.load_model("embedded")
        >>> model = peftjax.attach(model, peftjax.Lora(rank=4, lr_ratio=16.0), rngs=nnx.Rngs(0))
        >>> tx = peftjax.wrap_optimizer(optax.adamw(1e-4), model)
        >>> opt = tx.init(nnx.state(model, peftjax.PeftParam))
    """
    leaves, wrapped = variables.flat(model)[1], tx
    for name in active(model):
        own = {path: leaf for path, leaf in leaves.items() if f".adapters.{name}." in path}
        wrapped = attached(model)[name].optimizer(wrapped, own)
    if wrapped is tx:
        return tx
    paths = tuple(leaves)  # the optimizer must not keep the arrays of the base alive
    flat_tx = optax.with_extra_args_support(wrapped)

    def init(params: nnx.State) -> Any:
        return flat_tx.init(_flat(params, paths))

    def update(updates: nnx.State, state: Any, params: nnx.State | None = None, **extra: Any) -> tuple[nnx.State, Any]:
        known = None if params is None else _flat(params, paths)
        new, state = flat_tx.update(_flat(updates, paths), state, known, **extra)
        return _like(updates, new), state

    return optax.GradientTransformationExtraArgs(init, update)


def _flat(state: nnx.State, paths: Iterable[str]) -> variables.FlatTree:
    """The arrays of a state by dotted path, and optax.MaskedNode() for the paths that it does not have."""
    found = {variables.dotted(path): leaf for path, leaf in nnx.to_flat_state(state)}
    arrays = {path: leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf for path, leaf in found.items()}
    return {path: arrays.get(path, optax.MaskedNode()) for path in paths}


def _like(state: nnx.State, arrays: variables.FlatTree) -> nnx.State:
    """The state with other arrays."""
    found = []
    for path, leaf in nnx.to_flat_state(state):
        array = arrays[variables.dotted(path)]
        found.append((path, leaf.replace(array) if isinstance(leaf, nnx.Variable) else array))
    return nnx.from_flat_state(found)
