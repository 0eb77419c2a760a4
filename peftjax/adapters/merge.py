"""Merge adapters into the base's parameters, and take them out again bit for bit."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from peftjax import sharding
from peftjax.adapters import provenance
from peftjax.adapters.registry import Merge, Merges, merged, merges, require, use
from peftjax.adapters.sites import Site, adapters_named, sites
from peftjax.core import variables
from peftjax.core.distributed import OnHost
from peftjax.quant import quantize
from peftjax.quant.base import Quantized


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
    require(model, name)
    if name in merged(model):
        raise ValueError(f"adapter {name!r} is merged already")
    changed = [site for site, _ in adapters_named(model, name)]
    if others := provenance.moved(model, name):
        print(
            f"{name!r} was trained on quantized kernels and is merged into those that are not: from what it was trained "
            f"with, these are away by {provenance.told(others)}"
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
                    errors[path] = provenance.distance(kernel, value)
                    changes[path] = provenance.distance(value, old[leaf])
                site.parameters[leaf].set_value(kernel)
    except Exception:
        _restore(model, before, untied)
        raise
    if errors:
        print(
            f"merged {name!r} and quantized again: this moves its kernels by {provenance.told(errors)}. The adapters had "
            f"moved them by {provenance.told(changes)}: of a change that is smaller, most is lost"
        )
    model.merges = Merges([Merge(name, before, untied), *merges(model)])
    return use(model, None)


def unmerge(model: Any, name: str = "default") -> Any:
    """Undo `merge`: the base's parameters have the bits they had, and the adapters are the active ones again.

    Raises:
        ValueError: the adapters are not merged, or others were merged after them.
    """
    require(model, name)
    if name not in merged(model)[:1]:
        raise ValueError(f"adapter {name!r} is not the one merged last; merged, newest first: {merged(model)}")
    last, *others = merges(model)
    _restore(model, last.before, last.untied)
    model.merges = Merges(others)
    return use(model, name)


def _restore(model: Any, before: dict[str, dict[str, Any]], untied: bool) -> None:
    by_path = {site.path: site for site in sites(model)}
    for path, leaves in before.items():
        for leaf, value in leaves.items():
            by_path[path].parameters[leaf].set_value(jax.tree.map(OnHost.back, value))
    if untied:
        model.tie()


def _with_adapter(site: Site, name: str) -> dict[str, jax.Array]:
    """The parameters of a layer that, alone, compute what it does with its adapter; each split over the devices as the
    layer's own is."""
    graph, leaves = variables.flat(site.module.adapters.adapter(name))
    adapter = {path: leaf.get_value() for path, leaf in leaves.items()}
    own = {leaf: variable.get_value() for leaf, variable in site.parameters.items()}
    change = lambda adapter, own: variables.join(graph, adapter).merged(**own)  # noqa: E731
    shapes = jax.eval_shape(change, adapter, own)
    placed = {leaf: jax.tree.leaves(own[leaf])[0].sharding for leaf in shapes}
    options = {}
    for leaf, where in placed.items():
        if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh):
            placed[leaf] = sharding.placement(shapes[leaf], site.parameters[leaf].axes, where.mesh)
            options = sharding.compiler_options(where.mesh)
    return jax.jit(change, out_shardings=placed, compiler_options=options)(adapter, own)
