"""A model reduced to its active adapters, without their names."""

from flax import nnx

from peftjax.adapters.registry import ModelT, Registry, set_registry
from peftjax.adapters.sites import sites


def active_view(model: ModelT) -> ModelT:
    """Return the model without inactive adapters, its active ones renamed `a0`, `a1`, ... in their order.

    The view has the same structure for all adapters of the same shapes, so one compiled function runs them all. It shares
    the variables of the model.
    """
    view: ModelT = nnx.merge(*nnx.split(model))
    for site in sites(view):
        slot = site.module.adapters
        active = slot.active_adapters()
        for name in slot.names():
            slot.remove(name)
        for index, adapter in enumerate(active):
            slot.add(f"a{index}", adapter)
        slot.active = tuple(f"a{index}" for index in range(len(active)))
    set_registry(view, Registry())
    return view
