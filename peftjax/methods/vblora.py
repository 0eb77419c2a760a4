"""VB-LoRA: y = x (W + A B) + b, with A and B put together from the vectors of one bank, which all layers share.

Li et al. 2024 (arXiv:2405.15179): each piece of `vector_length` of a column of A or a row of B is a mixture of the k
vectors of the bank with the largest logits, weighted by the softmax over these k logits. Bank and logits are trained.
There is no scale, and no matrix is zero at the start: the adapter changes the model at once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import DeltaAdapter, HfLeaf, LayerMask
from peftjax.adapters.method import positive
from peftjax.adapters.sites import Site, check_rank, place
from peftjax.adapters.targeted import Targeted, train_whole
from peftjax.core.variables import PeftParam
from peftjax.nn.dropout import Dropout
from peftjax.quant.matmul import matmul


@dataclasses.dataclass(frozen=True, kw_only=True)
class VbLora(Targeted):
    """Options of VB-LoRA, beside those of `Targeted`.

    rank: of A B. num_vectors, vector_length: of the bank; vector_length divides both sides of each target. topk: how
    many vectors are mixed. dropout: on the adapter's input, in training.
    init_vector_bank_bound: the bank is uniform within it, at the start. init_logits_std: the logits' standard deviation.
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
    hf_fields: ClassVar = Targeted.hf_fields | {
        "rank": ("r", 4),
        "num_vectors": ("num_vectors", 256),
        "vector_length": ("vector_length", 256),
        "topk": ("topk", 2),
        "dropout": ("vblora_dropout", 0.0),
        "init_vector_bank_bound": ("init_vector_bank_bound", 0.02),
        "init_logits_std": ("init_logits_std", 0.1),
    }
    hf_constants: ClassVar = {"save_only_topk_weights": False, "bias": "none", "fan_in_fan_out": False}

    @property
    def neutral(self) -> bool:
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("rank", "num_vectors", "vector_length", "topk"):
            value = getattr(self, option)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"method.{option} must be a whole number of at least 1, it is {value!r}")
        if self.topk > self.num_vectors:
            raise ValueError(f"method.topk={self.topk} is more than method.num_vectors={self.num_vectors}")
        positive(init_vector_bank_bound=self.init_vector_bank_bound, init_logits_std=self.init_logits_std)

    def check(self, model: nnx.Module) -> None:
        for site, _ in self.chosen(model):
            check_rank(self.rank, site)

    def attach(self, model: nnx.Module, name: str, rngs: nnx.Rngs) -> None:
        chosen, bound = self.chosen(model), self.init_vector_bank_bound
        for site, _ in chosen:
            for side in (site.module.in_features, site.module.out_features):
                if side % self.vector_length:
                    raise ValueError(
                        f"method.vector_length={self.vector_length} does not divide {side}, a side of {site.names[0]}; "
                        "choose a divisor of both sides of every target"
                    )
        shape = (self.num_vectors, self.vector_length)
        bank = PeftParam(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound), axes=(None, None))
        for site, mask in chosen:
            place(site, name, VbLoraLinear(site, mask, bank, self, rngs))
        train_whole(model, self.saved(model), name)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "VbLora":
        if config.get("save_only_topk_weights"):
            raise ValueError(
                "adapter_config.json: save_only_topk_weights=True: the file has the largest weights in place of the "
                "logits and cannot be trained further. Save it from peft with save_only_topk_weights=False"
            )
        return super().from_hf(config)


class VbLoraLinear(DeltaAdapter):
    """x A B. bank: [H, P], logits_a: [*stack, R, in / P, H], logits_b: [*stack, out / P, R, H].

    In a layer that is left out A stands for 0.
    """

    names: ClassVar = {"vblora_logits_A": HfLeaf("logits_a"), "vblora_logits_B": HfLeaf("logits_b")}

    def __init__(self, site: Site, mask: np.ndarray, bank: PeftParam, method: VbLora, rngs: nnx.Rngs) -> None:
        self.layers = LayerMask(tuple(bool(x) for x in mask))
        self.bank, self.topk = bank, method.topk
        vectors, length = bank.shape
        a = (method.rank, site.module.in_features // length, vectors)
        b = (site.module.out_features // length, method.rank, vectors)

        def logits(shape: tuple[int, ...], *axes: str | None) -> PeftParam:
            drawn = jax.random.normal(rngs.params(), (*site.stack, *shape), jnp.float32)
            return PeftParam(drawn * method.init_logits_std, axes=site.lead(*axes))

        self.logits_a = logits(a, "rank", None, None)
        self.logits_b = logits(b, None, "rank", None)
        self.dropout = Dropout(method.dropout, site.stack)

    def __call__(
        self, owner: nnx.Module, compute: Callable[..., jax.Array], *inputs: Any, **parameters: Any
    ) -> jax.Array:
        (x,) = inputs
        a, b = self._factors()
        return compute(x, **parameters) + matmul(matmul(self.dropout(x), a), b)

    def hf_shared(self) -> dict[str, HfLeaf]:
        return {"base_model.vblora_vector_bank": HfLeaf("bank")}

    def delta(self) -> jax.Array:
        """A B."""
        a, b = self._factors()
        return a @ b

    def _factors(self) -> tuple[jax.Array, jax.Array]:
        """A, [in, R], and B, [R, out]."""
        rank = self.logits_a.shape[0]
        a = self._mixed(self.logits_a.get_value()).reshape(rank, -1).T
        b = self._mixed(self.logits_b.get_value()).swapaxes(0, 1).reshape(rank, -1)
        return self.layers(a, jnp.zeros_like(a)), b

    def _mixed(self, logits: jax.Array) -> jax.Array:
        """Pieces of the factors, float32 [..., P], from their logits [..., H]."""
        largest, chosen = jax.lax.top_k(logits, self.topk)  # [..., K]
        weights = jax.nn.softmax(largest, axis=-1)
        return jnp.einsum("...k,...kp->...p", weights, self.bank.get_value()[chosen])
