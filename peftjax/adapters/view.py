"""The model as it computes with its active adapters, without the others and without names."""

from typing import Any

from flax import nnx

from peftjax.adapters.sites import sites


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
