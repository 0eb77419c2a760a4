"""AdaLoRA: y = x W + s (x P) E Q, with E diagonal and zero at initialization; training prunes entries of E.

Zhang et al. 2023 (arXiv:2303.10512): sections 3.1 (the form, and the penalty that keeps P and Q orthogonal), 3.2 (the
importance of a triplet: an entry of E, its column of P and its row of Q) and 3.3 (the budget of ranks over the steps). As
in peft, s = alpha / init_rank, the penalty is the mean of the norms and not the sum of their squares, and importance is
|parameter after the update * gradient|, with gradients before clipping.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, LayerMask, transposed
from peftjax.adapters.biases import WithBiases
from peftjax.adapters.joint import adapter_parts, parts
from peftjax.adapters.options import pattern, positive, positive_integer
from peftjax.adapters.ranks import RankedAdapter
from peftjax.adapters.selection import Chosen, check_rank, chosen_names
from peftjax.adapters.sites import Site, sites
from peftjax.core.errors import UserError
from peftjax.core.paths import suggest
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.methods.lora.lora import Lora
from peftjax.nn.dropout import Dropout
from peftjax.quant.matmul import matmul

LEAVES = ("p", "singular_values", "q")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLora(WithBiases):
    """Options of AdaLoRA.

    Attributes:
        init_rank (int, default 12): Initial rank of every target.
        target_rank (int, default 8): Mean rank of the targets at the end.
        alpha (float, default 8.0): The update is multiplied by alpha / init_rank.
        dropout (float, default 0.0): Dropout rate of the adapter's input.
        total_steps (int, default train.steps): Number of training steps; outside of `peftjax.train`, it must be given.
        warmup_steps (int, default 0): Steps at the beginning without pruning.
        final_steps (int, default 0): Steps at the end without pruning.
        interval (int, default 1): Steps between prunings.
        beta1 (float, default 0.85): Decay of the moving average of importance.
        beta2 (float, default 0.85): Decay of the moving average of its uncertainty.
        orthogonality (float, default 0.5): Weight of the penalty.
        rank_pattern (mapping, default none): The entries of E that an adapter from a file still has, as bools by name.
    """

    init_rank: int = 12
    target_rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    total_steps: int = 0
    warmup_steps: int = 0
    final_steps: int = 0
    interval: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5
    rank_pattern: tuple[tuple[str, tuple[bool, ...]], ...] = ()

    method: ClassVar[str] = "adalora"
    peft_type: ClassVar[str] = "ADALORA"
    hf_fields: ClassVar = WithBiases.hf_fields | {
        "init_rank": ("init_r", 12),
        "target_rank": ("target_r", 8),
        "alpha": ("lora_alpha", 8),
        "dropout": ("lora_dropout", 0.0),
        "total_steps": ("total_step", None),
        "warmup_steps": ("tinit", 0),
        "final_steps": ("tfinal", 0),
        "interval": ("deltaT", 1),
        "beta1": ("beta1", 0.85),
        "beta2": ("beta2", 0.85),
        "orthogonality": ("orth_reg_weight", 0.5),
        "rank_pattern": ("rank_pattern", None),
    }
    hf_constants: ClassVar = {"init_lora_weights": True, "fan_in_fan_out": False}
    hf_ignored: ClassVar = Lora.hf_ignored | {"r"}
    hf_unsupported: ClassVar = Lora.hf_unsupported | {
        "ensure_weight_tying", "trainable_token_indices", "use_dora",
    }  # fmt: skip
    # peft accepts LoRA's fields for the scale and the bias of an update, and does not read them.
    hf_training: ClassVar = Lora.hf_training | {"alpha_pattern": {}, "lora_bias": False, "use_rslora": False}
    traced_options: ClassVar = WithBiases.traced_options | {
        "init_rank", "target_rank", "total_steps", "warmup_steps", "final_steps", "interval", "beta1", "beta2",
    }  # fmt: skip
    training_options: ClassVar = WithBiases.training_options | {
        "target_rank", "total_steps", "warmup_steps", "final_steps", "interval", "beta1", "beta2", "orthogonality",
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self._replace(rank_pattern=pattern("rank_pattern", self.rank_pattern, _as_bools))
        positive_integer(init_rank=self.init_rank, target_rank=self.target_rank, interval=self.interval)
        positive(alpha=self.alpha)
        if self.target_rank > self.init_rank:
            raise UserError(f"method.target_rank={self.target_rank} is above method.init_rank={self.init_rank}")
        for option in ("total_steps", "warmup_steps", "final_steps"):
            if not isinstance(steps := getattr(self, option), int) or steps < 0:
                raise UserError(f"method.{option} must be an integer of at least 0, got {steps!r}")
        if self.total_steps and not self.warmup_steps < self.total_steps - self.final_steps:
            raise UserError(
                f"method.warmup_steps={self.warmup_steps} and method.final_steps={self.final_steps} leave none of "
                f"{self.total_steps} steps between them; lower them"
            )
        for option in ("beta1", "beta2"):
            if not 0 < getattr(self, option) < 1:
                raise UserError(f"method.{option} must be above 0 and below 1, got {getattr(self, option)}")
        if not 0 <= self.orthogonality < np.inf:
            raise UserError(f"method.orthogonality must be a finite number of at least 0, got {self.orthogonality}")
        if wrong := [name for name, entries in self.rank_pattern if len(entries) != self.init_rank]:
            raise UserError(f"method.rank_pattern: {wrong[0]!r} needs {self.init_rank} entries (method.init_rank)")

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        targeted, initial = (config.get(field) or default for field, default in (("target_r", 8), ("init_r", 12)))
        alpha = config.get("lora_alpha")
        if isinstance(alpha, int | float) and alpha <= 0:
            alpha = initial  # as in peft
        targeted = min(targeted, initial)  # peft starts from fewer ranks, too
        return super().from_hf(config | {"target_r": targeted, "lora_alpha": alpha})

    def in_steps(self, steps: int) -> Self:
        return self if self.total_steps else dataclasses.replace(self, total_steps=steps)

    def check(self, model: nnx.Module) -> None:
        if not self.total_steps:
            raise UserError("method.total_steps=0: set it to the number of steps of the training (train.steps)")
        for site, _ in self.chosen(model):
            check_rank(self.init_rank, site, "init_rank")

    def chosen(self, model: nnx.Module) -> Chosen:
        chosen = super().chosen(model)
        known = {f"{name}.lora_E" for name in chosen_names(chosen)}
        if unknown := [name for name, _ in self.rank_pattern if name not in known]:
            raise UserError(f"method.rank_pattern: {unknown[0]!r} is not a target.{suggest(unknown[0], known)}")
        return chosen

    def adapter(self, site: Site, mask: np.ndarray, rngs: nnx.Rngs) -> "AdaLoraLinear":
        named = zip(site.names, mask, strict=True)
        ranks = tuple(sum(self._entries(name)) if used else None for name, used in named)
        size, owner = max(1, *(rank or 0 for rank in ranks)), site.module
        active = np.arange(size) < np.array([rank or 0 for rank in ranks])[:, None]  # [layers, R]
        scale = (active * self.alpha / (self.init_rank + 1e-5)).reshape(*site.stack, size)
        shapes = (*site.stack, owner.in_features, size), (*site.stack, size, owner.out_features)
        p, q = (0.02 * jax.random.normal(rngs.params(), shape, jnp.float32) for shape in shapes)
        active = active.reshape(scale.shape)
        return AdaLoraLinear(
            PeftParam(p * active[..., None, :], axes=site.lead(owner.axes[0], "rank")),
            PeftParam(jnp.zeros(scale.shape, jnp.float32), axes=site.lead("rank")),
            PeftParam(q * active[..., None], axes=site.lead("rank", owner.axes[1])),
            PeftConstant(jnp.asarray(scale, jnp.float32), axes=site.lead("rank")),
            ranks,
            Dropout(self.dropout, site.stack),
        )

    def to_hf(self, model: nnx.Module, name: str) -> dict[str, Any]:
        kept = {}
        for site, adapter in adapter_parts(model, name):
            if isinstance(adapter, AdaLoraLinear):
                for hf, rank, entries in zip(site.names, adapter.ranks, adapter.kept(), strict=True):
                    if rank is not None:
                        left = iter(entries.tolist())
                        kept[f"{hf}.lora_E"] = [entry and next(left) for entry in self._entries(hf)]
        complete = all(all(entries) for entries in kept.values())
        return super().to_hf(model, name) | {"rank_pattern": None if complete else kept}

    def optimizer(
        self, inner: optax.GradientTransformation, leaves: Mapping[str, nnx.Variable]
    ) -> optax.GradientTransformation:
        """`inner`, followed by pruning the entries of E that exceed the budget."""
        suffix = ".singular_values"
        adapters = [path.removesuffix(suffix) for path in leaves if path.endswith(suffix)]
        active = {path: _existing(leaves[f"{path}.scale"].get_value()) for path in adapters}
        return allocate(inner, self, active)

    def penalty(self, model: nnx.Module) -> jax.Array | None:
        """orthogonality * the mean of ||P^T P - I|| and ||Q Q^T - I|| over all targets."""
        if self.orthogonality == 0:
            return None
        slots = [site.module.adapters for site in sites(model)]
        found = [part for slot in slots for adapter in slot.active_adapters() for part in parts(adapter)]
        found = [adapter for adapter in found if isinstance(adapter, AdaLoraLinear)]
        count = sum(adapter.layers.count for adapter in found)
        return self.orthogonality * sum(adapter.skewness() for adapter in found) / (2 * count)

    def _entries(self, name: str) -> tuple[bool, ...]:
        return dict(self.rank_pattern).get(f"{name}.lora_E", (True,) * self.init_rank)


def _as_bools(entries: Any) -> tuple[bool, ...]:
    """The entries of a layer in rank_pattern; none if they are not a sequence."""
    return tuple(map(bool, entries)) if isinstance(entries, Iterable) else ()


def _existing(scale: jax.Array | jax.ShapeDtypeStruct) -> np.ndarray:
    """The entries of E that exist, bool [*stack, R]; all of them in a model of shapes, which has no values."""
    return np.ones(scale.shape, bool) if isinstance(scale, jax.ShapeDtypeStruct) else np.asarray(scale) > 0


class AdaLoraLinear(RankedAdapter):
    """x W + (dropout(x) P * E * scale) Q.

    Attributes:
        p: [*stack, in, R].
        singular_values: E, [*stack, R].
        q: [*stack, R, out].
        scale: s, [*stack, R]; 0 beyond a layer's own rank.
        ranks: The rank of each layer, None in a layer without the adapter.
    """

    names: ClassVar = {
        "lora_A": transposed("p"),
        "lora_B": transposed("q"),
        "lora_E": HfLeaf("singular_values", shape=(-1, 1)),
    }

    def __init__(
        self,
        p: nnx.Variable,
        singular_values: nnx.Variable,
        q: nnx.Variable,
        scale: nnx.Variable,
        ranks: tuple[int | None, ...],
        dropout: Dropout,
    ) -> None:
        self.p, self.singular_values, self.q, self.scale = p, singular_values, q, scale
        self.ranks, self.dropout = ranks, dropout
        self.layers = LayerMask(rank is not None for rank in ranks)

    def delta(self) -> jax.Array:
        """s P E Q."""
        return jnp.matmul(self.p.get_value() * self._values()[None], self.q.get_value())

    def update(self, x: jax.Array) -> jax.Array:
        low = matmul(self.dropout(x), self.p.get_value())  # [..., R]
        low = low * jnp.broadcast_to(self._values().astype(low.dtype), low.shape)
        return matmul(low, self.q.get_value())

    def _values(self) -> jax.Array:
        return self.singular_values.get_value() * self.scale.get_value()

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        rank = self.ranks[layer or 0]
        if rank is None:  # 0 is the rank of a layer whose entries are all pruned, which the file still has
            return {}
        return {key: self.unpadded(leaf, rank) for key, leaf in self.names.items()}

    def kept(self) -> np.ndarray:
        """The entries of E that are not pruned, bool [layers, R]; all of them if E is zero, as at initialization."""
        values, scale = np.asarray(self.singular_values.get_value()), np.asarray(self.scale.get_value())
        kept = (scale > 0) & ((values != 0) | (not values.any()))
        return kept.reshape(len(self.ranks), -1)

    def exported(self) -> "AdaLoraLinear":
        """The adapter without its pruned entries; itself if there are none, or while it is traced."""
        if isinstance(self.singular_values.get_value(), jax.core.Tracer):
            return self
        kept = self.kept()
        ranks = tuple(None if rank is None else int(n) for rank, n in zip(self.ranks, kept.sum(axis=1), strict=True))
        if ranks == self.ranks:
            return self
        order = jnp.asarray(np.argsort(~kept, axis=1, kind="stable").reshape(self.singular_values.shape))

        def kept_first(leaf: nnx.Variable, order: jax.Array, axis: int) -> PeftParam:
            return PeftParam(jnp.take_along_axis(leaf.get_value(), order, axis), axes=leaf.axes)

        p, q = kept_first(self.p, order[..., None, :], -1), kept_first(self.q, order[..., None], -2)
        values = kept_first(self.singular_values, order, -1)
        return AdaLoraLinear(p, values, q, self.scale, ranks, self.dropout)

    def skewness(self) -> jax.Array:
        """The sum over layers of ||P^T P - I|| and ||Q Q^T - I||, float32 []."""
        p, q, active = self.p.get_value(), self.q.get_value(), self.scale.get_value() > 0
        both = active[..., :, None] & active[..., None, :]
        total = jnp.zeros((), jnp.float32)
        for gram in (jnp.einsum("...ir,...is->...rs", p, p), jnp.einsum("...ro,...so->...rs", q, q)):
            off = jnp.where(both, gram - jnp.broadcast_to(jnp.eye(gram.shape[-1]), gram.shape), 0.0)
            squares = jnp.square(off).sum(axis=(-2, -1))
            total += jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0).sum()
        return total


class Allocation(NamedTuple):
    """State of the optimizer.

    Attributes:
        updates: Number of updates so far, int32 [].
        sensitivity: Moving averages of importance, in the shapes of the parameters.
        uncertainty: Moving averages of their deviation, likewise.
        inner: State of the inner optimizer.
    """

    updates: jax.Array
    sensitivity: dict[str, jax.Array]
    uncertainty: dict[str, jax.Array]
    inner: Any


def allocate(
    inner: optax.GradientTransformation, method: AdaLora, active: dict[str, np.ndarray]
) -> optax.GradientTransformation:
    """`inner`, followed by setting the least important entries of E to zero.

    Args:
        inner: The optimizer.
        method: The options.
        active: The entries of E that exist, bool [*stack, R], by path of the adapter.
    """
    paths = [f"{path}.{leaf}" for path in active for leaf in LEAVES]
    start, end = (
        method.warmup_steps,
        method.total_steps - method.final_steps,
    )  # the steps before pruning, and of the last
    initial = sum(int(there.sum()) for there in active.values())
    targets = sum(int(there.any(axis=-1).sum()) for there in active.values())
    target = min(initial, method.target_rank * targets)

    def init(params: Any) -> Allocation:
        zeros = {path: jnp.zeros(params[path].shape, jnp.float32) for path in paths}
        return Allocation(jnp.zeros((), jnp.int32), zeros, dict(zeros), inner.init(params))

    def update(gradients: Any, state: Allocation, params: Any = None, **extra: Any) -> tuple[Any, Allocation]:
        updates, inner_state = optax.with_extra_args_support(inner).update(gradients, state.inner, params, **extra)
        step = state.updates + 1
        sensitivity, uncertainty = {}, {}
        for path in paths:
            importance = jnp.abs((params[path] + updates[path]) * gradients[path])
            smooth = method.beta1 * state.sensitivity[path] + (1 - method.beta1) * importance
            spread = method.beta2 * state.uncertainty[path] + (1 - method.beta2) * jnp.abs(importance - smooth)
            sensitivity[path] = jnp.where(step < end, smooth, state.sensitivity[path])
            uncertainty[path] = jnp.where(step < end, spread, state.uncertainty[path])
        scores = {}  # the importance of every triplet, [*stack, R], infinite where it does not exist
        for path, there in active.items():
            p, values, q = (sensitivity[f"{path}.{leaf}"] * uncertainty[f"{path}.{leaf}"] for leaf in LEAVES)
            scores[path] = jnp.where(there, values + p.mean(axis=-2) + q.mean(axis=-1), jnp.inf)

        left = 1 - (step - start) / (end - start)
        removed = initial - jnp.floor((initial - target) * left**3 + target).astype(jnp.int32)
        due = ((step > start) & (step < end) & (step % method.interval == 0)) | (step == end)
        ordered = jnp.sort(jnp.concatenate([score.ravel() for score in scores.values()]))
        threshold = jnp.where(due & (removed > 0), ordered[jnp.maximum(removed - 1, 0)], -jnp.inf)
        for path, score in scores.items():
            entries = f"{path}.singular_values"
            drop = jnp.where(step > end, params[entries] == 0, score <= threshold)
            updates = updates | {entries: jnp.where(drop, -params[entries], updates[entries])}
        return updates, Allocation(step, sensitivity, uncertainty, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
