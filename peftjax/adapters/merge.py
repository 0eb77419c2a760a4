"""Merge adapters into the base's parameters, and restore the base bit-identically."""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from peftjax import sharding
from peftjax.adapters import provenance
from peftjax.adapters.registry import Before, Merge, ModelT, merged, registry_of, require, set_registry, use
from peftjax.adapters.sites import Site, adapters_named, sites
from peftjax.core import variables
from peftjax.core.errors import UserError
from peftjax.core.host_arrays import OnHost
from peftjax.core.one_cpu import compiler_options
from peftjax.models.base import LanguageModel
from peftjax.quant import quantize
from peftjax.quant.base import Quantized


def merge(model: ModelT, name: str = "default", *, requantize: bool = False) -> ModelT:
    """Add an adapter's change to the base's parameters, so that the base alone gives the same outputs.

    A quantized kernel becomes the array decode(kernel) + delta, which is exactly what the adapter was trained with. With
    `requantize` the sum is quantized again, which changes it. Merging an adapter that was trained on quantized kernels into
    unquantized ones is not exact either. In both cases the measured difference is printed.

    A head tied to the embedding gets its own kernel if the adapter changes either of the two. The previous parameters are
    kept on the host for `unmerge`; each process keeps its devices' shards.

    Args:
        model: The model; it is changed in place. No adapter is active afterwards.
        name: Name of the adapter.
        requantize: Quantize the merged kernels to their previous format.

    Returns:
        The model.

    Raises:
        UserError: The adapter is not attached, is already merged, or changes more than weights. The model is unchanged.

    Examples:
        >>> import peftjax
        >>> from flax import nnx
        >>> model = peftjax.load_model("embedded")
        >>> model = peftjax.attach(model, peftjax.Lora(rank=4), rngs=nnx.Rngs(0))
        >>> model = peftjax.merge(model, "default")  # the adapter costs nothing from here on
        >>> model = peftjax.unmerge(model, "default")  # the base kernels, bit-identical
    """
    require(model, name)
    if name in merged(model):
        raise UserError(f"adapter {name!r} is already merged")
    changed = [site for site, _ in adapters_named(model, name)]
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves([site.parameters for site in changed])):
        raise UserError(
            "merge: a model cannot be merged inside a transformed function such as jax.jit; call merge outside of it"
        )
    if others := provenance.moved(model, name):
        print(
            f"{name!r} was trained on quantized kernels, but this model's are not quantized. Relative difference from the "
            f"kernels it was trained on: {provenance.describe_errors(others)}"
        )
    untied = False
    if isinstance(model, LanguageModel) and model.tied and any(site.path in ("embed", "head") for site in changed):
        untied = True
        model.untie()
    before: Before = {}
    errors: dict[str, float] = {}
    changes: dict[str, float] = {}
    try:
        for site in changed:
            new = _with_adapter(site, name)
            old = {leaf: site.parameters[leaf].get_value() for leaf in new}
            before[site.path] = jax.tree.map(OnHost, old)
            for leaf, value in new.items():
                kernel: jax.Array | Quantized = value
                if requantize and isinstance(old[leaf], Quantized):
                    path, where = f"{site.path}.{leaf}", jax.tree.map(lambda part: part.sharding, old[leaf])
                    kernel = jax.jit(quantize, static_argnums=1, out_shardings=where)(value, old[leaf].format)
                    errors[path] = provenance.distance(kernel, value)
                    changes[path] = provenance.distance(value, old[leaf])
                site.parameters[leaf].set_value(kernel)
    except Exception:  # of any kind: the model is restored
        _restore(model, before, untied)
        raise
    if errors:
        print(
            f"merged {name!r} and requantized. Relative rounding error of the kernels: {provenance.describe_errors(errors)}. "
            f"Relative size of the adapter's updates: {provenance.describe_errors(changes)}; smaller updates are mostly lost to "
            "rounding"
        )
    registry = registry_of(model)
    set_registry(model, dataclasses.replace(registry, merges=(Merge(name, before, untied), *registry.merges)))
    return use(model, None)


def unmerge(model: ModelT, name: str = "default") -> ModelT:
    """Undo `merge`: the base's parameters are restored bit-identically, and the adapter is the active one.

    Args:
        model: The model; it is changed in place.
        name: Name of the adapter that was merged last.

    Returns:
        The model.

    Raises:
        UserError: The adapter is not merged, or others were merged after it.

    Examples:
        >>> import peftjax
        >>> from flax import nnx
        >>> model = peftjax.load_model("embedded")
        >>> model = peftjax.attach(model, peftjax.Lora(rank=4), rngs=nnx.Rngs(0))
        >>> before = model.blocks.attention.query.kernel[...]
        >>> model = peftjax.unmerge(peftjax.merge(model, "default"), "default")
        >>> bool((model.blocks.attention.query.kernel[...] == before).all())
        True
    """
    require(model, name)
    if name not in merged(model)[:1]:
        raise UserError(f"adapter {name!r} is not the one merged last; merged, newest first: {merged(model)}")
    registry = registry_of(model)
    last, *others = registry.merges
    _restore(model, last.before, last.untied)
    set_registry(model, dataclasses.replace(registry, merges=tuple(others)))
    return use(model, name)


def _restore(model: nnx.Module, before: Before, untied: bool) -> None:
    by_path = {site.path: site for site in sites(model)}
    for path, leaves in before.items():
        for leaf, value in leaves.items():
            by_path[path].parameters[leaf].set_value(jax.tree.map(OnHost.back, value))
    if untied:
        assert isinstance(model, LanguageModel)
        model.tie()


def _with_adapter(site: Site, name: str) -> dict[str, jax.Array]:
    """The parameters with which the layer alone gives the same outputs as with its adapter, sharded like its own."""
    graph, leaves = variables.flat(site.module.adapters.adapter(name))
    adapter = {path: leaf.get_value() for path, leaf in leaves.items()}
    own = {leaf: variable.get_value() for leaf, variable in site.parameters.items()}
    shapes = jax.eval_shape(functools.partial(_merged, graph), adapter, own)
    placed = {leaf: jax.tree.leaves(own[leaf])[0].sharding for leaf in shapes}
    options = {}
    for leaf, where in placed.items():
        if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh):
            placed[leaf] = sharding.placement(shapes[leaf], site.parameters[leaf].axes, where.mesh)
            options = compiler_options(where.mesh.devices.flat)
    # one function for all layers: layers of the same shapes share a program
    change = jax.jit(_merged, static_argnums=0, out_shardings=placed, compiler_options=options)
    return change(graph, adapter, own)


def _merged(graph: nnx.GraphDef, adapter: variables.FlatTree, own: dict[str, Any]) -> dict[str, jax.Array]:
    with jax.default_matmul_precision("highest"):  # by default, GPUs and TPUs round the factors of float32 products
        return variables.join(graph, adapter).merged(**own)
