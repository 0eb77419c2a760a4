"""Base classes of layers: those with parameters that checkpoints store, and those with a slot for adapters."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from flax import nnx

from peftjax.nn.slot import Slot

HfLeaves = Mapping[str, tuple[str, tuple[int, ...] | None]]


class Layer(nnx.Module):
    """A layer.

    Attributes:
        hf_leaves: {parameter: (its name in Hugging Face checkpoints, permutation)}. Checkpoints store the parameter
            transposed by the permutation; None: as it is. A name that is empty or starts with "_" is appended to the layer's
            name without a dot.
    """

    hf_leaves: ClassVar[HfLeaves] = MappingProxyType({})


class SlottedLayer(Layer):
    """A layer with a slot, where adapters wrap its computation."""

    adapters: Slot
