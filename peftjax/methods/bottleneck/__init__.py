"""Bottleneck adapters: the methods, their adapter, and AdapterHub's configs."""

from peftjax.methods.bottleneck.bottleneck import Bottleneck, Houlsby, ParallelAdapter, Pfeiffer
from peftjax.methods.bottleneck.hub import from_hub

__all__ = ["Bottleneck", "Houlsby", "ParallelAdapter", "Pfeiffer", "from_hub"]
