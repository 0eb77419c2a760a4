"""A model reduced to its active adapters, without their names."""

from peftjax.adapters.registry import ModelT, Registry, set_registry
from peftjax.nn.slot import without_inactive


def active_view(model: ModelT) -> ModelT:
    """Return the model without inactive adapters, its active ones renamed `a0`, `a1`, ... in their order.

    The view has the same structure for all adapters of the same shapes, so one compiled function runs them all. It shares
    the variables of the model.
    """
    view = without_inactive(model)
    set_registry(view, Registry())
    return view
