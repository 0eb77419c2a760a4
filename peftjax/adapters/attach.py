"""Attach, use and detach adapters by name.

Each function changes the model it is given and returns it. Base parameters never change here (`merge` does that).
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters import provenance
from peftjax.adapters.merge import unmerge
from peftjax.adapters.method import Method
from peftjax.adapters.registry import active, attached, merged, require, use
from peftjax.adapters.sites import adapters_named, head_sites, sites
from peftjax.adapters.targeted import train_whole
from peftjax.core import variables
from peftjax.core.variables import PeftParam
from peftjax.nn.slot import Slot


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
    for site, adapter in adapters_named(model, name):
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


def detach(model: Any, name: str = "default") -> Any:
    """Take the adapters called `name` out; the model is as it was before they were attached."""
    require(model, name)
    if name in merged(model):
        unmerge(model, name)
    _remove(model, name)
    model.used = tuple(used for used in active(model) if used != name)
    model.methods = tuple(item for item in model.methods if item[0] != name)
    provenance.forget(model, name)
    return model


def count_trainable(model: Any, name: str = "default") -> int:
    """How many parameters the adapters called `name` train, without the rows that pad layers of smaller rank."""
    require(model, name)
    counted: set[int] = set()  # variables that a method shares among layers, counted once
    total = 0
    for site, adapter in adapters_named(model, name):
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


def _remove(model: Any, name: str) -> None:
    for site, _ in adapters_named(model, name):
        site.module.adapters.remove(name)
