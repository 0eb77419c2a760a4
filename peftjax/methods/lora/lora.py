"""LoRA: y = x W + s (x A) B, with W frozen, A random and B zero at initialization.

Hu et al. 2021 (arXiv:2106.09685), section 4.1, eq. 3, with s = alpha / r; rank-stabilized LoRA has s = alpha / sqrt(r)
(Kalajdzievski 2023, arXiv:2312.03732, eq. 3). docs/lora.md has the derivations. Two variants change no equation:

- LoRA+: the learning rate of B is `lr_ratio` times that of A (Hayou et al. 2024, arXiv:2402.12354, section 4).
- LoRA-FA: A keeps its initial value (Zhang et al. 2023, arXiv:2308.03303). The paper's second version, and peft's
  optimizer for it, also multiply B's gradient by (A^T A)^-1 / s^2; here it is B's own gradient.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from peftjax.adapters.biases import biased_sites, train_biases
from peftjax.adapters.joint import adapter_parts
from peftjax.adapters.method import Kernels
from peftjax.adapters.options import one_of, pattern, positive, positive_integer
from peftjax.adapters.provenance import formats
from peftjax.adapters.ranks import Ranked, within
from peftjax.adapters.selection import Chosen, by_expert, chosen_names, last_names
from peftjax.adapters.sites import Site, tied_pair
from peftjax.adapters.targeted import Targeted
from peftjax.core.errors import UserError
from peftjax.core.paths import last_parts, matches
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.methods.lora import eva, loftq
from peftjax.methods.lora.adapter import LoraEmbedding, LoraLinear
from peftjax.methods.lora.dora import DoraEmbedding, DoraLinear, DoraResidual
from peftjax.methods.lora.experts import DoraExperts, LoraExperts, SwappedLoraExperts
from peftjax.methods.lora.init import INITS, RESIDUAL, initial
from peftjax.methods.lora.patches import DoraPatches, LoraPatches
from peftjax.methods.lora.residual import ResidualLora
from peftjax.methods.lora.tied import on_embedding, tie
from peftjax.methods.trainable_tokens import token_ids, tokens_by_site, train_tokens
from peftjax.models.base import Model
from peftjax.nn.embedding import Embedding
from peftjax.nn.experts import ExpertLinear, UntransposedExpertLinear
from peftjax.nn.linear import Linear
from peftjax.nn.patches import PatchEmbedding

TIED_IN_PEFT = ("embed_tokens", "lm_head")  # the names of modules that peft's ensure_weight_tying applies to


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora(Ranked):
    """Options of LoRA. Targets can be Linear and Embedding layers, experts, and the patch embedding of an image model.

    Attributes:
        dropout (float, default 0.0): Dropout rate of the adapter's input.
        rslora (bool, default False): Scale the update by alpha / sqrt(rank).
        bias (str, default "none"): Biases to train: "none", "lora_only" (of the target layers) or "all" (of the
            whole model).
        lora_bias (bool, default False): Train a bias of B, which is scaled as B is.
        token_indices (tuple of int, default none): Token ids whose embeddings are trained too, such as new tokens (see
            `TrainableTokens`), or a dict from layer names to ids: {"lm_head": (3, 7)}.
        ensure_weight_tying (bool, default False): If the head is tied to the embedding and either is trained or adapted,
            train or adapt the embedding and let the head follow it.
        dora (bool, default False): Train magnitude and direction separately (DoRA).
        init (str, default "kaiming"): Initial A and B: "kaiming", "gaussian", "orthogonal", "olora", "pissa",
            "pissa_niter_N" (N iterations), "eva", "loftq" or "loftq_niter_N". "eva" takes batches of data
            (`attach(..., batches=)`; the train command uses its first `eva_batches`). "loftq" takes the kernels before
            quantization (`attach(..., kernels=)`; the train command reads them from the base).
        eva_rho (float, default 2.0): Largest factor by which "eva" may raise the rank of a layer; 1 keeps all ranks.
        eva_batches (int, default 16): Number of batches for "eva".
        lr_ratio (float, default 1.0): Ratio of B's learning rate to A's (LoRA+). As in peft, it also applies to vectors
            (biases, magnitudes), and not to the B of embeddings, where A and B swap roles.
        freeze_a (bool, default False): Train only B (LoRA-FA).
        dtype (str, default "float32"): Dtype of A and B: "float32", "bfloat16" or "float16". The computation runs in
            the dtype of the activations.
    """

    dropout: float = 0.0
    rslora: bool = False
    bias: str = "none"
    lora_bias: bool = False
    token_indices: tuple[int, ...] | tuple[tuple[str, tuple[int, ...]], ...] = ()
    ensure_weight_tying: bool = False
    dora: bool = False
    init: str = "kaiming"
    eva_rho: float = 2.0
    eva_batches: int = 16
    lr_ratio: float = 1.0
    freeze_a: bool = False
    dtype: str = "float32"

    method: ClassVar[str] = "lora"
    peft_type: ClassVar[str] = "LORA"
    fits: ClassVar = (Linear, Embedding, PatchEmbedding, ExpertLinear)
    adapts_parameters: ClassVar = True
    hf_fields: ClassVar = Ranked.hf_fields | {
        "alpha": ("lora_alpha", 8),
        "dropout": ("lora_dropout", 0.0),
        "rslora": ("use_rslora", False),
        "bias": ("bias", "none"),
        "lora_bias": ("lora_bias", False),
        "token_indices": ("trainable_token_indices", None),
        "ensure_weight_tying": ("ensure_weight_tying", False),
        "dora": ("use_dora", False),
    }
    hf_constants: ClassVar = {"init_lora_weights": True, "fan_in_fan_out": False}
    hf_ignored: ClassVar = Ranked.hf_ignored | {
        "runtime_config", "megatron_core", "qalora_group_size", "target_parameters", "use_bdlora",
    }  # fmt: skip
    hf_unsupported: ClassVar = frozenset({
        "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config",
    })  # fmt: skip
    hf_training: ClassVar = {
        "init_lora_weights": True, "loftq_config": {}, "eva_config": None, "corda_config": None, "lora_ga_config": None,
        "monteclora_config": None, "use_qalora": False, "velora_config": None,
    }  # fmt: skip
    traced_options: ClassVar = Ranked.traced_options | {"init", "rslora", "lr_ratio"}
    training_options: ClassVar = Ranked.training_options | {"eva_rho", "eva_batches", "lr_ratio", "freeze_a", "dtype"}

    def __post_init__(self) -> None:
        super().__post_init__()
        tokens: Any = self.token_indices
        by_layer = isinstance(tokens, Mapping) or (
            isinstance(tokens, Sequence) and any(isinstance(item, tuple | list) for item in tokens)
        )
        self._replace(token_indices=pattern("token_indices", tokens, token_ids) if by_layer else token_ids(tokens))
        one_of(("none", "all", "lora_only"), bias=self.bias)
        one_of(("float32", "bfloat16", "float16"), dtype=self.dtype)
        positive(lr_ratio=self.lr_ratio)
        positive_integer(eva_batches=self.eva_batches)
        if not INITS.fullmatch(self.init):
            raise UserError(
                f"method.init={self.init!r} is not one of kaiming, gaussian, orthogonal, eva, olora, pissa, loftq, "
                "pissa_niter_N and loftq_niter_N (N: a number)"
            )
        if self.init == "orthogonal" and (odd := [rank for rank in self.all_ranks if rank % 2]):
            raise UserError(f"method.rank must be even with init='orthogonal', got {odd[0]}")
        if self.dora and self.lora_bias:
            raise UserError("method.lora_bias=True cannot be combined with dora=True, as in peft; choose one of them")
        if not self.eva_rho >= 1:
            raise UserError(f"method.eva_rho must be at least 1, which keeps the ranks, got {self.eva_rho!r}")

    def check(self, model: nnx.Module) -> None:
        super().check(model)
        if self.unquantized and not formats(model):
            raise UserError(
                f"method.init={self.init!r} compensates for quantization, and no kernel of this model is quantized: set "
                "model.quantize, or choose another init"
            )

    def check_file(self, model: nnx.Module) -> None:
        if not RESIDUAL.fullmatch(self.init):
            return
        field = f"init_lora_weights={self.init!r}"
        try:
            self.check(model)
        except UserError as error:
            raise UserError(f"{field}: {error}") from error
        head = pair[1] if (pair := tied_pair(model)) else None
        if head and any(site.path == head.path for site, _ in self.chosen(model)):
            raise UserError(
                f"{field} has {head.names[0]} as a target, which is tied to the embedding: peft subtracts the initial update from "
                "both, which is not supported; train the adapter without this target, or with another initialization"
            )
        if kinds := set(formats(model).values()):
            raise UserError(
                f"{field} subtracts the initial update from the base, and the update cannot be recomputed from "
                f"{', '.join(sorted(kinds))} kernels; load the base without quantize=, call load_adapter and save_adapter, and "
                "load that plain LoRA on the quantized base"
            )

    # --- Ranks ---

    def ranks(self, site: Site, mask: np.ndarray) -> np.ndarray:
        """The rank of each layer of a site, int [layers], or the largest of its experts; 0 in a layer that is left out."""
        experts = isinstance(site.module, ExpertLinear)
        return self.expert_ranks(site, mask).max(axis=1) if experts else super().ranks(site, mask)

    def expert_ranks(self, site: Site, mask: np.ndarray) -> np.ndarray:
        """The rank of every expert of each layer of a site, int [layers, E]; 0 in a layer that is left out."""
        own = by_expert("rank_pattern", self.rank_pattern, site, super().ranks(site, mask))
        return np.where(mask[:, None], own, 0)

    def expert_alphas(self, site: Site) -> np.ndarray:
        """The alpha of every expert of each layer of a site, [layers, E]."""
        return by_expert("alpha_pattern", self.alpha_pattern, site, self.alphas(site))

    # --- The adapters ---

    def saved(self, model: nnx.Module) -> Chosen:
        return on_embedding(super().saved(model), self._pair(model))

    def chosen(self, model: nnx.Module) -> Chosen:
        return on_embedding(super().chosen(model), self._pair(model))

    def _pair(self, model: nnx.Module) -> tuple[Site, Site] | None:
        return tied_pair(model) if self.ensure_weight_tying else None

    @property
    def adapts_tokens(self) -> bool:
        return self.ensure_weight_tying or bool(self.token_indices)

    def attach(self, model: nnx.Module, name: str, rngs: nnx.Rngs) -> None:
        super().attach(model, name, rngs)
        if pair := self._pair(model):
            tie(pair, name, self.dropout)
        for site, tokens, tied in tokens_by_site(model, self.token_indices) if self.token_indices else ():
            train_tokens(model, tokens, [site], name, of_lora=True, tie=tied)
        train_biases(model, name, self.bias, self.chosen(model))

    def adapter(self, site: Site, mask: np.ndarray, rngs: nnx.Rngs) -> LoraLinear:
        if not isinstance(site.module, Linear):
            self._check_other(site)
        (inputs, outputs), experts = site.module.axes, isinstance(site.module, ExpertLinear)
        ranks = self.expert_ranks(site, mask) if experts else self.ranks(site, mask)
        alphas = self.expert_alphas(site) if experts else self.alphas(site)
        scales = alphas / np.maximum(np.sqrt(ranks) if self.rslora else ranks, 1)
        a, b = (factor.astype(self.dtype) for factor in initial(self.init, site, ranks, scales, rngs))
        lead, stack = (("expert",), b.shape[:-2]) if experts else ((), site.stack)
        scale = within(ranks, stack) * scales.astype(np.float32).reshape(*stack, 1)
        a_axes = site.lead(*lead, inputs, "rank")
        if isinstance(site.module, PatchEmbedding):
            a, a_axes = a.reshape(*site.module.kernel.shape[:-1], -1), (None, None, None, "rank")
        adapter = self._kind(site.module)(
            tuple(int(rank) for rank in (ranks.max(axis=1) if experts else ranks)),
            PeftConstant(jnp.asarray(scale), axes=site.lead(*lead, "rank")),
            (PeftConstant if self.freeze_a else PeftParam)(a, axes=a_axes),
            PeftParam(b, axes=site.lead(*lead, "rank", outputs)),
            0.0 if isinstance(site.module, Embedding) else self.dropout,  # peft has no dropout for embeddings
        )
        if isinstance(adapter, DoraLinear):
            adapter.measure(site.kernel)
        if self.lora_bias:
            shift = jnp.zeros((*site.stack, site.module.out_features), self.dtype)
            adapter.shift = nnx.data(PeftParam(shift, axes=site.lead(outputs)))
        return adapter

    def _kind(self, layer: nnx.Module) -> type[LoraLinear]:
        if isinstance(layer, ExpertLinear):
            swapped = isinstance(layer, UntransposedExpertLinear)
            return SwappedLoraExperts if swapped else DoraExperts if self.dora else LoraExperts
        if isinstance(layer, Embedding):
            return DoraEmbedding if self.dora else LoraEmbedding
        if isinstance(layer, PatchEmbedding):
            return DoraPatches if self.dora else LoraPatches
        if RESIDUAL.fullmatch(self.init):
            return DoraResidual if self.dora else ResidualLora
        return DoraLinear if self.dora else LoraLinear

    def _check_other(self, site: Site) -> None:
        """Refuse the options that experts and embeddings of tokens or patches do not support."""
        of_experts = isinstance(site.module, ExpertLinear)
        of_tokens = isinstance(site.module, Embedding)
        refused = {
            "lora_bias": (self.lora_bias, "adds its bias to a Linear's output"),
            "freeze_a": (self.freeze_a and of_tokens, "would train nothing in an embedding, whose A starts at zero"),
            "dora": (
                self.dora and of_experts and not site.single_experts,
                "is not supported for experts that are always one parameter: in peft, only modules have DoRA",
            ),
            "init": (
                self.init not in ("kaiming", "gaussian") if of_experts else RESIDUAL.fullmatch(self.init),
                "is not supported for experts" if of_experts else "starts from a Linear's kernel",
            ),
        }
        for option, (given, why) in refused.items():
            if given:
                raise UserError(
                    f"method.{option}={getattr(self, option)!r} {why}; leave {site.names[0]} out of the targets"
                )

    # --- Initialization from data and from unquantized kernels ---

    @property
    def data(self) -> int:
        return self.eva_batches if self.init == "eva" else 0

    def fit(self, model: nnx.Module, batches: Iterable[Mapping[str, Any]]) -> tuple[Self, dict[str, dict[str, Any]]]:
        chosen = [(site, mask) for site, mask in self.chosen(model) if isinstance(site.module, Linear)]
        ranks = [(site, self.ranks(site, mask)) for site, mask in chosen]
        new, start = eva.initialize(model, ranks, self.eva_rho, batches)
        return self._with_ranks(model, new), start

    def _with_ranks(self, model: nnx.Module, new: Mapping[str, int]) -> Self:
        """The method with new ranks for some layers, none where they are 0; alpha changes in proportion."""
        old, alphas = {}, {}
        for site, mask in self.chosen(model):
            for hf, rank, alpha in zip(site.names, self.ranks(site, mask), self.alphas(site), strict=True):
                if rank:
                    old[hf], alphas[hf] = int(rank), float(alpha * new.get(hf, int(rank)) / rank)
        if old == (ranks := old | dict(new)):
            return self
        kept = {hf: rank for hf, rank in ranks.items() if rank}
        return dataclasses.replace(
            self, targets=tuple(kept), exclude=(), layers_to_transform=(),
            rank_pattern=tuple((hf, rank) for hf, rank in kept.items() if rank != self.rank),
            alpha_pattern=tuple((hf, alphas[hf]) for hf in kept if alphas[hf] != self.alpha),
        )  # fmt: skip

    @property
    def unquantized(self) -> bool:
        return self.init.startswith("loftq")

    def begin(self, model: nnx.Module, name: str, kernels: Kernels, rngs: nnx.Rngs) -> None:
        for site, adapter in adapter_parts(model, name):
            if isinstance(site.module, Linear) and isinstance(adapter, LoraLinear):
                loftq.begin(self.init, site, adapter, kernels, rngs.params())

    # --- LoRA+ ---

    def optimizer(
        self, inner: optax.GradientTransformation, leaves: Mapping[str, nnx.Variable]
    ) -> optax.GradientTransformation:
        if self.lr_ratio == 1:
            return inner

        def is_fast(path: str, leaf: nnx.Variable) -> bool:
            axes = tuple(axis for axis in leaf.axes if axis not in ("layers", "expert"))
            embedding = path.endswith(".b") and "vocab" in leaves.get(f"{path[:-1]}a", leaf).axes
            return len(axes) == 1 or (axes[:1] == ("rank",) and not embedding)

        fast = {path for path, leaf in leaves.items() if is_fast(path, leaf)}

        def rates(tree: Mapping[str, Any]) -> dict[str, str]:
            return {path: "fast" if path in fast else "plain" for path in tree}

        scale = optax.partition({"plain": optax.identity(), "fast": optax.scale(self.lr_ratio)}, rates)
        return optax.chain(inner, scale)

    # --- Hugging Face's config ---

    def to_hf(self, model: nnx.Module, name: str) -> dict[str, Any]:
        twice, times = (2, math.sqrt(2) if self.rslora else 2) if RESIDUAL.fullmatch(self.init) else (1, 1)
        doubled = {  # the file of a ResidualLora has twice the rank and the same scale
            "r": self.rank * twice,
            "lora_alpha": self.alpha * times,
            "rank_pattern": {key: rank * twice for key, rank in self.rank_pattern},
            "alpha_pattern": {key: alpha * times for key, alpha in self.alpha_pattern},
        }
        return self._with_tied(super().to_hf(model, name) | doubled | self._expert_fields(model), model)

    def _with_tied(self, config: dict[str, Any], model: nnx.Module) -> dict[str, Any]:
        """The fields with the name of a tied head, if the embedding has none of the names by which peft knows that it is tied."""
        if (pair := self._pair(model)) is None or (isinstance(model, Model) and len(model.hf_tied) > 1):
            return config  # a tied head is a language model's; T5 has more modules of the same table, which peft cannot tie
        embed, head = pair
        for field, chosen in (("modules_to_save", self.saved(model)), ("target_modules", self.chosen(model))):
            if any(site.path == embed.path for site, _ in chosen):
                entries = config[field]
                if isinstance(entries, str):
                    known = any(matches(name, entries) for name in TIED_IN_PEFT)
                    return config if known else config | {field: f"(?:{entries})|{re.escape(head.names[0])}"}
                known = any(entry.rpartition(".")[2] in TIED_IN_PEFT for entry in entries)
                return config if known else config | {field: [*entries, head.names[0]]}
        return config

    def _expert_fields(self, model: nnx.Module) -> dict[str, Any]:
        """The fields that differ if experts or routers are adapted. peft treats these as parameters, which have no dropout."""
        modules: list[str] = []
        parameters: list[str] = []
        for site, mask in self.chosen(model):
            named = chosen_names([(site, mask)])
            if isinstance(site.module, ExpertLinear) or site.path.endswith(".router"):
                suffix = "" if isinstance(site.module, ExpertLinear) else ".weight"
                short = last_parts(named[0], 2)
                parameters += [f"{name}{suffix}" for name in ([short] if mask.all() else named)]
            else:
                modules += named
        if not parameters:
            return {}
        if self.targets == self.every and not (self.exclude or self.layers_to_transform):
            modules = last_names(modules)
        return {"target_modules": modules, "target_parameters": sorted(parameters), "lora_dropout": 0.0}

    def without_effect(self, model: nnx.Module, has_tensors: Callable[[str], bool]) -> dict[str, Any]:
        chosen = Targeted.chosen(self, model)  # with the head itself, where it is tied
        found: dict[str, Any] = {}
        if self.bias != "none" and not biased_sites(model, self.bias, chosen):
            found["bias"] = "none"
        if pair := self._pair(model):
            embed, head = pair
            adapted = {site.path for site, _ in (*chosen, *Targeted.saved(self, model))}
            if embed.path in adapted and not has_tensors(head.names[0]):  # peft ties only modules of two names
                found["ensure_weight_tying"] = False
        return found

    def weight_update(self, site: Site, tensors: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """s B A."""
        a, b = tensors.get("lora_A.weight"), tensors.get("lora_B.weight")
        if a is None or b is None or self.dora or self.lora_bias:
            return None
        scale = float(self.alphas(site)[0]) / (len(a) ** 0.5 if self.rslora else len(a))
        update: np.ndarray = scale * (b.astype(np.float32) @ a.astype(np.float32))
        return update

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        init = config.get("init_lora_weights", True)
        if isinstance(init, str) and init.lower() in ("pissa", "olora"):
            warnings.warn(
                f"adapter_config.json: init_lora_weights={init!r} subtracts the initial update from the base, which is "
                "recomputed in float32 from this model's kernels, as in peft; save_adapter writes a plain LoRA",
                stacklevel=2,
            )
            return dataclasses.replace(cls.from_hf(config | {"init_lora_weights": True}), init=init.lower())
        if isinstance(init, str) and RESIDUAL.fullmatch(init.lower()):
            raise UserError(
                f"adapter_config.json: init_lora_weights={init!r} is not supported: it subtracts an "
                "initial update from the base, and this update's randomized SVD differs every time peft computes it; convert the "
                "adapter to plain LoRA where it was trained (save_pretrained with path_initial_model_for_weight_conversion)"
            )
        if init == "lora_ga":
            warnings.warn(
                "adapter_config.json: init_lora_weights='lora_ga' subtracted an initial update from the base in training. As in peft, "
                "the adapter is applied to this model as it is, so load it into the changed base",
                stacklevel=2,
            )
            return cls.from_hf(config | {"init_lora_weights": True, "lora_ga_config": None})
        if isinstance(init, str) and init.lower() not in ("gaussian", "eva", "orthogonal", "mica"):
            raise UserError(
                f"adapter_config.json: init_lora_weights={init!r} changes the base model in a way that cannot be recomputed "
                "and is not supported; convert the adapter to plain LoRA first (save_pretrained with "
                "path_initial_model_for_weight_conversion)"
            )
        return super().from_hf(_with_parameters(config))


def _with_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """The fields with target_parameters among target_modules: experts, and the weights of routers."""
    if not (parameters := config.get("target_parameters")):
        return config
    names = parameter_modules(parameters)
    modules = config.get("target_modules") or []
    if not isinstance(modules, str):
        return config | {"target_modules": [*modules, *names]}
    ends = "|".join(re.escape(name) for name in names)
    return config | {"target_modules": rf"(?:{modules})|(?:.*\.)?(?:{ends})"}


def parameter_modules(parameters: Iterable[str]) -> tuple[str, ...]:
    """The names by which targets select the layers of target_parameters: experts, and routers by the names of their weights."""
    return tuple(entry.removesuffix(".weight") if "." in entry else f"experts.{entry}" for entry in parameters)
