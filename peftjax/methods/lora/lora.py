"""LoRA: y = x W + s (x A) B, with W frozen, A random and B zero at the start.

Hu et al. 2021 (arXiv:2106.09685), section 4.1, eq. 3, with s = alpha / r; rank-stabilised LoRA has s = alpha / sqrt(r)
(Kalajdzievski 2023, arXiv:2312.03732, eq. 3). What computes it is in lora_adapter.py, where A and B start in
lora_init.py, DoRA in dora.py; the derivations are in docs/lora.md. Two variants change no equation:

LoRA+    B learns `lr_ratio` times as fast as A: Hayou et al. 2024 (arXiv:2402.12354), section 4.
LoRA-FA  A stays as it starts: Zhang et al. 2023 (arXiv:2308.03303). The paper's second version, and peft's optimizer for
         it, also multiply B's gradient with (A^T A)^-1 / s^2; here the gradient is B's own.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, LayerMask, Override
from peftjax.adapters.method import positive
from peftjax.adapters.provenance import formats
from peftjax.adapters.sites import Chosen, Site, adapters_named, by_name, check_rank, check_table, place, sites
from peftjax.adapters.targeted import Targeted
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.methods.lora.adapter import LoraEmbedding, LoraLinear
from peftjax.methods.lora.dora import DoraEmbedding, DoraLinear, DoraResidual
from peftjax.methods.lora.eva import find_directions, redistribute
from peftjax.methods.lora.init import INITS, RESIDUAL, ResidualLora, initial
from peftjax.methods.lora.loftq import Kernels, begin
from peftjax.methods.trainable_tokens import check_tokens, token_embedding, train_tokens
from peftjax.nn.embedding import Embedding
from peftjax.nn.linear import Linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora(Targeted):
    """Options of LoRA, beside those of `Targeted`; Linear and Embedding layers can be targets.

    rank, alpha: as in the paper. rank_pattern, alpha_pattern: exceptions by module name, {"layers.0.self_attn.q_proj": 4}.
    dropout: on the adapter's input, in training.
    bias: train no bias ("none"), those of the targets ("lora_only") or all of the model ("all").
    lora_bias: train a bias on B, which is scaled as B is.
    token_indices: tokens whose rows of the embedding are trained beside it (trainable_tokens.py), such as new ones.
    dora: train magnitude and direction apart.
    init: where A and B start: "kaiming", "gaussian", "orthogonal", "olora", "pissa" or "pissa_niter_N" (N: a number);
    "loftq" or "loftq_niter_N": from the kernels before they were quantized (`attach(..., kernels=)`; a training reads
    them from its base); "eva": from batches of data (`attach(..., batches=)`; a training shows it its first
    `eva_batches`). eva_rho: how many times its rank a layer may get there, 1: the ranks stay.
    lr_ratio: B's learning rate over A's. It holds for vectors (biases, magnitudes) too, as in peft, and not for
    embeddings, whose A and B have other parts. freeze_a: train B alone.
    dtype: of A and B; the computation runs in the dtype of the activations.
    """

    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    rslora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    bias: str = "none"
    lora_bias: bool = False
    token_indices: tuple[int, ...] = ()
    dora: bool = False
    init: str = "kaiming"
    eva_rho: float = 2.0
    eva_batches: int = 16
    lr_ratio: float = 1.0
    freeze_a: bool = False
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
        "lora_bias": ("lora_bias", False),
        "token_indices": ("trainable_token_indices", None),
        "dora": ("use_dora", False),
    }
    hf_constants: ClassVar = {"init_lora_weights": True, "fan_in_fan_out": False}
    hf_ignored: ClassVar = Targeted.hf_ignored | {
        "runtime_config", "megatron_core", "ensure_weight_tying", "qalora_group_size",
    }  # fmt: skip
    hf_training: ClassVar = {
        "init_lora_weights": True, "loftq_config": {}, "eva_config": None, "corda_config": None, "lora_ga_config": None,
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
        object.__setattr__(self, "token_indices", tuple(self.token_indices))
        check_tokens(self.token_indices)
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"method.bias must be 'none', 'all' or 'lora_only', it is {self.bias!r}")
        if not INITS.fullmatch(self.init):
            raise ValueError(
                f"method.init={self.init!r} is none of kaiming, gaussian, orthogonal, eva, olora, pissa, loftq, "
                "pissa_niter_N and loftq_niter_N (N: a number)"
            )
        odd = [rank for rank in (self.rank, *dict(self.rank_pattern).values()) if rank % 2]
        if self.init == "orthogonal" and odd:
            raise ValueError(f"method.rank must be even with init='orthogonal', it is {odd[0]}")
        if self.dora and self.lora_bias:
            raise ValueError("method.lora_bias=True does not go with dora=True, here as in peft; choose one of them")
        positive(lr_ratio=self.lr_ratio, eva_batches=self.eva_batches)
        for alpha in (self.alpha, *dict(self.alpha_pattern).values()):
            positive(alpha=alpha)
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"method.dtype must be 'float32', 'bfloat16' or 'float16', it is {self.dtype!r}")
        if not self.eva_rho >= 1:
            raise ValueError(f"method.eva_rho must be at least 1 (the ranks stay), it is {self.eva_rho!r}")

    def check(self, model: nnx.Module) -> None:
        for site, mask in self.chosen(model):
            check_rank(self.ranks(site, mask).max(), site)
        if self.unquantized and not formats(model):
            raise ValueError(
                f"method.init={self.init!r} makes up for what quantizing takes away, and no kernel of this model is quantized: "
                "set model.quantize, or take another init"
            )

    @property
    def data(self) -> int:
        return self.eva_batches if self.init == "eva" else 0

    @property
    def unquantized(self) -> bool:
        return self.init.startswith("loftq")

    def begin(self, model: Any, name: str, kernels: Kernels, rngs: nnx.Rngs) -> None:
        for site, adapter in adapters_named(model, name):
            if isinstance(adapter, LoraLinear) and not isinstance(adapter, LoraEmbedding):
                begin(self.init, site, adapter, kernels, rngs.params())

    def fit(self, model: Any, batches: Iterable[Mapping[str, Any]]) -> tuple["Lora", dict[str, dict[str, Any]]]:
        chosen = [(site, mask) for site, mask in self.chosen(model) if isinstance(site.module, Linear)]
        limits, ranks, explained = {}, {}, {}
        for site, mask in chosen:
            most = np.rint(self.ranks(site, mask) * self.eva_rho).astype(int)
            limits[site.path] = np.minimum(most, site.module.in_features)
        found = find_directions(model, {path: int(limit.max()) for path, limit in limits.items()}, batches)
        for site, mask in chosen:
            layers = zip(site.names, self.ranks(site, mask), limits[site.path], found[site.path].explained, strict=True)
            for hf, rank, limit, shares in layers:
                if rank:
                    ranks[hf], explained[hf] = int(rank), shares[:limit]
        new = redistribute(explained, ranks)
        start = {}
        for site, _ in chosen:
            kept = [new.get(hf, 0) for hf in site.names]
            a = np.zeros((len(kept), site.module.in_features, max(kept)), np.float32)
            for layer, rank in enumerate(kept):
                a[layer, :, :rank] = found[site.path].vectors[layer, :rank].T
            start[site.path] = {"a": a.reshape(*site.stack, *a.shape[1:])}
        return self._with_ranks(model, ranks, new), start

    def _with_ranks(self, model: Any, old: Mapping[str, int], new: Mapping[str, int]) -> "Lora":
        """The method with other ranks for some layers, none where they are 0; alpha changes as the rank does."""
        if new == old:
            return self
        ranks, alphas = {}, {}
        for site, mask in self.chosen(model):
            by_layer = zip(
                site.names, self.ranks(site, mask), by_name(site, self.alpha_pattern, self.alpha), strict=True
            )
            for hf, rank, alpha in by_layer:
                if kept := new.get(hf, int(rank)):
                    ranks[hf], alphas[hf] = kept, float(alpha * kept / rank)
        return dataclasses.replace(
            self, targets=tuple(ranks), exclude=(), layers_to_transform=(),
            rank_pattern=tuple((hf, rank) for hf, rank in ranks.items() if rank != self.rank),
            alpha_pattern=tuple((hf, alpha) for hf, alpha in alphas.items() if alpha != self.alpha),
        )  # fmt: skip

    def attach(self, model: nnx.Module, name: str, rngs: nnx.Rngs) -> None:
        super().attach(model, name, rngs)
        if self.token_indices:
            train_tokens(model, self.token_indices, [token_embedding(model)], name, key="token_adapter.", both=False)
        if self.bias != "none":
            self._train_biases(model, name)

    def chosen(self, model: nnx.Module) -> Chosen:
        chosen = super().chosen(model)
        check_table("rank_pattern", self.rank_pattern, chosen)
        check_table("alpha_pattern", self.alpha_pattern, chosen)
        return chosen

    def ranks(self, site: Site, mask: np.ndarray) -> np.ndarray:
        """Of each layer of a site, 0 in those that are left out."""
        return np.where(mask, by_name(site, self.rank_pattern, self.rank), 0)

    def adapter(self, site: Site, mask: np.ndarray, rngs: nnx.Rngs) -> LoraLinear:
        linear = isinstance(site.module, Linear)
        if not linear:
            self._check_embedding(site)
        ranks = self.ranks(site, mask)
        scales = by_name(site, self.alpha_pattern, self.alpha) / np.maximum(np.sqrt(ranks) if self.rslora else ranks, 1)
        active = np.arange(ranks.max()) < ranks[:, None]  # [layers, R]
        scale = jnp.asarray(active * scales[:, None], jnp.float32).reshape(*site.stack, -1)
        a, b = (factor.astype(self.dtype) for factor in initial(self.init, site, ranks, scales, rngs))
        inputs, outputs = site.module.axes
        kind = _kind(linear, bool(RESIDUAL.fullmatch(self.init)), self.dora)
        adapter = kind(
            tuple(int(rank) for rank in ranks),
            PeftConstant(scale, axes=site.lead("rank")),
            (PeftConstant if self.freeze_a else PeftParam)(a, axes=site.lead(inputs, "rank")),
            PeftParam(b, axes=site.lead("rank", outputs)),
            self.dropout if linear else 0.0,  # peft drops nothing of an embedding
        )
        if isinstance(adapter, DoraLinear):
            adapter.measure(site.kernel)
        if self.lora_bias:
            shift = jnp.zeros((*site.stack, site.module.out_features), self.dtype)
            adapter.shift = nnx.data(PeftParam(shift, axes=site.lead(outputs)))
        return adapter

    def _check_embedding(self, site: Site) -> None:
        refused = {
            "lora_bias": (self.lora_bias, "adds its bias to a Linear's output"),
            "freeze_a": (self.freeze_a, "would leave an embedding's A at zero"),
            "init": (RESIDUAL.fullmatch(self.init), "starts from a Linear's kernel"),
        }
        for option, (given, why) in refused.items():
            if given:
                raise ValueError(
                    f"method.{option}={getattr(self, option)!r} {why}; leave {site.names[0]} out of the targets"
                )

    def optimizer(
        self, inner: optax.GradientTransformation, leaves: Mapping[str, nnx.Variable]
    ) -> optax.GradientTransformation:
        if self.lr_ratio == 1:
            return inner

        def rate(path: str, leaf: nnx.Variable) -> str:
            axes = tuple(axis for axis in leaf.axes if axis != "layers")
            embedding = path.endswith(".b") and "vocab" in leaves.get(f"{path[:-1]}a", leaf).axes
            return "fast" if len(axes) == 1 or (axes[0] == "rank" and not embedding) else "plain"

        rates = {path: rate(path, leaf) for path, leaf in leaves.items()}
        return optax.chain(
            inner, optax.partition({"plain": optax.identity(), "fast": optax.scale(self.lr_ratio)}, rates)
        )

    def _train_biases(self, model: nnx.Module, name: str) -> None:
        targeted = {site.path: mask for site, mask in self.chosen(model)}
        there = {site.path: adapter for site, adapter in adapters_named(model, name)}
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
        twice, times = (2, math.sqrt(2) if self.rslora else 2) if RESIDUAL.fullmatch(self.init) else (1, 1)
        doubled = {  # the file of a ResidualLora holds twice the rank, with the same scale
            "r": self.rank * twice,
            "lora_alpha": self.alpha * times,
            "rank_pattern": {key: rank * twice for key, rank in self.rank_pattern},
            "alpha_pattern": {key: alpha * times for key, alpha in self.alpha_pattern},
        }
        return super().to_hf(model, name) | doubled

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Lora":
        init = config.get("init_lora_weights", True)
        if isinstance(init, str) and init.lower() not in ("gaussian", "eva", "orthogonal"):
            raise ValueError(
                f"adapter_config.json: init_lora_weights={init!r} changes the base model too and is not supported; "
                "convert the adapter to plain LoRA first (save_pretrained with path_initial_model_for_weight_conversion)"
            )
        tokens = config.get("trainable_token_indices")
        if isinstance(tokens, dict) and len(tokens) == 1:  # of one embedding, by its name
            config = config | {"trainable_token_indices": list(*tokens.values())}
        elif isinstance(tokens, dict) and tokens:
            raise ValueError(
                f"adapter_config.json: trainable_token_indices={tokens!r} of several layers is not supported"
            )
        return super().from_hf(config)


def _kind(linear: bool, residual: bool, dora: bool) -> type[LoraLinear]:
    if not linear:
        return DoraEmbedding if dora else LoraEmbedding
    if residual:
        return DoraResidual if dora else ResidualLora
    return DoraLinear if dora else LoraLinear
