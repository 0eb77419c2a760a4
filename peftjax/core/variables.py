"""What is trained and what is frozen, decided by the type of a variable.

`nnx.Param` holds the base checkpoint, `PeftParam` what a method adds and trains, `PeftConstant` what a method adds and
never trains. `trainable_mask` turns types into booleans, and that one mask decides what gets a gradient, what the
optimizer sees, what a checkpoint stores and what an adapter file holds.

A model's state is handled as a *flat tree*: a dict from dotted path (`blocks.attention.query.kernel`) to array. Leaves
that are not there in a tree stand as `optax.MaskedNode()`, a pytree node without leaves: it owns no gradient, no
optimizer moment and no update.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

FlatTree = dict[str, Any]


class PeftParam(nnx.Variable):
    """A parameter that a PEFT method adds and trains."""


class PeftConstant(nnx.Variable):
    """An array that a PEFT method adds and never trains, such as the scale of LoRA's update."""


class DropoutKey(PeftConstant):
    """The key data of one dropout, uint32 [*stack, 2]; `with_dropout_keys` gives it fresh bits at every step."""


def flat(model: nnx.Module) -> tuple[nnx.GraphDef, dict[str, nnx.Variable]]:
    """The model's structure, and its variables by dotted path in a fixed order."""
    graph, state = nnx.split(model)
    variables = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    return graph, dict(sorted(variables.items()))


def is_stacked(variable: nnx.Variable) -> bool:
    """Whether a variable holds an array for each layer of a stack."""
    return variable.axes[:1] == ("layers",)


def trainable_mask(variables: Mapping[str, nnx.Variable], kind: type[nnx.Variable] = PeftParam) -> dict[str, bool]:
    """True for each variable of exactly the type `kind`: `PeftParam` for PEFT, `nnx.Param` for full fine-tuning."""
    return {path: type(variable) is kind for path, variable in variables.items()}


def split(model: nnx.Module, mask: Mapping[str, bool]) -> tuple[nnx.GraphDef, FlatTree, FlatTree]:
    """Part a model into (structure, trainable, frozen): two trees over the same paths, complementary in their leaves."""
    graph, variables = flat(model)
    values = {path: variable.get_value() for path, variable in variables.items()}
    trainable = {path: value if mask[path] else optax.MaskedNode() for path, value in values.items()}
    frozen = {path: optax.MaskedNode() if mask[path] else value for path, value in values.items()}
    return graph, trainable, frozen


def join(graph: nnx.GraphDef, *trees: FlatTree) -> Any:
    """The model again, from its structure and trees that together hold every leaf once."""
    return nnx.merge(graph, nnx.from_flat_state([(_key(path), value) for path, value in _present(*trees).items()]))


def update(model: nnx.Module, *trees: FlatTree) -> None:
    """Write the leaves of `trees` into the model's variables."""
    _, variables = flat(model)
    for path, value in _present(*trees).items():
        variables[path].set_value(value)
    nnx.update(model, nnx.from_flat_state([(_key(path), variable) for path, variable in variables.items()]))


def with_dropout_keys(tree: FlatTree, paths: tuple[str, ...], key: jax.Array) -> FlatTree:
    """A tree whose dropout keys (`paths`, each uint32 [*stack, 2]) are drawn from `key`, each layer its own."""
    fresh = {}
    for index, path in enumerate(paths):
        stack = tree[path].shape[:-1]
        fresh[path] = jax.random.key_data(jax.random.split(jax.random.fold_in(key, index), stack or ())).astype(
            jnp.uint32
        )
    return {**tree, **fresh}


def _present(*trees: FlatTree) -> FlatTree:
    return {path: leaf for tree in trees for path, leaf in tree.items() if not isinstance(leaf, optax.MaskedNode)}


def _key(path: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in path.split("."))  # 3: a member of a list
