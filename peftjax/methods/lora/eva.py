"""EVA: LoRA's A starts as the directions in which the inputs of its layer vary most.

Paischer et al. 2024 (arXiv:2410.07170), section 3 and algorithm 1. With the inputs X [N, in] of a layer, less their mean,
and X = U S V^T, A is V_r, and B is zero. A direction explains s_i^2 / sum_j s_j^2 of its layer's variance; with rho > 1 the
ranks go where the most is explained: of all directions, at most rho r of a layer, the best are kept, as many as there
were ranks, and alpha follows a layer's rank, so that the update keeps its scale. S and V come from an incremental
decomposition, batch by batch (Ross et al. 2008, section 2.1), as in Hugging Face PEFT, which goes on until the directions
stand still; here the batches that are given are all.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.sites import Site, sites
from peftjax.core import variables
from peftjax.core.variables import PeftConstant
from peftjax.methods.lora.init import randomised_svd
from peftjax.nn.slot import Adapter

NAME = "eva_watches"
NO_INPUTS = ("targets", "loss_weights", "labels")


class Directions(NamedTuple):
    """Of one site, by layer: vectors [L, M, in] of length 1, the best first; explained: their shares of the variance,
    [L, M]."""

    vectors: np.ndarray
    explained: np.ndarray


class Memory(NamedTuple):
    """The inputs seen so far. basis: S V^T, [*stack, M, in]; mean: [*stack, in]; spread: the sum of squared distances from
    the mean, seen: the number of inputs, both [*stack]. All float32."""

    basis: jax.Array
    mean: jax.Array
    spread: jax.Array
    seen: jax.Array


def redistribute(explained: Mapping[str, np.ndarray], ranks: Mapping[str, int]) -> dict[str, int]:
    """New ranks with the same sum: how many of the best explained directions of all layers are a layer's own."""
    names = [name for name, shares in explained.items() for _ in shares]
    best = np.argsort(-np.concatenate(list(explained.values())), kind="stable")[: sum(ranks.values())]
    counts = dict.fromkeys(ranks, 0)
    for index in best:
        counts[names[index]] += 1
    return counts


def find_directions(
    model: Any, sizes: Mapping[str, int], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Directions]:
    """The directions of the inputs of some sites, {path: how many}, when the base alone computes the batches.

    batches: each {"tokens": [B, T], and what else the model takes by name}. Positions do not count that "mask" [B, T]
    leaves out, nor those without loss by "loss_weights" [B, T].
    """
    every = sites(model)
    watched = [site for site in every if site.path in sizes]
    active = {site.path: site.module.adapters.active for site in every}
    try:
        for site in every:
            site.module.adapters.active = ()
        for site in watched:
            site.module.adapters.add(NAME, Watch(site, sizes[site.path]))
            site.module.adapters.active = (NAME,)
        memories = _watch(model, batches)
    finally:
        for site in watched:
            if NAME in site.module.adapters.names():
                site.module.adapters.remove(NAME)
        for site in every:
            site.module.adapters.active = active[site.path]
    return {site.path: _directions(site, memories[site.path]) for site in watched}


def _watch(model: Any, batches: Iterable[Mapping[str, Any]]) -> dict[str, Memory]:
    """The memories of all watched sites after the batches, by path.

    They come out of the model as gradients do: a layer's memory is an input of `_seen`, whose backward pass says that
    the memory's gradient is the memory with the new inputs in it. So they pass through a scan over layers, jit and
    sharding, and no more than one layer's inputs are held at a time.
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
        if isinstance(batch, Mapping) and "pixels" in batch:
            raise ValueError(
                "method.init='eva' looks at the inputs of tokens, and these batches are of images: choose another init"
            )
        if not isinstance(batch, Mapping) or "tokens" not in batch:
            raise ValueError(
                f'attach: each of batches must be {{"tokens": [B, T], ...}}, one is {type(batch).__name__}'
            )
        memory = look(memory, base, dict(batch))
    found: dict[str, dict[str, jax.Array]] = {}
    for path, value in memory.items():
        site, leaf = path.split(ending)
        found.setdefault(site, {})[leaf] = value
    return {site: Memory(**fields) for site, fields in found.items()}


class Watch(Adapter):
    """Changes nothing, and remembers the inputs of its owner. weights: [B, T], 1 for the positions that count."""

    def __init__(self, site: Site, size: int) -> None:
        shapes = {
            "basis": (size, site.module.in_features),
            "mean": (site.module.in_features,),
            "spread": (),
            "seen": (),
        }
        for leaf, shape in shapes.items():
            value = jnp.zeros((*site.stack, *shape), jnp.float32)
            setattr(self, leaf, PeftConstant(value, axes=site.lead(*[None] * len(shape))))
        self.weights = PeftConstant(jnp.ones((1, 1)), axes=(None, None))

    def __call__(self, owner: nnx.Module, compute: Any, *inputs: Any, **parameters: Any) -> jax.Array:
        (x,) = inputs
        memory = Memory(*(getattr(self, leaf).get_value() for leaf in Memory._fields))
        weights = self.weights.get_value()
        weights = weights if weights.shape == x.shape[:-1] else jnp.ones(x.shape[:-1])  # not one input for a token
        return compute(_seen(x, memory, weights), **parameters)


@jax.custom_vjp
def _seen(x: jax.Array, memory: Memory, weights: jax.Array) -> jax.Array:
    """x; its gradient for `memory` is `remember(memory, x, weights)`."""
    del memory, weights
    return x


def _forward(x: jax.Array, memory: Memory, weights: jax.Array) -> tuple[jax.Array, Any]:
    return x, (x, memory, weights)


def _backward(residuals: Any, gradient: jax.Array) -> tuple[jax.Array, Memory, jax.Array]:
    x, memory, weights = residuals
    return gradient, remember(memory, x, weights), jnp.zeros_like(weights)


_seen.defvjp(_forward, _backward)


def remember(memory: Memory, x: jax.Array, weights: jax.Array) -> Memory:
    """The memory of one layer with the inputs x [..., in] whose weight, [...], is 1 and not 0."""
    size, features = memory.basis.shape
    x, weights = x.reshape(-1, features).astype(jnp.float32), weights.reshape(-1)
    number = weights.sum()
    seen = memory.seen + number
    with jax.default_matmul_precision("highest"):
        mean = weights @ x / jnp.maximum(number, 1)
        centred = (x - mean[None]) * weights[:, None]
        moved = jnp.sqrt(memory.seen * number / jnp.maximum(seen, 1)) * (memory.mean - mean)
        rows = jnp.concatenate([memory.basis, centred, moved[None]])
        columns = min(2 * size, *rows.shape)  # and 4 iterations: what peft takes
        _, values, vectors = randomised_svd(rows, columns, 4, jax.random.key(0))
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
        raise ValueError(
            f"method.init='eva': {int(seen.min())} tokens with a loss reached {site.names[int(seen.argmin())]}, and "
            f"{basis.shape[1]} directions are asked of them (rank * eva_rho); give more or longer batches"
        )
    lengths = np.linalg.norm(basis, axis=-1)  # [L, M]
    vectors = basis / np.maximum(lengths, np.finfo(np.float32).tiny)[..., None]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=-1, keepdims=True), axis=-1)
    return Directions(
        vectors * np.where(largest < 0, -1, 1), lengths**2 / np.maximum(spread, np.finfo(np.float32).tiny)
    )
