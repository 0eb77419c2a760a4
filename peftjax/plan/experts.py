"""The part of a mixture of experts that a batch uses."""

import dataclasses

from flax import nnx

from peftjax import sharding
from peftjax.models.base import Model
from peftjax.nn.experts import block_sizes
from peftjax.nn.moe import MixtureOfExperts


@dataclasses.dataclass(frozen=True)
class ExpertUse:
    """What a microbatch uses of each layer's experts; all of the model if it has no experts.

    The number of blocks in use depends on the routing. The last block of an expert is taken to be half full.

    Attributes:
        active: The experts that one token uses, as a share of all.
        blocks: The blocks that are in use, as a share of those that the program has for any routing.
        reads: How often the kernel of an expert is read in each pass: once for each of its blocks that is in use.
    """

    active: float = 1.0
    blocks: float = 1.0
    reads: float = 1.0


def expert_use(model: Model, batch: int, length: int) -> ExpertUse:
    """Return what a microbatch [batch, length] uses of the model's experts on the current mesh (`jax.set_mesh`)."""
    layer = next((module for _, module in nnx.iter_modules(model) if isinstance(module, MixtureOfExperts)), None)
    if layer is None:
        return ExpertUse()
    experts, shards = (
        layer.experts.gate_up.experts,
        sharding.shard_count("batch", batch) * sharding.shard_count("length", length),
    )
    pairs, here = batch * length // shards * layer.choices, experts // sharding.shard_count("expert", experts)
    rows, blocks = block_sizes(pairs, experts, here)
    own = pairs * here / experts  # rows of this device's experts, without padding
    used = min(own / rows + here / 2, own)
    return ExpertUse(layer.choices / experts, used / blocks, used / here)
