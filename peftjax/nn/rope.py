"""Rotary position embedding, with the scaling variants of Llama-like config.json files."""

import dataclasses
import math
import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.core.errors import UserError

RopeTables = tuple[jax.Array, jax.Array]  # cos and sin, float32 [B or 1, T, H/2] each
# The parameters that each kind needs.
NEEDED: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": set(),
    "longrope": {"short_factor", "long_factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary frequencies theta^(-2i/H), i < H/2 (Su et al. 2021, eq. 15), scaled by `kind`.

    default    unscaled
    linear     divided by `factor` (position interpolation, Chen et al. 2023)
    dynamic    theta grows with the sequence beyond `max_positions` (NTK-aware scaling)
    yarn       interpolated below `beta_slow` turns, kept above `beta_fast`, blended between; cos and sin scaled by
               `attention_factor` (Peng et al. 2023, sections 3.2 to 3.4)
    longrope   divided per frequency by `short_factor`, or by `long_factor` beyond `original_positions` (Ding et al. 2024)
    llama3     interpolated for wavelengths longer than original_positions / low_freq_factor, blended between (Llama 3.1)
    """

    head_dim: int
    theta: float = 10000.0
    kind: str = "default"
    max_positions: int = 2048
    original_positions: int = 2048
    factor: float = 1.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def tables(self, positions: jax.Array) -> RopeTables:
        """Return cos and sin of position times frequency: int [B, T] -> two float32 [B, T, H/2]."""
        frequencies = self._frequencies(jnp.max(positions) + 1)
        angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
        return jnp.cos(angles) * self.attention_factor, jnp.sin(angles) * self.attention_factor

    def _frequencies(self, length: jax.Array) -> jax.Array:
        exponents = jnp.arange(0, self.head_dim, 2, dtype=jnp.float32) / self.head_dim
        plain = 1.0 / (self.theta**exponents)
        match self.kind:
            case "default":
                return plain
            case "linear":
                return plain / self.factor
            case "dynamic":
                beyond = jnp.maximum(length, self.max_positions).astype(jnp.float32) / self.max_positions
                growth = self.factor * beyond - (self.factor - 1)
                return 1.0 / ((self.theta * growth ** (self.head_dim / (self.head_dim - 2))) ** exponents)
            case "longrope":
                long, short = jnp.asarray(self.long_factor), jnp.asarray(self.short_factor)
                return plain / jnp.where(length > self.original_positions, long, short)
            case "yarn":
                keep = 1.0 - jnp.asarray(self._yarn_ramp(), jnp.float32)
                return plain / self.factor * (1 - keep) + plain * keep
            case "llama3":
                turns = self.original_positions * plain / (2 * math.pi)
                blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
                blend = jnp.clip(blend, 0.0, 1.0)
                return (1 - blend) * plain / self.factor + blend * plain
        raise AssertionError(self.kind)

    def _yarn_ramp(self) -> np.ndarray:
        def dimension(turns: float) -> float:  # the index whose frequency makes `turns` turns over the original length
            return (
                self.head_dim * math.log(self.original_positions / (turns * 2 * math.pi)) / (2 * math.log(self.theta))
            )

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        high = high + 0.001 if low == high else high
        return np.clip((np.arange(self.head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool = False) -> jax.Array:
    """Rotate the pairs (x_i, x_{i + R/2}), i < R/2, of every head: [B, T, N, H], with cos and sin [B, T, R/2].

    If `interleaved`, the pairs are (x_2i, x_{2i + 1}). R is H, or less if only the first R elements of a head are rotated.
    The gradient of x is the inverse rotation; cos and sin have no gradient.
    """
    cos, sin = (table[:, :, None, :].astype(x.dtype) for table in (cos, sin))  # [B, T, 1, R/2]
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    pair = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        return jnp.concatenate([jnp.stack(pair, axis=-1).reshape(turned.shape), rest], axis=-1)
    return jnp.concatenate([*pair, rest], axis=-1)


def _rotated_back(interleaved: bool, tables: RopeTables, gradient: jax.Array) -> tuple[jax.Array, None, None]:
    cos, sin = tables
    return rotate(gradient, cos, -sin, interleaved), None, None


rotate.defvjp(lambda x, cos, sin, interleaved: (rotate(x, cos, sin, interleaved), (cos, sin)), _rotated_back)


def from_hf(parameters: dict[str, Any], *, head_dim: int, max_positions: int) -> Rope:
    """Read the `rope_parameters` of a Hugging Face config.json, rope_theta included.

    Args:
        parameters: The fields; rope_scaling of older files has the same format.
        head_dim: Width of a head, or of the part of it that is rotated.
        max_positions: max_position_embeddings of the model.

    Raises:
        UserError: An unknown rope_type, a missing field, or an odd width.
    """
    if head_dim % 2:
        raise UserError(
            f"config.json: a rotary embedding needs an even width, but it rotates {head_dim} elements of a head"
        )
    given = {key: value for key, value in parameters.items() if value is not None}
    kind = given.pop("rope_type", given.pop("type", "default"))
    kind = "longrope" if kind == "su" else kind  # an old name
    if kind not in list(NEEDED):  # of any type
        raise UserError(f"config.json: unknown rope_type {kind!r}; supported: {', '.join(NEEDED)}")
    theta = float(given.pop("rope_theta", 10000.0))
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("config.json: partial_rotary_factor must be 1.0; this family rotates whole heads")
    if missing := sorted(NEEDED[kind] - set(given)):
        raise UserError(
            f"config.json: rope_type {kind!r} needs {', '.join(missing)} in rope_scaling; it has {sorted(given)}"
        )
    original = given.pop("original_max_position_embeddings", None) or max_positions
    rope: dict[str, Any] = {"max_positions": max_positions, "original_positions": original}
    if kind in ("yarn", "longrope"):
        rope |= _scaled_attention(kind, given, max_positions, original)
    optional = {"beta_fast", "beta_slow", "truncate"} if kind == "yarn" else set()
    for name in (NEEDED[kind] | optional) & given.keys():
        value = given.pop(name)
        rope[name] = tuple(map(float, value)) if isinstance(value, list | tuple) else value
    if given:
        warnings.warn(
            f"config.json: ignoring {', '.join(sorted(given))} in rope_scaling, as transformers does for rope_type {kind!r}",
            stacklevel=2,
        )
    for name in ("short_factor", "long_factor"):
        if kind == "longrope" and len(rope[name]) != head_dim // 2:
            raise UserError(
                f"config.json: {name} has {len(rope[name])} numbers, but a head of width {head_dim} needs {head_dim // 2}"
            )
    return Rope(head_dim, theta, kind, **rope)


def _scaled_attention(kind: str, given: dict[str, Any], max_positions: int, original: int) -> dict[str, float]:
    factor = float(given.pop("factor", None) or max_positions / original)
    attention = given.pop("attention_factor", None)
    mscale, mscale_all_dim = given.pop("mscale", None), given.pop("mscale_all_dim", None)
    if attention is None and kind == "longrope":
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    elif attention is None:
        both = mscale and mscale_all_dim
        attention = _mscale(factor, mscale) / _mscale(factor, mscale_all_dim) if both else _mscale(factor, 1.0)
    return {"factor": factor, "attention_factor": float(attention)}


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
