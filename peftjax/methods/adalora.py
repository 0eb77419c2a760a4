"""AdaLoRA: y = x W + s (x P) E Q, with E diagonal and zero at the start; training keeps its most important entries.

Zhang et al. 2023 (arXiv:2303.10512): sections 3.1 (the form, and the penalty that keeps P and Q orthogonal), 3.2 (the
importance of a triplet of an entry, its column of P and its row of Q) and 3.3 (the budget of ranks over the steps). As peft
has it, s = alpha / init_rank, the penalty is the mean of the norms themselves and not the sum of their squares, and what
is ranked is |parameter after the update * gradient|. Gradients are those before clipping.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from peftjax.adapters.adapter import DeltaAdapter, HfLeaf, transposed
from peftjax.adapters.method import positive
from peftjax.adapters.sites import Chosen, Site, adapters_named, check_rank, sites
from peftjax.adapters.targeted import Targeted, chosen_names
from peftjax.core.paths import suggest
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.methods.lora.lora import Lora
from peftjax.nn.dropout import Dropout
from peftjax.quant.matmul import matmul


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLora(Targeted):
    """Options of AdaLoRA, beside those of `Targeted`.

    init_rank: of every target at first; target_rank: their mean in the end. alpha, dropout: as in LoRA.
    total_steps: of the whole training, must be given. Entries are removed after every `interval` updates, between update
    warmup_steps and final_steps before the end. beta1, beta2: of the moving averages of importance and its uncertainty.
    orthogonality: the weight of the penalty. rank_pattern: which entries of E an adapter that was read still has.
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
    hf_fields: ClassVar = Targeted.hf_fields | {
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
    hf_constants: ClassVar = {"bias": "none", "init_lora_weights": True, "fan_in_fan_out": False}
    hf_ignored: ClassVar = Lora.hf_ignored | {"r"}
    hf_training: ClassVar = Lora.hf_training

    def __post_init__(self) -> None:
        super().__post_init__()
        items = self.rank_pattern.items() if isinstance(self.rank_pattern, Mapping) else self.rank_pattern
        pattern = tuple((str(name), tuple(bool(kept) for kept in entries)) for name, entries in items)
        object.__setattr__(self, "rank_pattern", pattern)
        positive(init_rank=self.init_rank, target_rank=self.target_rank, alpha=self.alpha, interval=self.interval)
        if self.target_rank > self.init_rank:
            raise ValueError(f"method.target_rank={self.target_rank} is above method.init_rank={self.init_rank}")
        if self.total_steps < 1:
            raise ValueError(f"method.total_steps={self.total_steps}: set it to the number of steps, as train.steps")
        if not 0 <= self.warmup_steps < self.total_steps - self.final_steps <= self.total_steps:
            raise ValueError(
                f"method.warmup_steps={self.warmup_steps} and method.final_steps={self.final_steps} leave none of "
                f"{self.total_steps} steps between them; lower them"
            )
        for option in ("beta1", "beta2"):
            if not 0 < getattr(self, option) < 1:
                raise ValueError(f"method.{option} must be above 0 and below 1, it is {getattr(self, option)}")
        if self.orthogonality < 0:
            raise ValueError(f"method.orthogonality must not be below 0, it is {self.orthogonality}")
        if wrong := [name for name, entries in pattern if len(entries) != self.init_rank]:
            raise ValueError(f"method.rank_pattern: {wrong[0]!r} needs {self.init_rank} entries, as method.init_rank")

    def check(self, model: nnx.Module) -> None:
        for site, _ in self.chosen(model):
            check_rank(self.init_rank, site, "init_rank")

    def chosen(self, model: nnx.Module) -> Chosen:
        chosen = super().chosen(model)
        known = {f"{name}.lora_E" for name in chosen_names(chosen)}
        if unknown := [name for name, _ in self.rank_pattern if name not in known]:
            raise ValueError(f"method.rank_pattern: {unknown[0]!r} is no target.{suggest(unknown[0], known)}")
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
        pattern = {}
        for site, adapter in adapters_named(model, name):
            if isinstance(adapter, AdaLoraLinear):
                for hf, rank, kept in zip(site.names, adapter.ranks, adapter.kept(), strict=True):
                    if rank is not None:
                        left = iter(kept.tolist())
                        pattern[f"{hf}.lora_E"] = [entry and next(left) for entry in self._entries(hf)]
        complete = all(all(entries) for entries in pattern.values())
        return super().to_hf(model, name) | {"rank_pattern": None if complete else pattern}

    def optimizer(
        self, inner: optax.GradientTransformation, leaves: Mapping[str, nnx.Variable]
    ) -> optax.GradientTransformation:
        """`inner`, and then the entries of E that the budget has no room for are set to zero."""
        suffix = ".singular_values"
        adapters = [path.removesuffix(suffix) for path in leaves if path.endswith(suffix)]
        return _allocate(inner, self, {path: np.asarray(leaves[f"{path}.scale"].get_value()) > 0 for path in adapters})

    def penalty(self, model: Any) -> jax.Array | None:
        """orthogonality * the mean of ||P^T P - I|| and ||Q Q^T - I|| over all targets."""
        if self.orthogonality == 0:
            return None
        slots = [site.module.adapters for site in sites(model)]
        found = [slot.adapter(name) for slot in slots for name in slot.active]
        found = [adapter for adapter in found if isinstance(adapter, AdaLoraLinear)]
        count = sum(rank is not None for adapter in found for rank in adapter.ranks)
        return self.orthogonality * sum(adapter.skewness() for adapter in found) / (2 * count)

    def _entries(self, name: str) -> tuple[bool, ...]:
        return dict(self.rank_pattern).get(f"{name}.lora_E", (True,) * self.init_rank)


class AdaLoraLinear(DeltaAdapter):
    """x W + (x P * E * scale) Q. p: [*stack, in, R], singular_values: E, [*stack, R], q: [*stack, R, out].

    ranks: of each layer, None where there is no adapter; what is beyond a layer's rank has scale 0.
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

    def __call__(
        self, owner: nnx.Module, compute: Callable[..., jax.Array], *inputs: Any, **parameters: Any
    ) -> jax.Array:
        (x,) = inputs
        low = matmul(self.dropout(x), self.p.get_value())  # [..., R]
        low = low * jnp.broadcast_to(self._values().astype(low.dtype), low.shape)
        return compute(x, **parameters) + matmul(low, self.q.get_value())

    def delta(self) -> jax.Array:
        return jnp.matmul(self.p.get_value() * self._values()[None], self.q.get_value())

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        rank = self.ranks[layer or 0]
        every, some = slice(None), slice(rank)
        windows = {"p": (every, some), "q": (some, every), "singular_values": (some,)}
        return {
            key: dataclasses.replace(leaf, window=windows[leaf.leaf])
            for key, leaf in self.names.items()
            if rank is not None
        }

    def kept(self) -> np.ndarray:
        """Which entries of E were not removed, bool [layers, R]; all of them where all are zero, as at the start."""
        values, scale = np.asarray(self.singular_values.get_value()), np.asarray(self.scale.get_value())
        kept = (scale > 0) & ((values != 0) | (not values.any()))
        return kept.reshape(len(self.ranks), -1)

    def exported(self) -> "AdaLoraLinear":
        """The adapter with what was removed left out; itself if nothing was, or if it has shapes alone."""
        if isinstance(self.singular_values.get_value(), jax.core.Tracer):
            return self
        kept = self.kept()
        ranks = tuple(None if rank is None else int(n) for rank, n in zip(self.ranks, kept.sum(axis=1), strict=True))
        if ranks == self.ranks:
            return self
        order = np.argsort(~kept, axis=1, kind="stable").reshape(self.singular_values.shape)
        places = {"p": order[..., None, :], "singular_values": order, "q": order[..., None]}
        axes = {"p": -1, "singular_values": -1, "q": -2}
        p, values, q = (
            PeftParam(
                jnp.take_along_axis(getattr(self, leaf).get_value(), jnp.asarray(places[leaf]), axis=axes[leaf]),
                axes=getattr(self, leaf).axes,
            )
            for leaf in ("p", "singular_values", "q")
        )
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

    def _values(self) -> jax.Array:
        return self.singular_values.get_value() * self.scale.get_value()


# --- The budget ---


class Allocation(NamedTuple):
    """updates: int32 [], done so far; sensitivity, uncertainty: moving averages of importance, as the parameters."""

    updates: jax.Array
    sensitivity: dict[str, jax.Array]
    uncertainty: dict[str, jax.Array]
    inner: Any


def _allocate(
    inner: optax.GradientTransformation, method: AdaLora, active: dict[str, np.ndarray]
) -> optax.GradientTransformation:
    """`inner`, and the removal of entries of E; active: the paths of adapters, and which of their entries are there."""
    paths = [f"{path}.{leaf}" for path in active for leaf in ("p", "singular_values", "q")]
    start, end = method.warmup_steps, method.total_steps - method.final_steps
    initial = sum(int(there.sum()) for there in active.values())
    targets = sum(int(there.any(axis=-1).sum()) for there in active.values())
    target = min(initial, method.target_rank * targets)

    def init(params: Any) -> Allocation:
        zeros = {path: jnp.zeros(params[path].shape, jnp.float32) for path in paths}
        return Allocation(jnp.zeros((), jnp.int32), zeros, dict(zeros), inner.init(params))

    def scores(state: Allocation) -> dict[str, jax.Array]:
        """The importance of every triplet, [*stack, R], infinite for what is not there."""
        by_path = {}
        for path, there in active.items():
            p, values, q = (
                state.sensitivity[f"{path}.{leaf}"] * state.uncertainty[f"{path}.{leaf}"]
                for leaf in ("p", "singular_values", "q")
            )
            by_path[path] = jnp.where(there, values + p.mean(axis=-2) + q.mean(axis=-1), jnp.inf)
        return by_path

    def update(gradients: Any, state: Allocation, params: Any = None) -> tuple[Any, Allocation]:
        updates, inner_state = inner.update(gradients, state.inner, params)
        step = state.updates + 1
        sensitivity, uncertainty = {}, {}
        for path in paths:
            importance = jnp.abs((params[path] + updates[path]) * gradients[path])
            smooth = method.beta1 * state.sensitivity[path] + (1 - method.beta1) * importance
            spread = method.beta2 * state.uncertainty[path] + (1 - method.beta2) * jnp.abs(importance - smooth)
            sensitivity[path] = jnp.where(step < end, smooth, state.sensitivity[path])
            uncertainty[path] = jnp.where(step < end, spread, state.uncertainty[path])
        state = Allocation(step, sensitivity, uncertainty, inner_state)

        ranked = scores(state)
        left = 1 - (step - start) / (end - start)
        removed = initial - jnp.floor((initial - target) * left**3 + target).astype(jnp.int32)
        due = ((step > start) & (step < end) & (step % method.interval == 0)) | (step == end)
        ordered = jnp.sort(jnp.concatenate([score.ravel() for score in ranked.values()]))
        threshold = jnp.where(due & (removed > 0), ordered[jnp.maximum(removed - 1, 0)], -jnp.inf)
        for path, score in ranked.items():
            values = params[f"{path}.singular_values"]
            drop = jnp.where(step > end, values == 0, score <= threshold)
            updates = updates | {
                f"{path}.singular_values": jnp.where(drop, -values, updates[f"{path}.singular_values"])
            }
        return updates, state

    return optax.GradientTransformation(init, update)
