"""VB-LoRA: y = x (W + A B) + b, with A and B composed of the vectors of one bank, which all layers share.

Li et al. 2024 (arXiv:2405.15179): each piece of `vector_length` of a column of A or a row of B is a mixture of the k
vectors of the bank with the largest logits, weighted by the softmax over these k logits. Bank and logits are trained.
There is no scale, and no factor is zero at initialization: a new adapter changes the model.
"""

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import FactoredAdapter, HfLeaf, LayerMask
from peftjax.adapters.biases import WithBiases
from peftjax.adapters.options import positive, positive_integer
from peftjax.adapters.selection import Chosen, check_rank
from peftjax.adapters.sites import Site
from peftjax.core.errors import UserError
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.nn.dropout import Dropout


@dataclasses.dataclass(frozen=True, kw_only=True)
class VbLora(WithBiases):
    """Options of VB-LoRA.

    Attributes:
        rank (int, default 4): Rank of A B.
        num_vectors (int, default 256): Number of vectors in the bank.
        vector_length (int, default 256): Their length; it must divide both sides of every target.
        topk (int, default 2): Number k of vectors in a mixture.
        dropout (float, default 0.0): Dropout rate of the adapter's input.
        init_vector_bank_bound (float, default 0.02): The bank is initialized uniformly within +- this bound.
        init_logits_std (float, default 0.1): Standard deviation of the initial logits.
    """

    rank: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    dropout: float = 0.0
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    method: ClassVar[str] = "vblora"
    peft_type: ClassVar[str] = "VBLORA"
    hf_fields: ClassVar = WithBiases.hf_fields | {
        "rank": ("r", 4),
        "num_vectors": ("num_vectors", 256),
        "vector_length": ("vector_length", 256),
        "topk": ("topk", 2),
        "dropout": ("vblora_dropout", 0.0),
        "init_vector_bank_bound": ("init_vector_bank_bound", 0.02),
        "init_logits_std": ("init_logits_std", 0.1),
    }
    hf_constants: ClassVar = {"save_only_topk_weights": False, "fan_in_fan_out": False}
    traced_options: ClassVar = WithBiases.traced_options | {"rank", "init_vector_bank_bound", "init_logits_std"}

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_integer(rank=self.rank, num_vectors=self.num_vectors, vector_length=self.vector_length, topk=self.topk)
        positive(init_vector_bank_bound=self.init_vector_bank_bound, init_logits_std=self.init_logits_std)
        if self.topk > self.num_vectors:
            raise UserError(f"method.topk={self.topk} is more than method.num_vectors={self.num_vectors}")

    @property
    def neutral(self) -> bool:
        return False

    def check(self, model: nnx.Module) -> None:
        for site, _ in self.chosen(model):
            check_rank(self.rank, site)

    def adapters(self, chosen: Chosen, rngs: nnx.Rngs) -> Iterator[tuple[Site, "VbLoraLinear"]]:
        for site, _ in chosen:
            for side in (site.module.in_features, site.module.out_features):
                if side % self.vector_length:
                    raise UserError(
                        f"method.vector_length={self.vector_length} does not divide {side}, a side of {site.names[0]}; "
                        "choose a divisor of both sides of every target"
                    )
        shape, bound = (self.num_vectors, self.vector_length), self.init_vector_bank_bound
        bank = PeftParam(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound), axes=(None, None))
        for site, mask in chosen:
            yield site, VbLoraLinear(site, mask, bank, self, rngs)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        if config.get("save_only_topk_weights"):
            warnings.warn(
                "adapter_config.json: save_only_topk_weights=True: the file has only the logits of the topk vectors. Further training "
                "cannot choose other vectors",
                stacklevel=2,
            )
        return super().from_hf(config | {"save_only_topk_weights": False})


class VbLoraLinear(FactoredAdapter):
    """x W + dropout(x) A B.

    Attributes:
        bank: [H, P].
        logits_a: Logits of A, [*stack, R, in / P, H]. In a layer without the adapter, A counts as 0.
        logits_b: Logits of B, [*stack, out / P, R, H].
        active: 1 within the rank and 0 in the padding of a population, [R]. Without it, padded logits would be mixtures, too.
    """

    zero_is_identity: ClassVar = True
    names: ClassVar = {"vblora_logits_A": HfLeaf("logits_a"), "vblora_logits_B": HfLeaf("logits_b")}

    def __init__(self, site: Site, mask: np.ndarray, bank: PeftParam, method: VbLora, rngs: nnx.Rngs) -> None:
        self.layers = LayerMask(mask)
        self.bank, self.topk = bank, method.topk
        vectors, length = bank.shape
        a = (method.rank, site.module.in_features // length, vectors)
        b = (site.module.out_features // length, method.rank, vectors)

        def logits(shape: tuple[int, ...], *axes: str | None) -> PeftParam:
            drawn = jax.random.normal(rngs.params(), (*site.stack, *shape), jnp.float32)
            return PeftParam(drawn * method.init_logits_std, axes=site.lead(*axes))

        self.logits_a = logits(a, "rank", None, None)
        self.logits_b = logits(b, None, "rank", None)
        self.active = PeftConstant(jnp.ones(method.rank, jnp.float32), axes=("rank",))
        self.dropout = Dropout(method.dropout, site.stack)

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """A [in, R] and B [R, out] of one layer."""
        rank = self.logits_a.shape[0]
        a = self._mixed(self.logits_a.get_value()).reshape(rank, -1).T
        b = self._mixed(self.logits_b.get_value()).swapaxes(0, 1).reshape(rank, -1)
        return self.layers.or_zero(a * self.active.get_value()[None]), b

    def _mixed(self, logits: jax.Array) -> jax.Array:
        """Mixtures of vectors of the bank, float32 [..., P], from logits [..., H]."""
        largest, chosen = jax.lax.top_k(logits, self.topk)  # [..., K]
        weights = jax.nn.softmax(largest, axis=-1)
        return jnp.einsum("...k,...kp->...p", weights, self.bank.get_value()[chosen])

    def hf_shared(self) -> dict[str, HfLeaf]:
        return {"base_model.vblora_vector_bank": HfLeaf("bank")}
