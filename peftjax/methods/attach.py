"""Adapters of a model by name: attach, use, detach, merge, unmerge.

Each function changes the model it is given and returns it. Base parameters never change, but by `merge`, which
remembers them for `unmerge`.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from peftjax import sharding
from peftjax.core import variables
from peftjax.core.distributed import OnHost
from peftjax.core.paths import suggest
from peftjax.core.variables import PeftParam
from peftjax.methods import trained_on
from peftjax.methods.base import Method
from peftjax.methods.sites import Site, adapters, head_sites, sites
from peftjax.methods.targeted import train_whole
from peftjax.nn.slot import Slot
from peftjax.quant import quantize
from peftjax.quant.base import Quantized


def attached(model: nnx.Module) -> dict[str, Method]:
    """The methods attached to a model, by adapter name."""
    return dict(getattr(model, "methods", ()))


def attach(
    model: Any,
    method: Method,
    name: str = "default",
    *,
    rngs: nnx.Rngs,
    batches: Iterable[Mapping[str, Any]] | None = None,
    kernels: Callable[[str, int | None], Any] | None = None,
) -> Any:
    """Put the adapters of `method` into the model's slots under `name`, and make them the active ones. A classification
    head is trained whole beside them.

    batches: for a method that begins with data (LoRA with init="eva"), as the train step takes them: {"tokens": [B, T],
    ...}. kernels: for one that begins with the kernels before they were quantized (init="loftq"), `load_kernels`'s.

    Raises:
        ValueError: the name is taken or not an identifier, or the method's options do not fit the model. The model is
            unchanged then.
    """
    if not isinstance(method, Method):
        raise ValueError(f"attach: the method must be one with its options, such as Lora(rank=8), it is {method!r}")
    if not isinstance(rngs, nnx.Rngs):
        raise ValueError(f"attach: rngs must be nnx.Rngs(seed), it is {rngs!r}")
    if not sites(model):
        raise ValueError(
            "attach: no layer of this model has a slot for adapters; peftjax.adopt(model) gives them to the layers of a "
            "network of your own"
        )
    method.check(model)
    if bool(method.data) != (batches is not None):
        raise ValueError(
            f"attach: {method.method} begins with data: give it batches=[...]"
            if method.data
            else f"attach: batches= goes with a method that begins with data, which {method.method} does not with these options"
        )
    if method.unquantized != (kernels is not None):
        raise ValueError(
            f"attach: {method.method} begins with the base's unquantized kernels: give it kernels=peftjax.load_kernels(PATH, model)"
            if method.unquantized
            else f"attach: kernels= goes with init='loftq', not with these options of {method.method}"
        )
    start: dict[str, dict[str, Any]] = {}
    if batches is not None:
        _require_new(model, name)
        method, start = method.fit(model, batches)
    before = active(model)
    attach_unchecked(model, method, name, rngs=rngs)
    for site, adapter in adapters(model, name):
        for leaf, value in start.get(site.path, {}).items():
            variable = getattr(adapter, leaf)
            variable.set_value(jnp.asarray(value, variable.get_value().dtype))
    if kernels is not None:
        try:
            method.begin(model, name, kernels, rngs)
        except Exception:
            use(detach(model, name), before)
            raise
    return model


def attach_unchecked(model: Any, method: Method, name: str, *, rngs: nnx.Rngs) -> Any:
    """`attach` for a method that an adapter file describes: it may be one that nobody should begin with."""
    _require_new(model, name)
    try:
        method.attach(model, name, rngs)
        if method.trains is PeftParam:
            train_head(model, name)
    except Exception:
        _remove(model, name)
        raise
    model.methods = (*getattr(model, "methods", ()), (name, method))
    return use(model, name)


def _require_new(model: Any, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ValueError(f"adapter name {name!r}: use letters, digits and underscores, not starting with a digit")
    if hasattr(Slot(), name):  # adapters are attributes of their slots
        raise ValueError(f"adapter name {name!r} means something else in a layer's slot; choose another name")
    if name in attached(model):
        raise ValueError(f"adapter {name!r} is attached already; detach it first or choose another name")


def train_head(model: Any, name: str) -> None:
    """Train a classification head whole under `name`, where the method does not do so already."""
    rest = [site for site in head_sites(model) if name not in site.module.adapters.names()]
    train_whole(model, [(site, np.ones(1, bool)) for site in rest], name)


def release_head(model: Any, name: str) -> None:
    """Leave a classification head as it is in the base."""
    for site in head_sites(model):
        site.module.adapters.remove(name)


def active(model: Any) -> tuple[str, ...]:
    """The names of the adapters that take part in the computation, the innermost first."""
    return getattr(model, "used", ())


def use(model: Any, names: str | Sequence[str] | None) -> Any:
    """Let the adapters called so, and no others, take part in the computation; None: the base alone.

    Where several sit in one slot, a later one wraps those before it.
    """
    names = (names,) if isinstance(names, str) else tuple(names or ())
    for name in names:
        _require(model, name)
    if len(set(names)) < len(names):
        raise ValueError(f"use: {names} names an adapter twice")
    for site in sites(model):
        slot = site.module.adapters
        slot.active = tuple(name for name in names if name in slot.names())
    model.used = names
    return model


def detach(model: Any, name: str = "default") -> Any:
    """Take the adapters called `name` out; the model is as it was before they were attached."""
    _require(model, name)
    if name in merged(model):
        unmerge(model, name)
    _remove(model, name)
    model.used = tuple(used for used in active(model) if used != name)
    model.methods = tuple(item for item in model.methods if item[0] != name)
    trained_on.forget(model, name)
    return model


def merge(model: Any, name: str = "default", *, requantize: bool = False) -> Any:
    """Change the base's parameters so that, alone, they compute what they do with the adapters called `name`.

    A quantized kernel becomes the array that it decodes to, with what the adapters add: the base that they were trained
    on, exactly. With `requantize` it is brought into its format again, which moves it. Merging an adapter that was trained
    on quantized kernels into others is no exact thing either. Both print by how much, measured.
    A head tied to the embedding gets a kernel of its own if the adapters change either of the two. The parameters that
    were there are kept on the host for `unmerge`, by each process its devices' parts of them.

    Raises:
        ValueError: the method does more than change weights, or the adapters are merged already. The model is unchanged
            then.
    """
    _require(model, name)
    if name in merged(model):
        raise ValueError(f"adapter {name!r} is merged already")
    changed = [site for site, _ in adapters(model, name)]
    if others := trained_on.moved(model, name):
        print(
            f"{name!r} was trained on quantized kernels and is merged into those that are not: from what it was trained "
            f"with, these are away by {trained_on.told(others)}"
        )
    untied = any(site.path in ("embed", "head") for site in changed) and getattr(model, "tied", False)
    if untied:
        model.untie()
    before: dict[str, dict[str, Any]] = {}
    errors: dict[str, float] = {}
    changes: dict[str, float] = {}
    try:
        for site in changed:
            new = _with_adapter(site, name)
            old = {leaf: site.parameters[leaf].get_value() for leaf in new}
            before[site.path] = jax.tree.map(OnHost, old)
            for leaf, value in new.items():
                kernel: Any = value
                if requantize and isinstance(old[leaf], Quantized):
                    path, where = f"{site.path}.{leaf}", jax.tree.map(lambda part: part.sharding, old[leaf])
                    kernel = jax.jit(quantize, static_argnums=1, out_shardings=where)(value, old[leaf].format)
                    errors[path] = trained_on.distance(kernel, value)
                    changes[path] = trained_on.distance(value, old[leaf])
                site.parameters[leaf].set_value(kernel)
    except Exception:
        _restore(model, before, untied)
        raise
    if errors:
        print(
            f"merged {name!r} and quantized again: this moves its kernels by {trained_on.told(errors)}. The adapters had "
            f"moved them by {trained_on.told(changes)}: of a change that is smaller, most is lost"
        )
    model.merges = Merges([Merge(name, before, untied), *_merges(model)])
    return use(model, None)


def unmerge(model: Any, name: str = "default") -> Any:
    """Undo `merge`: the base's parameters have the bits they had, and the adapters are the active ones again.

    Raises:
        ValueError: the adapters are not merged, or others were merged after them.
    """
    _require(model, name)
    if name not in merged(model)[:1]:
        raise ValueError(f"adapter {name!r} is not the one merged last; merged, newest first: {merged(model)}")
    last, *others = _merges(model)
    _restore(model, last.before, last.untied)
    model.merges = Merges(others)
    return use(model, name)


def merged(model: Any) -> list[str]:
    """The names of merged adapters, the newest first."""
    return [merge.name for merge in _merges(model)]


def parameters_before(model: Any, name: str) -> dict[str, Any]:
    """By path, those parameters of the base that were others before the adapters called `name` were merged: trees of
    `OnHost`."""
    newest = merged(model)
    undone = _merges(model)[: newest.index(name) + 1] if name in newest else []
    return {
        f"{path}.{leaf}": value
        for merge in undone
        for path, leaves in merge.before.items()
        for leaf, value in leaves.items()
    }


def count_trainable(model: Any, name: str = "default") -> int:
    """How many parameters the adapters called `name` train, without the rows that pad layers of smaller rank."""
    _require(model, name)
    counted: set[int] = set()  # variables that a method shares among layers, counted once
    total = 0
    for site, adapter in adapters(model, name):
        of_layers = [(layer, adapter.hf_leaves(layer)) for layer in site.layers]
        in_file = {leaf.leaf for _, leaves in of_layers for leaf in leaves.values()}
        for layer, leaves in of_layers:
            for leaf in leaves.values():
                variable = getattr(adapter, leaf.leaf)
                if isinstance(variable, PeftParam):
                    shape = variable.shape[0 if layer is None else 1 :]
                    total += np.broadcast_to(np.zeros(()), shape)[leaf.window].size
        for path, variable in variables.flat(adapter)[1].items():
            if isinstance(variable, PeftParam) and path not in in_file and id(variable) not in counted:
                counted.add(id(variable))
                total += variable.size
    return total


def active_view(model: Any) -> Any:
    """The model without adapters that take no part, and without names: `a0`, `a1`, ... in their order.

    Its structure is the same for any adapter of the same shapes, so a compiled function takes them all. Its
    variables are the model's own.
    """
    view = nnx.merge(*nnx.split(model))
    for site in sites(view):
        slot = site.module.adapters
        active = [slot.adapter(name) for name in slot.active]
        for name in slot.names():
            slot.remove(name)
        for index, adapter in enumerate(active):
            slot.add(f"a{index}", adapter)
        slot.active = tuple(f"a{index}" for index in range(len(active)))
    view.methods, view.merges, view.used, view.trained_on = (), None, (), ()
    return view


@dataclasses.dataclass(frozen=True)
class Merge:
    """One merge: {path: {leaf: the parameter before, a tree of `OnHost`}}, and whether it untied the head."""

    name: str
    before: dict[str, dict[str, Any]]
    untied: bool


class Merges:
    """The merges of a model, newest first. Not a list, so that NNX takes it for structure and keeps its arrays out of
    the state."""

    def __init__(self, items: list[Merge]) -> None:
        self.items = items


def _merges(model: Any) -> list[Merge]:
    merges = getattr(model, "merges", None)
    return merges.items if merges else []


def _restore(model: Any, before: dict[str, dict[str, Any]], untied: bool) -> None:
    by_path = {site.path: site for site in sites(model)}
    for path, leaves in before.items():
        for leaf, value in leaves.items():
            by_path[path].parameters[leaf].set_value(jax.tree.map(OnHost.back, value))
    if untied:
        model.tie()


def _require(model: Any, name: str) -> None:
    if name not in attached(model):
        raise ValueError(
            f"no adapter {name!r} is attached.{suggest(name, attached(model))} Attached: {list(attached(model))}"
        )


def _remove(model: Any, name: str) -> None:
    for site, _ in adapters(model, name):
        site.module.adapters.remove(name)


def _with_adapter(site: Site, name: str) -> dict[str, jax.Array]:
    """The parameters of a layer that, alone, compute what it does with its adapter; each split over the devices as the
    layer's own is."""
    graph, leaves = variables.flat(site.module.adapters.adapter(name))
    adapter = {path: leaf.get_value() for path, leaf in leaves.items()}
    own = {leaf: variable.get_value() for leaf, variable in site.parameters.items()}
    change = lambda adapter, own: variables.merge(graph, adapter).merged(**own)  # noqa: E731
    shapes = jax.eval_shape(change, adapter, own)
    placed = {leaf: jax.tree.leaves(own[leaf])[0].sharding for leaf in shapes}
    options = {}
    for leaf, where in placed.items():
        if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh):
            placed[leaf] = sharding.placement(shapes[leaf], site.parameters[leaf].axes, where.mesh)
            options = sharding.compiler_options(where.mesh)
    return jax.jit(change, out_shardings=placed, compiler_options=options)(adapter, own)
