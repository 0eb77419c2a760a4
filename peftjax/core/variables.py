"""Trainable and frozen variables, told apart by their type.

`nnx.Param` holds the base checkpoint, `PeftParam` what a method adds and trains, `PeftConstant` what a method adds and
never trains. `trainable_mask` turns types into booleans, and that one mask decides what gets a gradient, what the
optimizer sees, what a checkpoint stores and what an adapter file contains.

Internally, a model's state is a *flat tree*: a dict from dotted path (`blocks.attention.query.kernel`) to array. A leaf
that belongs to another tree is replaced by `optax.MaskedNode()`, a pytree node without leaves: it has no gradient, no
optimizer moment and no update.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, overload

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from peftjax.core.errors import UserError

FlatTree = dict[str, Any]
T = TypeVar("T")


class PeftParam(nnx.Variable):
    """A trainable parameter that a PEFT method adds to a model.

    Use it as a filter in NNX: `nnx.split(model, peftjax.PeftParam, ...)` separates the trainable parameters from the
    frozen base, and `nnx.Optimizer(model, tx, wrt=peftjax.PeftParam)` updates only them.
    """


class PeftConstant(nnx.Variable):
    """A constant array that a PEFT method adds, such as the scale of LoRA's update. It is never trained."""


class DropoutKey(PeftConstant):
    """The key data of a dropout module, uint32 [*stack, 2]. `with_dropout_keys` replaces it before every step."""


class PlainArray(nnx.Variable):
    """An array that is a plain attribute of a module, not a variable, in a flat tree of variables."""


def flat(model: nnx.Module) -> tuple[nnx.GraphDef, dict[str, nnx.Variable]]:
    """Split a model into its structure and its variables by dotted path, sorted by path."""
    graph, state = nnx.split(model)
    leaves = {dotted(path): leaf for path, leaf in nnx.to_flat_state(state)}
    variables = {path: leaf if isinstance(leaf, nnx.Variable) else PlainArray(leaf) for path, leaf in leaves.items()}
    return graph, dict(sorted(variables.items()))


def dotted(path: Iterable[object]) -> str:
    """A path in NNX as a dotted path."""
    return ".".join(map(str, path))


def is_stacked(variable: nnx.Variable) -> bool:
    """True if the variable's leading axis is the layers of a stack."""
    return variable.axes[:1] == ("layers",)


@overload
def trainable_mask(tree: nnx.Module | nnx.State, kind: type[nnx.Variable] = ...) -> nnx.State: ...
@overload
def trainable_mask(tree: Mapping[str, nnx.Variable], kind: type[nnx.Variable] = ...) -> dict[str, bool]: ...
def trainable_mask(tree: Any, kind: type[nnx.Variable] = PeftParam) -> Any:
    """Booleans in place of variables: True for each variable whose type is exactly `kind`.

    The result serves as a mask or as labels in optax, for a state that is updated as a whole:

        graph, params, rest = nnx.split(model, (nnx.Param, peftjax.PeftParam), ...)
        mask = peftjax.trainable_mask(params)
        tx = optax.partition({True: optax.adamw(1e-4), False: optax.set_to_zero()}, mask)

    Args:
        tree: An `nnx.State`, such as `nnx.split` returns; a module, which stands for its whole state; or a dict from
            path to variable.
        kind: `PeftParam` for parameter-efficient fine-tuning, `nnx.Param` for full fine-tuning.

    Returns:
        A tree of the same structure with a boolean for every variable.

    Raises:
        UserError: No leaf is an `nnx.Variable`, so there are no types to decide by.

    Examples:
        >>> import peftjax
        >>> from flax import nnx
        >>> model = peftjax.load_model("embedded")
        >>> model = peftjax.attach(model, peftjax.Lora(rank=4), rngs=nnx.Rngs(0))
        >>> mask = peftjax.trainable_mask(model)
        >>> mask["blocks"]["attention"]["query"]["kernel"]
        False
        >>> mask["blocks"]["attention"]["query"]["adapters"]["default"]["a"]
        True
    """
    if isinstance(tree, nnx.Module):
        tree = nnx.state(tree)

    def is_variable(leaf: Any) -> bool:
        return isinstance(leaf, nnx.Variable)

    leaves = jax.tree.leaves(tree, is_leaf=is_variable)  # arrays among them are attributes of modules
    if leaves and not any(map(is_variable, leaves)):
        raise UserError(
            f"trainable_mask: a leaf is a {type(leaves[0]).__name__}, not an nnx.Variable; pass the model or the state "
            "that nnx.split or nnx.state returns"
        )
    return jax.tree.map(lambda leaf: type(leaf) is kind, tree, is_leaf=is_variable)


def split_by_kind(model: nnx.Module, kind: type[nnx.Variable] = PeftParam) -> tuple[nnx.GraphDef, FlatTree, FlatTree]:
    """Split a model into (structure, trainable, frozen): flat trees with the same paths and complementary leaves."""
    graph, variables = flat(model)
    mask = trainable_mask(variables, kind)
    values = {path: variable.get_value() for path, variable in variables.items()}
    trainable = {path: value if mask[path] else optax.MaskedNode() for path, value in values.items()}
    frozen = {path: optax.MaskedNode() if mask[path] else value for path, value in values.items()}
    return graph, trainable, frozen


def join(graph: nnx.GraphDef, *trees: FlatTree) -> Any:
    """Rebuild a model from its structure and flat trees that together hold every leaf exactly once.

    A leaf is an array, or an `nnx.Variable`, which the model then shares.
    """
    return nnx.merge(graph, _state(present(*trees)))


def update(model: nnx.Module, *trees: FlatTree) -> None:
    """Write the leaves of `trees` into the model's variables."""
    _, variables = flat(model)
    for path, value in present(*trees).items():
        variables[path].set_value(value)
    nnx.update(model, _state(variables))


def stack(trees: Sequence[Any]) -> Any:
    """Stack trees of the same shapes leaf by leaf."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def filled(tree: FlatTree, like: FlatTree) -> FlatTree:
    """The tree padded with zeros to the shapes of `like`, at the end of each axis; missing paths become zeros."""

    def padded(leaf: jax.Array, other: jax.Array) -> jax.Array:
        if leaf.shape == other.shape:
            return leaf
        return jnp.pad(leaf, [(0, most - size) for most, size in zip(other.shape, leaf.shape, strict=True)])

    def zeros(other: jax.Array) -> jax.Array:
        return jnp.zeros(other.shape, other.dtype)

    return {
        path: jax.tree.map(padded, tree[path], other) if path in tree else jax.tree.map(zeros, other)
        for path, other in like.items()
    }


def widest(one: jax.Array | jax.ShapeDtypeStruct, other: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The shape of an array to which both can be padded; each axis is as long as the longer one."""
    return jax.ShapeDtypeStruct(tuple(map(max, one.shape, other.shape)), one.dtype)


def renamed(tree: Mapping[str, T], names: Mapping[str, str]) -> dict[str, T]:
    """The tree with other names for some paths."""
    return {names.get(path, path): leaf for path, leaf in tree.items()}


def cut(tree: FlatTree, like: FlatTree) -> FlatTree:
    """The leaves at the paths of `like`, cut to its shapes, which removes what `filled` added."""
    return jax.tree.map(lambda own, leaf: leaf[tuple(map(slice, own.shape))], like, {path: tree[path] for path in like})


def present(*trees: FlatTree) -> FlatTree:
    """The leaves of all trees that are not `optax.MaskedNode`."""
    return {path: leaf for tree in trees for path, leaf in tree.items() if not isinstance(leaf, optax.MaskedNode)}


def _state(tree: FlatTree) -> nnx.State:
    """The state with the leaves of a flat tree."""
    plain = {path: leaf.get_value() for path, leaf in tree.items() if isinstance(leaf, PlainArray)}
    return nnx.from_flat_state([(_key(path), leaf) for path, leaf in {**tree, **plain}.items()])


def _key(path: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in path.split("."))  # an index into a list
