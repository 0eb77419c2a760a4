"""A tied head that follows the embedding's trained table or LoRA: `ensure_weight_tying`.

Without it, as in peft, an adapter of the embedding leaves the head as it is, and the two differ once it is active.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.adapters.adapter import DeltaAdapter, HfLeaf, LayerMask, Override, WeightAdapter
from peftjax.adapters.diagonal import times
from peftjax.adapters.selection import Chosen
from peftjax.adapters.sites import Site, insert
from peftjax.core.errors import UserError
from peftjax.methods.lora.adapter import LoraEmbedding
from peftjax.methods.lora.dora import DoraEmbedding
from peftjax.nn.dropout import Dropout
from peftjax.quant.matmul import matmul


def on_embedding(chosen: Chosen, pair: tuple[Site, Site] | None) -> Chosen:
    """Replace a tied head among the chosen sites with the embedding."""
    if pair is None or all(site.path != pair[1].path for site, _ in chosen):
        return chosen
    embed, head = pair
    mask = next(mask for site, mask in chosen if site.path == head.path)
    return [*((site, own) for site, own in chosen if site.path not in (embed.path, head.path)), (embed, mask)]


def tie(pair: tuple[Site, Site], name: str, dropout: float) -> None:
    """Let the head follow adapter `name` of the embedding, if it has one."""
    embed, head = pair
    adapter = embed.module.adapters.adapter(name) if name in embed.module.adapters.names() else None
    if isinstance(adapter, Override):
        insert(head, name, TiedTable(vars(adapter)["embedding"]))
    elif isinstance(adapter, DoraEmbedding):
        raise UserError(
            f"method.ensure_weight_tying=True cannot be combined with dora=True for {embed.names[0]}: the head would need "
            "magnitudes of its own; leave the embedding out of the targets, or choose one of the options"
        )
    elif isinstance(adapter, LoraEmbedding):
        insert(head, name, TiedLora(adapter, dropout))


class TiedTable(WeightAdapter):
    """x T^T, with the trained table T [V, D] of the embedding."""

    names: ClassVar = {"weight": HfLeaf("embedding")}

    def __init__(self, table: nnx.Variable) -> None:
        self.embedding, self.layers = table, LayerMask([True])

    def changed(self, kernel: jax.Array) -> jax.Array:
        del kernel
        table: jax.Array = self.embedding.get_value()
        return table.T


class TiedLora(DeltaAdapter):
    """x W + (dropout(x) B^T * scale) A^T, with the embedding's A [V, R] and B [R, D]."""

    zero_is_identity: ClassVar = True
    names: ClassVar = {"lora_A.weight": HfLeaf("b"), "lora_B.weight": HfLeaf("a")}

    def __init__(self, lora: LoraEmbedding, dropout: float) -> None:
        self.scale, self.a, self.b = lora.scale, lora.a, lora.b
        self.dropout, self.layers = Dropout(dropout), LayerMask([True])

    def delta(self) -> jax.Array:
        a, b = (leaf.get_value().astype(jnp.float32) for leaf in (self.a, self.b))
        return jnp.matmul(a * self.scale.get_value()[None], b).T

    def update(self, x: jax.Array) -> jax.Array:
        low = matmul(self.dropout(x), self.b.get_value().T)
        return matmul(times(low, self.scale.get_value()), self.a.get_value().T)
