"""A new LoRA adapter out of several: in every layer, A and B from the A_i, B_i, scales s_i and weights w_i of the given.

Ways that combine A's with A's and B's with B's; all ranks in a layer must be equal, and stay:

linear            A = sum_i sign(w_i s_i) sqrt|w_i s_i| A_i,  B = sum_i sqrt|w_i s_i| B_i. Their product holds A_i B_j of
                  different adapters too: it is no sum of updates but where the A_i or the B_i are alike.
magnitude_prune   linear of trimmed tensors: of each of them all but the k = floor(density * size) largest |entries| are 0.
ties              trimmed as before; of each entry a sign is elected, that of sum_i A_i (majority_sign="total") or of
                  sum_i sign(A_i) ("frequency"), + where it is 0; then, with the weights of `linear`, the mean over the
                  adapters that have this sign: Yadav et al. 2023 (arXiv:2306.01708), section 3 and algorithm 1.
dare_linear       linear of thinned tensors: M_i A_i / density, M_i ~ Bernoulli(density) in each entry: Yu et al. 2023
                  (arXiv:2311.03099), section 3, whose drop rate p is 1 - density.
dare_ties         ties, thinned instead of trimmed.

Ways that combine the updates D_i = s_i A_i B_i, whatever the ranks are:

cat               A = [w_1 s_1 A_1, w_2 s_2 A_2, ...], B = [B_1; B_2; ...]: exactly sum_i w_i D_i (task arithmetic, Ilharco
                  et al. 2022, arXiv:2212.04089), of the sum of the ranks.
svd               the best approximation of that sum of rank `rank`: U S V^T of it, A = U_r, B = S_r V_r^T. It is computed
                  from `cat` by two QR decompositions, without forming [in, out].
ties_svd, dare_linear_svd, dare_ties_svd, magnitude_prune_svd
                  the same of the D_i, with weights w_i, in the place of the A_i and the B_i. These form [in, out].

The papers trim, elect and thin updates of whole weights; doing it to A and B apart is peft's. All this is what
`add_weighted_adapter` of peft 0.21.2 computes, but for four things. peft takes `linear` for a single adapter, whatever is
asked; here the way asked for is taken. It keeps the first adapter's exclude_modules and layers_to_transform; here the new
adapter is in every layer that one of the given is in. It keeps the first one's use_rslora, which multiplies the result by
sqrt(rank); here its scale is 1. It drops DoRA's magnitudes, lora_bias and modules_to_save without a word; here they are
refused. peft's svd_clamp is not here.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from peftjax.adapters.attach import attach_unchecked, detach
from peftjax.adapters.registry import active, attached, use
from peftjax.adapters.sites import adapters_named, head_sites
from peftjax.core.paths import suggest
from peftjax.methods.lora.adapter import LoraEmbedding, LoraLinear
from peftjax.methods.lora.lora import Lora

APART = ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")
SPARSE_SVD = ("magnitude_prune_svd", "ties_svd", "dare_linear_svd", "dare_ties_svd")
WAYS = (*APART, "cat", "svd", *SPARSE_SVD)
SPARSE = (*APART[1:], *SPARSE_SVD)

# What is kept of a tensor: (Hugging Face's name of the layer, adapter, "a", "b" or "kernel", shape) -> zeros and ones.
# The shapes are a: [in, r], b: [r, out], kernel: [in, out].
Draw = Callable[[str, str, str, tuple[int, ...]], ArrayLike]


def combine(
    model: Any,
    names: Sequence[str],
    weights: Sequence[float],
    *,
    how: str = "linear",
    name: str = "combined",
    density: float | None = None,
    majority_sign: str = "total",
    rank: int | None = None,
    seed: int = 0,
    draw: Draw | None = None,
) -> Any:
    """Attach a LoRA under `name`, the active one then, made of those called `names` with these weights.

    Its scale is 1, its dropout and dtype are the first one's; weights may be negative. how: one of `WAYS`, as this
    module's docstring has them. density: the share of entries that the sparse ways keep, in (0, 1]. rank: of the svd ways;
    None: the largest of the given. The dare ways draw from `seed`, or take the masks of `draw`.

    Raises:
        ValueError: an option that is not possible or has no meaning for `how`, an adapter that is not there or is more
            than A and B, or ranks that differ where they must not. The model is unchanged then.
    """
    _check_options(names, weights, how, density, majority_sign, rank)
    methods = _loras(model, names)
    layers = _layers(model, names, weights)
    if how in APART:
        _check_ranks(how, layers)
    largest = rank or max(part.rank for parts in layers.values() for part in parts)
    ranks = {layer: _rank(how, parts, largest) for layer, parts in layers.items()}
    mixer = _Mixer(how, density or 1.0, majority_sign, draw or _bernoulli(density or 1.0, seed))
    before = active(model)
    attach_unchecked(model, _method(methods, ranks), name, rngs=nnx.Rngs(0))
    try:
        with jax.default_matmul_precision("highest"):
            for site, adapter in adapters_named(model, name):
                pairs = {
                    index: mixer.factors(layer, layers[layer], ranks[layer])
                    for index, layer in enumerate(site.names)
                    if layer in layers
                }
                _fill(adapter, pairs)
    except Exception:
        use(detach(model, name), before)
        raise
    return model


# --- What is given ---


@dataclasses.dataclass(frozen=True)
class _Part:
    """One adapter in one layer: weight * scale * a b, with a [in, rank] and b [rank, out] in float32."""

    adapter: str
    weight: float
    scale: float
    a: jax.Array
    b: jax.Array

    @property
    def rank(self) -> int:
        return self.b.shape[0]


def _layers(model: Any, names: Sequence[str], weights: Sequence[float]) -> dict[str, list[_Part]]:
    """For each layer that one of the adapters is in, by Hugging Face's name: those that are, in the order of `names`."""
    found: dict[str, list[_Part]] = {}
    for name, weight in zip(names, weights, strict=True):
        for site, adapter in adapters_named(model, name):
            lora = adapter.exported()
            assert type(lora) in (LoraLinear, LoraEmbedding), f"{type(lora).__name__} is more than A and B"
            stacked = [np.asarray(leaf.get_value(), np.float32) for leaf in (lora.a, lora.b, lora.scale)]
            for index, layer in enumerate(site.names):
                if rank := lora.ranks[index]:
                    a, b, scale = (value[index] if site.stack else value for value in stacked)
                    part = _Part(name, float(weight), float(scale[0]), jnp.asarray(a[:, :rank]), jnp.asarray(b[:rank]))
                    found.setdefault(layer, []).append(part)
    return found


def _check_options(
    names: Sequence[str],
    weights: Sequence[float],
    how: str,
    density: float | None,
    majority_sign: str,
    rank: int | None,
) -> None:
    if how not in WAYS:
        raise ValueError(f"combine: how={how!r} is not a way.{suggest(how, WAYS)} Ways: {', '.join(WAYS)}")
    if isinstance(names, str) or not names:
        raise ValueError(f"combine: names must be a list of adapter names, it is {names!r}")
    if len(weights) != len(names):
        raise ValueError(f"combine: weights has {len(weights)} numbers for {len(names)} adapters; give one for each")
    for weight in weights:
        if not math.isfinite(weight):
            raise ValueError(f"combine: weights must be finite numbers, one is {weight!r}")
    if how in SPARSE and (density is None or not 0 < density <= 1):
        raise ValueError(f"combine: how={how!r} needs a density above 0 and up to 1, it is {density!r}")
    if how not in SPARSE and density is not None:
        raise ValueError(f"combine: density={density!r} has no meaning for how={how!r}; leave it out")
    if majority_sign not in ("total", "frequency"):
        raise ValueError(f"combine: majority_sign must be 'total' or 'frequency', it is {majority_sign!r}")
    if rank is not None and how not in ("svd", *SPARSE_SVD):
        raise ValueError(f"combine: rank={rank!r} has no meaning for how={how!r}; leave it out or take an svd way")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"combine: rank must be a whole number of at least 1, it is {rank!r}")


def _loras(model: Any, names: Sequence[str]) -> list[Lora]:
    methods, loras = attached(model), []
    for name in names:
        if name not in methods:
            raise ValueError(
                f"combine: no adapter {name!r} is attached.{suggest(name, methods)} Attached: {list(methods)}"
            )
        method = methods[name]
        if not isinstance(method, Lora):
            raise ValueError(f"combine: adapter {name!r} is of the method {method.method!r}; only lora can be combined")
        for option, plain in (
            ("dora", False),
            ("lora_bias", False),
            ("bias", "none"),
            ("token_indices", ()),
            ("modules_to_save", ()),
        ):
            if (value := getattr(method, option)) != plain:
                raise ValueError(
                    f"combine: adapter {name!r} has {option}={value!r}; only LoRAs that train A and B alone can be combined"
                )
        if heads := [site.names[0] for site in head_sites(model) if name in site.module.adapters.names()]:
            raise ValueError(
                f"combine: adapter {name!r} has a {heads[0]} of its own, and heads cannot be combined; train the adapters "
                "without a head, or answer each row by its own adapter (peftjax.rows)"
            )
        loras.append(method)
    return loras


def _check_ranks(how: str, layers: dict[str, list[_Part]]) -> None:
    for layer, (first, *others) in layers.items():
        for other in others:
            if other.rank != first.rank:
                raise ValueError(
                    f"combine: how={how!r} needs equal ranks, but in {layer} {first.adapter!r} has {first.rank} and "
                    f"{other.adapter!r} {other.rank}; take 'cat', 'svd' or another svd way"
                )


# --- What is made ---


def _rank(how: str, parts: list[_Part], largest: int) -> int:
    """Of the new adapter in a layer; for an svd way no more than the matrix it decomposes can have."""
    if how in APART:
        return parts[0].rank
    total, sides = sum(part.rank for part in parts), (parts[0].a.shape[0], parts[0].b.shape[1])
    if how == "cat":
        return total
    return min(largest, *sides, total if how == "svd" else largest)


def _method(methods: list[Lora], ranks: dict[str, int]) -> Lora:
    """Where the first one's targets are everyone's the new adapter has them too, else the names of its layers."""
    first, largest = methods[0], max(ranks.values())
    where: dict[str, Any] = {"targets": tuple(ranks)}
    if len({(method.targets, method.exclude, method.layers_to_transform) for method in methods}) == 1:
        where = {field: getattr(first, field) for field in ("targets", "exclude", "layers_to_transform")}
    smaller = tuple((layer, rank) for layer, rank in ranks.items() if rank < largest)
    return Lora(
        rank=largest,
        alpha=largest,
        rank_pattern=smaller,
        alpha_pattern=smaller,
        dropout=first.dropout,
        dtype=first.dtype,
        **where,
    )


def _fill(adapter: LoraLinear, pairs: dict[int, tuple[jax.Array, jax.Array]]) -> None:
    """Give an adapter its A and B; pairs: by the index of the layer in the stack."""
    for leaf, rank_axis in (("a", 1), ("b", 0)):
        variable = getattr(adapter, leaf)
        old = variable.get_value()
        value = np.zeros((len(adapter.ranks), *old.shape[-2:]), np.float32)
        for index, pair in pairs.items():
            factor = np.asarray(pair[1 - rank_axis])
            value[index, : factor.shape[0], : factor.shape[1]] = factor
        variable.set_value(jax.device_put(value.reshape(old.shape).astype(old.dtype), old.sharding))


@dataclasses.dataclass(frozen=True)
class _Mixer:
    """What becomes of the adapters in one layer."""

    how: str
    density: float
    majority_sign: str
    draw: Draw

    def factors(self, layer: str, parts: list[_Part], rank: int) -> tuple[jax.Array, jax.Array]:
        """A [in, rank] and B [rank, out]."""
        if self.how in APART:
            strength = np.array([part.weight * part.scale for part in parts])
            roots = np.sqrt(np.abs(strength))
            signed = np.where(strength >= 0, roots, -roots)  # on one side alone: two signs would cancel
            a = self._mix(layer, "a", [(part.adapter, part.a) for part in parts], signed)
            return a, self._mix(layer, "b", [(part.adapter, part.b) for part in parts], roots)
        if self.how in SPARSE_SVD:
            updates = [(part.adapter, part.scale * jnp.matmul(part.a, part.b)) for part in parts]
            mixed = self._mix(layer, "kernel", updates, np.array([part.weight for part in parts]))
            u, values, vt = jnp.linalg.svd(mixed, full_matrices=False)
            return u[:, :rank], values[:rank, None] * vt[:rank]
        a = jnp.concatenate([part.weight * part.scale * part.a for part in parts], axis=1)
        b = jnp.concatenate([part.b for part in parts], axis=0)
        return (a, b) if self.how == "cat" else _truncated(a, b, rank)

    def _mix(self, layer: str, leaf: str, given: list[tuple[str, jax.Array]], weights: np.ndarray) -> jax.Array:
        """One tensor of those of the adapters."""
        sparse = [self._sparse(layer, adapter, leaf, tensor) for adapter, tensor in given]
        tensors = jnp.stack(sparse)  # [adapters, ...]
        weighted = tensors * jnp.asarray(weights, jnp.float32).reshape(-1, 1, 1)
        if "ties" not in self.how:
            return weighted.sum(0)
        elected = tensors if self.majority_sign == "total" else jnp.sign(tensors)
        sign = jnp.where(elected.sum(0, keepdims=True) >= 0, 1, -1)
        agree = jnp.sign(tensors) == sign  # a 0 agrees with no sign
        return (weighted * agree).sum(0) / jnp.maximum(agree.sum(0), 1)

    def _sparse(self, layer: str, adapter: str, leaf: str, tensor: jax.Array) -> jax.Array:
        if self.how == "linear":
            return tensor
        if self.how.startswith("dare"):
            mask = jnp.asarray(self.draw(layer, adapter, leaf, tensor.shape), tensor.dtype)
            return tensor * mask / self.density
        kept = jax.lax.top_k(jnp.abs(tensor).reshape(-1), int(self.density * tensor.size))[1]
        return tensor * jnp.zeros(tensor.size).at[kept].set(1).reshape(tensor.shape)


def _truncated(a: jax.Array, b: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """U_r and S_r V_r^T of the singular value decomposition U S V^T of a b."""
    (q_a, r_a), (q_b, r_b) = jnp.linalg.qr(a), jnp.linalg.qr(b.T)
    u, values, vt = jnp.linalg.svd(jnp.matmul(r_a, r_b.T), full_matrices=False)
    return jnp.matmul(q_a, u[:, :rank]), values[:rank, None] * jnp.matmul(vt[:rank], q_b.T)


def _bernoulli(density: float, seed: int) -> Draw:
    """Masks that are 1 with probability `density`, every one from a key of its own."""
    key, count = jax.random.key(seed), itertools.count()
    return lambda layer, adapter, leaf, shape: jax.random.bernoulli(
        jax.random.fold_in(key, next(count)), density, shape
    )
