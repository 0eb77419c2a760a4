"""LoRA: y = x W + s (x A) B, with W frozen, A random and B zero at the start.

Hu et al. 2021 (arXiv:2106.09685), section 4.1, eq. 3, with s = alpha / r; rank-stabilised LoRA has s = alpha / sqrt(r)
(Kalajdzievski 2023, arXiv:2312.03732, eq. 3). The derivation is in docs/lora.md.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.methods.base import DeltaAdapter, HfLeaf, LayerMask, Override, parameter, transposed
from peftjax.methods.sites import Chosen, Site, adapters, by_name, check_table, place, sites
from peftjax.methods.targeted import Targeted
from peftjax.nn.dropout import Dropout
from peftjax.nn.embedding import Embedding
from peftjax.nn.linear import Linear
from peftjax.quant.matmul import matmul


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora(Targeted):
    """Options of LoRA, beside those of `Targeted`; Linear and Embedding layers can be targets.

    rank, alpha: as in the paper. rank_pattern, alpha_pattern: exceptions by module name, {"layers.0.self_attn.q_proj": 4}.
    dropout: on the adapter's input, in training.
    bias: train no bias ("none"), those of the targets ("lora_only") or all of the model ("all").
    dtype: of A and B; the computation runs in the dtype of the activations.
    """

    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    rslora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    bias: str = "none"
    dtype: str = "float32"

    method: ClassVar[str] = "lora"
    peft_type: ClassVar[str] = "LORA"
    fits: ClassVar = (Linear, Embedding)
    hf_fields: ClassVar = Targeted.hf_fields | {
        "rank": ("r", 8),
        "alpha": ("lora_alpha", 8),
        "dropout": ("lora_dropout", 0.0),
        "rslora": ("use_rslora", False),
        "rank_pattern": ("rank_pattern", None),
        "alpha_pattern": ("alpha_pattern", None),
        "bias": ("bias", "none"),
    }
    hf_constants: ClassVar = {"init_lora_weights": True, "fan_in_fan_out": False}
    hf_ignored: ClassVar = Targeted.hf_ignored | {
        "init_lora_weights", "runtime_config", "megatron_core", "ensure_weight_tying", "qalora_group_size",
        "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, field)
            items = value.items() if isinstance(value, Mapping) else value
            object.__setattr__(self, field, tuple((str(key), number) for key, number in items))
        for rank in (self.rank, *dict(self.rank_pattern).values()):
            if not isinstance(rank, int) or rank < 1:
                raise ValueError(f"method.rank must be a whole number of at least 1, it is {rank!r}")
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"method.bias must be 'none', 'all' or 'lora_only', it is {self.bias!r}")

    def attach(self, model: nnx.Module, name: str, rngs: nnx.Rngs) -> None:
        super().attach(model, name, rngs)
        if self.bias != "none":
            self._train_biases(model, name)

    def chosen(self, model: nnx.Module) -> Chosen:
        chosen = super().chosen(model)
        check_table("rank_pattern", self.rank_pattern, chosen)
        check_table("alpha_pattern", self.alpha_pattern, chosen)
        return chosen

    def adapter(self, site: Site, mask: np.ndarray, rngs: nnx.Rngs) -> "LoraLinear | LoraEmbedding":
        ranks = np.where(mask, by_name(site, self.rank_pattern, self.rank), 0)
        limit = min(site.module.in_features, site.module.out_features)
        if ranks.max() > limit:
            raise ValueError(
                f"method.rank={ranks.max()} is larger than {site.names[0]} allows: its smaller side is {limit}"
            )
        alphas = by_name(site, self.alpha_pattern, self.alpha)
        scales = alphas / np.maximum(np.sqrt(ranks) if self.rslora else ranks, 1)
        kind = LoraLinear if isinstance(site.module, Linear) else LoraEmbedding
        return kind(site, ranks, scales, dropout=self.dropout, dtype=jnp.dtype(self.dtype), rngs=rngs)

    def _train_biases(self, model: nnx.Module, name: str) -> None:
        targeted = {site.path: mask for site, mask in self.chosen(model)}
        there = {site.path: adapter for site, adapter in adapters(model, name)}
        trained = 0
        for site in sites(model):
            if "bias" not in site.parameters or (self.bias == "lora_only" and site.path not in targeted):
                continue
            mask = np.ones(len(site.names), bool) if self.bias == "all" else targeted[site.path]
            bias = site.parameters["bias"]
            copy = PeftParam(jnp.array(bias.get_value(), jnp.float32), axes=bias.axes)
            trained += 1
            if site.path in targeted:
                lora = there[site.path]
                lora.bias, lora.bias_layers = nnx.data(copy), nnx.data(LayerMask(tuple(bool(x) for x in mask)))
            elif site.path not in there:
                adapter = Override({"bias": copy.get_value()}, {"bias": bias.axes}, {"bias": HfLeaf("bias")},
                                   tuple(bool(x) for x in mask))  # fmt: skip
                place(site, name, adapter)
            elif not all(there[site.path].layers.chosen):
                last = site.names[0].rsplit(".", 1)[-1]
                raise ValueError(
                    f"method.bias='all' needs all layers of {last} in modules_to_save or none: one adapter cannot train "
                    "the whole in some layers and the bias alone in the others"
                )
        if not trained:
            raise ValueError(f"method.bias={self.bias!r}: no layer in question has a bias; set it to 'none'")

    def to_hf(self, model: nnx.Module, name: str) -> dict[str, Any]:
        patterns = {"rank_pattern": dict(self.rank_pattern), "alpha_pattern": dict(self.alpha_pattern)}
        return super().to_hf(model, name) | patterns

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Lora":
        init = config.get("init_lora_weights", True)
        if isinstance(init, str) and init.lower() not in ("gaussian", "eva", "orthogonal"):
            raise ValueError(
                f"adapter_config.json: init_lora_weights={init!r} changes the base model too and is not supported; "
                "convert the adapter to plain LoRA first (save_pretrained with path_initial_model_for_weight_conversion)"
            )
        return super().from_hf(config)


class LoraLinear(DeltaAdapter):
    """x W + (x A * scale) B. a: [*stack, in, R], b: [*stack, R, out], scale: [*stack, R].

    R is the largest rank in the stack; a layer of smaller rank has scale 0 beyond its own, a layer left out everywhere:
    there A and B get no gradient.
    """

    names: ClassVar = {"lora_A.weight": transposed("a"), "lora_B.weight": transposed("b")}

    def __init__(
        self, site: Site, ranks: np.ndarray, scales: np.ndarray, *, dropout: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.ranks = tuple(int(rank) for rank in ranks)  # one for each layer, 0 where there is none
        rank, stack = max(self.ranks), site.stack
        owner = site.module
        active = np.arange(rank) < ranks[:, None]  # [layers, R]
        scale = jnp.asarray(active * scales[:, None], jnp.float32).reshape(*stack, rank)
        a, b = self.initial((*stack, owner.in_features, rank), (*stack, rank, owner.out_features), rngs)
        self.a = PeftParam((a * active.reshape(*stack, 1, rank)).astype(dtype), axes=site.lead(owner.axes[0], "rank"))
        self.b = PeftParam((b * active.reshape(*stack, rank, 1)).astype(dtype), axes=site.lead("rank", owner.axes[1]))
        self.scale = PeftConstant(scale, axes=site.lead("rank"))
        self.bias, self.bias_layers = nnx.data(None), nnx.data(None)
        self.dropout = Dropout(dropout, stack)

    def initial(self, a: tuple[int, ...], b: tuple[int, ...], rngs: nnx.Rngs) -> tuple[jax.Array, jax.Array]:
        """A uniform in +-1/sqrt(in) (peft's Kaiming uniform with a = sqrt(5)), B zero: shapes to arrays."""
        bound = a[-2] ** -0.5
        return jax.random.uniform(rngs.params(), a, jnp.float32, -bound, bound), jnp.zeros(b, jnp.float32)

    def __call__(
        self, owner: nnx.Module, compute: Callable[..., jax.Array], *inputs: Any, **parameters: Any
    ) -> jax.Array:
        (x,) = inputs
        if self.bias is not None:
            parameters["bias"] = self.bias_layers(self.bias.get_value(), parameter(owner, "bias", parameters))
        low = self._scaled(matmul(self.dropout(x), self.a.get_value()))  # [..., R]
        return compute(x, **parameters) + matmul(low, self.b.get_value())

    def _scaled(self, low: jax.Array) -> jax.Array:
        return low * jnp.broadcast_to(self.scale.get_value().astype(low.dtype), low.shape)

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        rank = self.ranks[layer or 0]
        windows = {"a": (slice(None), slice(rank)), "b": (slice(rank), slice(None))}
        leaves = {key: dataclasses.replace(leaf, window=windows[leaf.leaf]) for key, leaf in self.names.items() if rank}
        if self.bias is not None and self.bias_layers.chosen[layer or 0]:
            leaves["base_layer.bias" if rank else "bias"] = HfLeaf("bias")  # peft wraps the layers that have a LoRA
        return leaves

    def delta(self) -> jax.Array:
        """s A B."""
        a, b = self.a.get_value().astype(jnp.float32), self.b.get_value().astype(jnp.float32)
        return jnp.matmul(a * self.scale.get_value()[None], b)

    def merged(self, **parameters: jax.Array) -> dict[str, jax.Array]:
        merged = super().merged(**parameters)
        if self.bias is not None:
            bias = self.bias_layers(self.bias.get_value(), parameters["bias"])
            merged["bias"] = bias.astype(parameters["bias"].dtype)
        return merged


class LoraEmbedding(LoraLinear):
    """E[token] + (A[token] * scale) B: the same update of a table [V, D], with A zero and B normal at the start."""

    names: ClassVar = {"lora_embedding_A": transposed("a"), "lora_embedding_B": transposed("b")}
    kernel: ClassVar = "embedding"

    def initial(self, a: tuple[int, ...], b: tuple[int, ...], rngs: nnx.Rngs) -> tuple[jax.Array, jax.Array]:
        """A zero, B normal with standard deviation 1, as peft does."""
        return jnp.zeros(a, jnp.float32), jax.random.normal(rngs.params(), b, jnp.float32)

    def __call__(
        self, owner: nnx.Module, compute: Callable[..., jax.Array], *inputs: Any, **parameters: Any
    ) -> jax.Array:
        (tokens,) = inputs
        y = compute(tokens, **parameters)
        low = self._scaled(jnp.take(self.a.get_value(), tokens, axis=0).astype(y.dtype))  # [B, T, R]
        return y + matmul(low, self.b.get_value())
