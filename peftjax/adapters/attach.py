"""Attach and detach adapters by name.

Each function changes the model it is given and returns it. Base parameters never change here (`merge` does that).
"""

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.joint import adapter_parts, parts
from peftjax.adapters.merge import unmerge
from peftjax.adapters.method import Kernels, Method
from peftjax.adapters.registry import ModelT, active, attached, merged, registry_of, require, set_registry, use
from peftjax.adapters.saved_modules import replaced, train_whole
from peftjax.adapters.sites import adapters_named, head_sites, inner_model, sites
from peftjax.core import variables
from peftjax.core.errors import UserError, shown
from peftjax.core.variables import PeftParam
from peftjax.models.base import Model
from peftjax.nn.slot import Slot


def attach(
    model: ModelT,
    method: Method,
    name: str = "default",
    *,
    rngs: nnx.Rngs,
    batches: Iterable[Mapping[str, Any]] | None = None,
    kernels: Kernels | None = None,
) -> ModelT:
    """Add the adapters of a method to a model and activate them, deactivating all others.

    A task head is also trained in full.

    Args:
        model: The model; it is changed in place.
        method: The method with its options, such as `Lora(rank=8)`.
        name: Name of the adapter.
        rngs: Source of random weights.
        batches: Batches of the train step, {"tokens": [B, T], ...}; for a method initialized from data (LoRA with
            init="eva").
        kernels: From `load_kernels`; for a method initialized from the kernels before quantization (init="loftq").

    Returns:
        The model.

    Raises:
        UserError: The name is taken or has characters other than letters, digits and _-., or the method's options do not
            fit the model. The model is unchanged.

    Examples:
        >>> import peftjax
        >>> from flax import nnx
        >>> model = peftjax.load_model("embedded")
        >>> model = peftjax.attach(model, peftjax.Lora(rank=4), rngs=nnx.Rngs(0))
        >>> float(abs(model.blocks.attention.query.adapters.default.b[...]).max())  # LoRA starts as a no-op
        0.0
    """
    if not isinstance(method, Method):
        raise UserError(f"attach: the method must be an instance such as Lora(rank=8), not {shown(method)}")
    if not isinstance(rngs, nnx.Rngs):
        raise UserError(f"attach: rngs must be nnx.Rngs(seed), not {shown(rngs)}")
    if not isinstance(model, nnx.Module):
        raise UserError(f"attach: the model must be an nnx.Module, not {shown(model)}")
    if not sites(model):
        raise UserError(
            "attach: no layer of this model has a slot for adapters; peftjax.adopt(model) adds them to the nnx.Linear, "
            "nnx.LinearGeneral, nnx.Einsum and nnx.Embed layers of your own network, but not to subclasses of these"
        )
    _require_outermost(model)
    method.check(model)
    if bool(method.data) != (batches is not None):
        raise UserError(
            f"attach: {method.method} is initialized from data; pass batches=[...]"
            if method.data
            else f"attach: {method.method} with these options is not initialized from data; leave out batches="
        )
    if method.unquantized != (kernels is not None):
        raise UserError(
            f"attach: {method.method} is initialized from the unquantized kernels; pass "
            "kernels=peftjax.load_kernels(PATH, model)"
            if method.unquantized
            else f"attach: {method.method} with these options needs no unquantized kernels; leave out kernels="
        )
    start: dict[str, dict[str, Any]] = {}
    if batches is not None:
        _require_new(model, name)
        method, start = method.fit(model, batches)
    before = active(model)
    attach_unchecked(model, method, name, rngs=rngs)
    for site, adapter in adapters_named(model, name):
        for leaf, value in start.get(site.path, {}).items():
            variable = vars(parts(adapter)[0])[leaf]
            variable.set_value(jnp.asarray(value, variable.get_value().dtype))
    if kernels is not None:
        try:
            method.begin(model, name, kernels, rngs)
        except Exception:  # of any kind: the model is restored
            use(detach(model, name), before)
            raise
    _warn_of_drawn(model, method, name)
    return model


def _warn_of_drawn(model: nnx.Module, method: Method, name: str) -> None:
    """Warn if a part of the task head, such as BERT's pooler, is not in the checkpoint and not trained by the adapter.

    Its random weights are then in neither of the two files.
    """
    if method.trains is not PeftParam or not isinstance(model, Model) or not model.origin or not head_sites(model):
        return
    trained = replaced(model, name)
    paths = {path.rpartition(".")[0] for path in model.origin.drawn if path not in trained}
    names = [site.names[0] for site in sites(model) if site.path in paths]
    if not names:
        return
    given: tuple[str, ...] | None = getattr(method, "modules_to_save", None)
    if given is None:
        advice = "save the base with peftjax.save_model and use that checkpoint"
    else:
        advice = f"set method.modules_to_save={(*given, *names)!r} to train and save it"
    warnings.warn(
        f"the checkpoint has no {', '.join(names)}: random weights take its place, which "
        f"{method.method} neither trains nor saves in the adapter file; {advice}",
        stacklevel=3,
    )


def attach_unchecked(model: ModelT, method: Method, name: str, *, rngs: nnx.Rngs) -> ModelT:
    """Attach without `method.check`, for a method from an adapter file: `check` rejects options that only files may have."""
    _require_new(model, name)
    _require_outermost(model)
    try:
        method.attach(model, name, rngs)
        if method.trains is PeftParam:  # the task head is trained in full too, unless the method does so already
            heads = [site for site in head_sites(model) if name not in site.module.adapters.names()]
            train_whole([(site, np.ones(1, bool)) for site in heads], name)
    except Exception:  # of any kind: the model is restored
        _remove(model, name)
        raise
    set_registry(model, registry_of(model).with_method(name, method))
    return use(model, name)


def _require_new(model: nnx.Module, name: str) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][\w.-]*", name):
        raise UserError(
            f"adapter name {name!r}: use letters, digits, underscores, dashes and dots, starting with a letter or an underscore"
        )
    if name in dir(Slot()):  # adapters are attributes of their slots
        raise UserError(f"adapter name {name!r} is reserved; choose another name")
    if name in attached(model):
        raise UserError(f"adapter {name!r} is already attached; detach it first or choose another name")


def _require_outermost(model: nnx.Module) -> None:
    """Refuse a module around a peftjax model, whose names, stacks and tied layers only the model itself knows."""
    if path := inner_model(model):
        raise UserError(
            f"{path} is a peftjax model inside a {type(model).__name__}; attach to that model: pass model.{path}"
        )


def release_head(model: nnx.Module, name: str) -> None:
    """Remove the task head from adapter `name`; the base's own head is used."""
    for site in head_sites(model):
        site.module.adapters.remove(name)


def detach(model: ModelT, name: str = "default") -> ModelT:
    """Remove an adapter. The model is then as it was before the adapter was attached.

    Args:
        model: The model; it is changed in place.
        name: Name of the adapter. If it is merged, it is unmerged first.

    Returns:
        The model.

    Raises:
        UserError: The adapter is not attached, or others were merged after it.

    Examples:
        >>> import jax
        >>> import peftjax
        >>> from flax import nnx
        >>> model = peftjax.load_model("embedded")
        >>> model = peftjax.attach(model, peftjax.Lora(rank=4), rngs=nnx.Rngs(0))
        >>> model = peftjax.detach(model, "default")
        >>> any(jax.tree.leaves(peftjax.trainable_mask(model)))
        False
    """
    require(model, name)
    if name in merged(model):
        unmerge(model, name)
    _remove(model, name)
    set_registry(model, registry_of(model).without(name))
    return model


def count_trainable(model: nnx.Module, name: str = "default") -> int:
    """Return the number of parameters that an adapter trains, without the padding of layers of smaller rank.

    In a LoRA, all experts of a layer count with the largest rank among them.

    Raises:
        UserError: The adapter is not attached.
    """
    require(model, name)
    sizes: dict[tuple[Any, ...], int] = {}  # by variable, layer and part, so that what layers share is counted once
    for site, adapter in adapter_parts(model, name):
        in_file = set()
        for layer in site.layers:
            for leaf in adapter.hf_leaves(layer).values():
                in_file.add(leaf.leaf)
                variable = vars(adapter)[leaf.leaf]
                part = leaf.part(variable.shape[0 if layer is None else 1 :])
                if isinstance(variable, PeftParam):
                    sizes[id(variable), layer, part] = math.prod(map(len, part))
        for path, variable in variables.flat(adapter)[1].items():
            if isinstance(variable, PeftParam) and path not in in_file:
                sizes[id(variable), None, ()] = variable.size
    return sum(sizes.values())


def _remove(model: nnx.Module, name: str) -> None:
    for site, _ in adapters_named(model, name):
        site.module.adapters.remove(name)
