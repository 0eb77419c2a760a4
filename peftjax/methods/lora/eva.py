"""EVA: LoRA's A is initialized with the directions in which the inputs of its layer vary most.

Paischer et al. 2024 (arXiv:2410.07170), section 3 and algorithm 1. With the centered inputs X [N, in] of a layer and
X = U S V^T, A is V_r, and B is zero. Direction i explains the share s_i^2 / sum_j s_j^2 of its layer's variance. With
rho > 1, ranks are redistributed: each layer contributes up to rho r directions, and of all directions the best explained
are kept, as many as the original ranks sum to. A layer's alpha follows its rank, so that the update keeps its scale. S
and V come from an incremental SVD over batches (Ross et al. 2008, section 2.1), as in Hugging Face PEFT, which continues
until the directions converge; here it uses exactly the batches given.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.registry import active, use
from peftjax.adapters.sites import Site, adapters_named, sites
from peftjax.core import variables
from peftjax.core.errors import UserError
from peftjax.core.variables import PeftConstant
from peftjax.methods.lora.init import randomized_svd
from peftjax.nn.slot import Adapter, Base

NAME = "eva_watches"
NO_INPUTS = ("targets", "loss_weights", "labels")


class Directions(NamedTuple):
    """The principal directions of the inputs of one site.

    Attributes:
        vectors: [L, M, in], of length 1, sorted by explained variance.
        explained: Their shares of the variance, [L, M].
    """

    vectors: np.ndarray
    explained: np.ndarray


class Memory(NamedTuple):
    """Running statistics of the inputs seen so far, all float32.

    Attributes:
        basis: S V^T, [*stack, M, in].
        mean: [*stack, in].
        spread: Sum of squared distances from the mean, [*stack].
        seen: Number of inputs, [*stack].
    """

    basis: jax.Array
    mean: jax.Array
    spread: jax.Array
    seen: jax.Array


def redistribute(explained: Mapping[str, np.ndarray], ranks: Mapping[str, int]) -> dict[str, int]:
    """New ranks with the same sum: how many of the overall best explained directions belong to each layer."""
    names = [name for name, shares in explained.items() for _ in shares]
    best = np.argsort(-np.concatenate(list(explained.values())), kind="stable")[: sum(ranks.values())]
    counts = collections.Counter(names[index] for index in best)
    return {name: counts[name] for name in ranks}


def initialize(
    model: nnx.Module, ranks: Sequence[tuple[Site, np.ndarray]], rho: float, batches: Iterable[Mapping[str, Any]]
) -> tuple[dict[str, int], dict[str, dict[str, np.ndarray]]]:
    """Redistribute ranks and initialize A by the inputs of each layer.

    Args:
        model: The model.
        ranks: Sites with the rank of each of their layers, int [layers].
        rho: The factor by which a layer's rank may grow.
        batches: As in `find_directions`.

    Returns:
        The new rank of each layer that had one, by Hugging Face name, and {path of a site: {"a": [*stack, in, R]}}.
    """
    limits = {site.path: np.minimum(np.rint(own * rho).astype(int), site.module.in_features) for site, own in ranks}
    found = find_directions(model, {path: int(limit.max()) for path, limit in limits.items()}, batches)
    old, explained = {}, {}
    for site, own in ranks:
        for hf, rank, limit, shares in zip(site.names, own, limits[site.path], found[site.path].explained, strict=True):
            if rank:
                old[hf], explained[hf] = int(rank), shares[:limit]
    new = redistribute(explained, old)
    start = {}
    for site, _ in ranks:
        kept = [new.get(hf, 0) for hf in site.names]
        a = np.zeros((len(kept), site.module.in_features, max(kept)), np.float32)
        for layer, rank in enumerate(kept):
            a[layer, :, :rank] = found[site.path].vectors[layer, :rank].T
        start[site.path] = {"a": a.reshape(*site.stack, *a.shape[1:])}
    return new, start


def find_directions(
    model: nnx.Module, sizes: Mapping[str, int], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Directions]:
    """The principal directions of the inputs of some sites while the base, without adapters, runs over the batches.

    Args:
        model: The model.
        sizes: The number of directions by path of the site.
        batches: Dicts with "tokens" [B, T] and other inputs of the model by name. Positions that "mask" [B, T] excludes,
            or whose weight in "loss_weights" [B, T] is 0, are not counted.
    """
    before, watched = active(model), [site for site in sites(model) if site.path in sizes]
    use(model, None)
    try:
        for site in watched:
            site.module.adapters.add(NAME, Watch(site, sizes[site.path]))
            site.module.adapters.active = (NAME,)
        memories = _watch(model, batches)
    finally:
        for site, _ in adapters_named(model, NAME):
            site.module.adapters.remove(NAME)
        use(model, before)
    return {site.path: _directions(site, memories[site.path]) for site in watched}


def _watch(model: nnx.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, Memory]:
    """The memories of all watched sites after the batches, by path.

    Memories leave the model the way gradients do: a layer's memory is an input of `_seen`, whose backward pass returns
    the updated memory as the gradient. This works under a scan over layers, jit and sharding, and keeps the inputs of
    only one layer at a time.
    """
    graph, leaves = variables.flat(model)
    values = {path: leaf.get_value() for path, leaf in leaves.items()}
    ending = f".adapters.{NAME}."
    memory = {path: value for path, value in values.items() if ending in path and not path.endswith(".weights")}
    weights_at = [path for path in values if ending in path and path.endswith(".weights")]
    base = {path: value for path, value in values.items() if ending not in path}

    @jax.jit
    def look(memory: Any, base: Any, batch: Mapping[str, jax.Array]) -> Any:
        tokens = batch["tokens"]
        weights = jnp.ones(tokens.shape)
        for name in ("mask", "loss_weights"):
            if name in batch and batch[name].shape == tokens.shape:
                weights *= batch[name] > 0
        counted = dict.fromkeys(weights_at, weights)
        inputs = {name: value for name, value in batch.items() if name not in ("tokens", *NO_INPUTS)}

        def total(memory: Any) -> jax.Array:
            return variables.join(graph, base, memory, counted)(tokens, **inputs).astype(jnp.float32).sum()

        return jax.grad(total)(memory)

    for batch in batches:
        if not isinstance(batch, Mapping) or "tokens" not in batch:
            got = ", ".join(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise UserError(
                f"method.init='eva' needs batches {{\"tokens\": [B, T], ...}}, got {got}: choose another init"
            )
        memory = look(memory, base, dict(batch))
    paths = {path.split(ending)[0] for path in memory}
    return {path: Memory(*(memory[f"{path}{ending}{leaf}"] for leaf in Memory._fields)) for path in paths}


class Watch(Adapter):
    """Passes its input through and updates the statistics of the layer's inputs.

    Attributes:
        weights: 1 for the positions that count, [B, T].
    """

    def __init__(self, site: Site, size: int) -> None:
        features = site.module.in_features
        for leaf, shape in {"basis": (size, features), "mean": (features,), "spread": (), "seen": ()}.items():
            value = jnp.zeros((*site.stack, *shape), jnp.float32)
            setattr(self, leaf, PeftConstant(value, axes=site.lead(*[None] * len(shape))))
        self.weights = PeftConstant(jnp.ones((1, 1)), axes=(None, None))

    def apply(self, base: Base, x: jax.Array) -> jax.Array:
        memory = Memory(*(getattr(self, leaf).get_value() for leaf in Memory._fields))
        weights = self.weights.get_value()
        weights = weights if weights.shape == x.shape[:-1] else jnp.ones(x.shape[:-1])  # inputs are not one per token
        return base(_seen(x, memory, weights))


@jax.custom_vjp
def _seen(x: jax.Array, memory: Memory, weights: jax.Array) -> jax.Array:
    """x; its gradient with respect to `memory` is `remember(memory, x, weights)`."""
    del memory, weights
    return x


def _forward(x: jax.Array, memory: Memory, weights: jax.Array) -> tuple[jax.Array, Any]:
    return x, (x, memory, weights)


def _backward(residuals: Any, gradient: jax.Array) -> tuple[jax.Array, Memory, jax.Array]:
    x, memory, weights = residuals
    return gradient, remember(memory, x, weights), jnp.zeros_like(weights)


_seen.defvjp(_forward, _backward)


def remember(memory: Memory, x: jax.Array, weights: jax.Array) -> Memory:
    """The memory of one layer, updated with those inputs x [..., in] whose weight [...] is 1; the others have 0."""
    size, features = memory.basis.shape
    x, weights = x.reshape(-1, features).astype(jnp.float32), weights.reshape(-1)
    number = weights.sum()
    seen = memory.seen + number
    with jax.default_matmul_precision("highest"):
        mean = weights @ x / jnp.maximum(number, 1)
        centred = (x - mean[None]) * weights[:, None]
        moved = jnp.sqrt(memory.seen * number / jnp.maximum(seen, 1)) * (memory.mean - mean)
        rows = jnp.concatenate([memory.basis, centred, moved[None]])
        columns = min(2 * size, *rows.shape)  # and 4 iterations, as in peft
        _, values, vectors = randomized_svd(rows, columns, 4, jax.random.key(0))
    return Memory(
        values[:size, None] * vectors[:size],
        (memory.seen * memory.mean + number * mean) / jnp.maximum(seen, 1),
        memory.spread + jnp.square(rows[size:]).sum(),
        seen,
    )


def _directions(site: Site, memory: Memory) -> Directions:
    basis, spread, seen = (np.asarray(jax.device_get(leaf)) for leaf in (memory.basis, memory.spread, memory.seen))
    basis = basis.reshape(len(site.names), *basis.shape[-2:])
    spread, seen = spread.reshape(-1, 1), seen.reshape(-1)
    if seen.min() < basis.shape[1]:
        raise UserError(
            f"method.init='eva': only {int(seen.min())} tokens with a loss reached {site.names[int(seen.argmin())]}, "
            f"fewer than the {basis.shape[1]} directions it needs (rank * eva_rho); give more or longer batches"
        )
    lengths = np.linalg.norm(basis, axis=-1)  # [L, M]
    vectors = basis / np.maximum(lengths, np.finfo(np.float32).tiny)[..., None]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=-1, keepdims=True), axis=-1)
    return Directions(
        vectors * np.where(largest < 0, -1, 1), lengths**2 / np.maximum(spread, np.finfo(np.float32).tiny)
    )
