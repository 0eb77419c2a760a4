"""A new LoRA adapter that combines several, as `add_weighted_adapter` of Hugging Face PEFT does.

mix.py defines the ways. The results match peft 0.21.2, with these exceptions:

- peft always uses `linear` for a single adapter; here the requested way is used.
- peft keeps the first adapter's exclude_modules and layers_to_transform; here the new adapter is in every layer that one
  of the given adapters is in.
- peft keeps the first adapter's use_rslora, which multiplies the result by sqrt(rank); here the scale is 1.
- peft silently drops DoRA's magnitudes, lora_bias and modules_to_save; here they are rejected.
- peft's svd_clamp is not supported.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters import provenance
from peftjax.adapters.attach import attach_unchecked, detach
from peftjax.adapters.registry import ModelT, active, attached, require, use
from peftjax.adapters.sites import adapters_named, head_sites
from peftjax.core.errors import UserError
from peftjax.core.paths import suggest
from peftjax.methods.lora.adapter import LoraEmbedding, LoraLinear
from peftjax.methods.lora.experts import LoraExperts
from peftjax.methods.lora.lora import Lora
from peftjax.methods.lora.mix import APART, SPARSE, SPARSE_SVD, WAYS, Draw, Mixer, WeightedAdapter, bernoulli, rank_of
from peftjax.methods.lora.patches import LoraPatches


def combine(
    model: ModelT,
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
) -> ModelT:
    """Attach a LoRA under `name` that combines others, and make it the active adapter.

    Its scale is 1; its dropout and dtype come from the first adapter. If the files of all adapters name the same base, so
    does the new one's.

    Args:
        model: The model.
        names: The adapters to combine.
        weights: One weight for each; weights may be negative.
        how: "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
            "magnitude_prune" or "magnitude_prune_svd"; docs/combining.md explains them.
        name: The name of the new adapter.
        density: Share of the entries that ties, dare and magnitude_prune keep, in (0, 1].
        majority_sign: How ties elects signs, "total" or "frequency".
        rank: Rank of the result of svd; by default the largest rank of the given adapters.
        seed: Seed of the random masks of dare.
        draw: Function that draws these masks instead.

    Returns:
        The model.

    Raises:
        UserError: An option is out of range or has no meaning for `how`, an adapter is missing or has more than A and
            B, or ranks differ where they must be equal. The model is then unchanged.

    Examples:
        >>> import peftjax
        >>> from flax import nnx
        >>> model = peftjax.load_model("embedded")
        >>> model = peftjax.attach(model, peftjax.Lora(rank=4), "one", rngs=nnx.Rngs(0))
        >>> model = peftjax.attach(model, peftjax.Lora(rank=4), "two", rngs=nnx.Rngs(1))
        >>> model = peftjax.combine(model, ["one", "two"], [0.5, 0.5], name="both")
    """
    _check_options(names, weights, how, density, majority_sign, rank)
    methods = _loras(model, names)
    layers = _layers(model, names, weights)
    if how in APART:
        _check_ranks(how, layers)
    largest = rank or max(part.rank for parts in layers.values() for part in parts)
    ranks = {layer: rank_of(how, parts, largest) for layer, parts in layers.items()}
    mixer = Mixer(how, density or 1.0, majority_sign, draw or bernoulli(density or 1.0, seed))
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
    if len(bases := {provenance.base_name(model, each) for each in names}) == 1:
        provenance.remember_base(model, name, bases.pop())
    return model


def _layers(model: nnx.Module, names: Sequence[str], weights: Sequence[float]) -> dict[str, list[WeightedAdapter]]:
    """The adapters in each layer, in the order of `names`, by the layer's Hugging Face name."""
    found: dict[str, list[WeightedAdapter]] = {}
    for name, weight in zip(names, weights, strict=True):
        for site, adapter in adapters_named(model, name):
            lora = adapter.exported()
            if isinstance(lora, LoraPatches | LoraExperts):
                what = "experts" if isinstance(lora, LoraExperts) else "patch embeddings"
                raise UserError(
                    f"combine: adapter {name!r} has a LoRA on {site.names[0]}, and LoRAs on {what} cannot be combined"
                )
            assert type(lora) in (LoraLinear, LoraEmbedding), f"{type(lora).__name__} is more than A and B"
            stacked = [np.asarray(leaf.get_value(), np.float32) for leaf in (lora.a, lora.b, lora.scale)]
            for index, layer in enumerate(site.names):
                if rank := lora.ranks[index]:
                    a, b, scale = (value[index] if site.stack else value for value in stacked)
                    part = WeightedAdapter(
                        name, float(weight), float(scale[0]), jnp.asarray(a[:, :rank]), jnp.asarray(b[:rank])
                    )
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
        raise UserError(f"combine: how={how!r} is unknown.{suggest(how, WAYS)} It is one of {', '.join(WAYS)}")
    if isinstance(names, str) or not names:
        raise UserError(f"combine: names must be a list of adapter names, got {names!r}")
    if np.shape(weights) != (len(names),):
        raise UserError(
            f"combine: weights must be a list of {len(names)} numbers, one for each adapter, got {weights!r}"
        )
    for weight in weights:
        if isinstance(weight, str) or not math.isfinite(weight):
            raise UserError(f"combine: weights must be finite numbers, got {weight!r}")
    if how in SPARSE and (density is None or not 0 < density <= 1):
        raise UserError(f"combine: how={how!r} needs a density above 0 and up to 1, got {density!r}")
    if how not in SPARSE and density is not None:
        raise UserError(f"combine: density={density!r} is not used with how={how!r}; leave it out")
    if majority_sign not in ("total", "frequency"):
        raise UserError(f"combine: majority_sign must be 'total' or 'frequency', got {majority_sign!r}")
    if rank is not None and how not in ("svd", *SPARSE_SVD):
        raise UserError(f"combine: rank={rank!r} is not used with how={how!r}; leave it out or choose an svd way")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise UserError(f"combine: rank must be a positive integer, got {rank!r}")


def _loras(model: nnx.Module, names: Sequence[str]) -> list[Lora]:
    """The methods of the adapters, which must be plain LoRAs."""
    methods, loras = attached(model), []
    for name in names:
        require(model, name)
        method = methods[name]
        if not isinstance(method, Lora):
            raise UserError(
                f"combine: adapter {name!r} has the method {method.method!r}; only lora adapters can be combined"
            )
        for option in ("dora", "lora_bias", "bias", "token_indices", "ensure_weight_tying", "modules_to_save"):
            if (value := getattr(method, option)) != getattr(Lora, option):  # the default
                raise UserError(
                    f"combine: adapter {name!r} has {option}={value!r}; only LoRAs that train nothing but A and B can be combined"
                )
        if heads := [site.names[0] for site in head_sites(model) if name in site.module.adapters.names()]:
            raise UserError(
                f"combine: adapter {name!r} has its own {heads[0]}, and heads cannot be combined; train the adapters "
                "without a head, or use a different adapter for each row of a batch (peftjax.rows)"
            )
        loras.append(method)
    return loras


def _check_ranks(how: str, layers: dict[str, list[WeightedAdapter]]) -> None:
    for layer, (first, *others) in layers.items():
        for other in others:
            if other.rank != first.rank:
                raise UserError(
                    f"combine: how={how!r} needs equal ranks, but in {layer} {first.adapter!r} has {first.rank} and "
                    f"{other.adapter!r} {other.rank}; choose 'cat', 'svd' or another svd way"
                )


def _method(methods: list[Lora], ranks: dict[str, int]) -> Lora:
    """The combined method. Its targets are the given methods' if they agree, else the names of its layers."""
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
    """Set A and B of an adapter; pairs: {index of the layer in the stack: (A, B)}."""
    for leaf, rank_axis in (("a", 1), ("b", 0)):
        variable = getattr(adapter, leaf)
        old = variable.get_value()
        value = np.zeros((len(adapter.ranks), *old.shape[-2:]), np.float32)
        for index, pair in pairs.items():
            factor = np.asarray(pair[1 - rank_axis])
            value[index, : factor.shape[0], : factor.shape[1]] = factor
        variable.set_value(jax.device_put(value.reshape(old.shape).astype(old.dtype), old.sharding))
