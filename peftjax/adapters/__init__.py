"""What all methods share: the layers they attach to, attaching, merging, and batches of several adapters.

Nothing here depends on a particular method.
"""

from peftjax.adapters.attach import attach, count_trainable, detach
from peftjax.adapters.merge import merge, unmerge
from peftjax.adapters.method import Method
from peftjax.adapters.mixed_batch import rows
from peftjax.adapters.optimizer import wrap_optimizer
from peftjax.adapters.registry import active, attached, use
from peftjax.nn.slot import active_view

__all__ = [
    "Method",
    "active",
    "active_view",
    "attach",
    "attached",
    "count_trainable",
    "detach",
    "merge",
    "rows",
    "unmerge",
    "use",
    "wrap_optimizer",
]
