"""Rotary tables against their formulas, and what a config may not ask for. Equality with transformers: tests/interop."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftjax.nn.rope import Rope, from_hf, rotate

H = 8
POSITIONS = jnp.arange(12)[None]


def angles(rope: Rope, positions: jax.Array = POSITIONS) -> np.ndarray:
    """The angle of every position and pair, [T, H/2], from cos and sin: none of them is beyond half a turn here."""
    cos, sin = rope.tables(positions)
    return np.arctan2(sin, cos)[0]


def frequencies(rope: Rope, last: int = 1) -> np.ndarray:
    """The angle from one position to the next, for a sequence that reaches `last`."""
    turned = angles(rope, jnp.array([[1, last]]))
    return turned[0]


def hf(kind: str, max_positions: int = 64, **fields: Any) -> Rope:
    return from_hf({"rope_type": kind} | fields, head_dim=H, max_positions=max_positions)


PLAIN = 10000.0 ** (-np.arange(0, H, 2) / H)


# --- The rotation ---


def test_a_pair_is_turned_by_position_times_frequency() -> None:
    x = jax.random.normal(jax.random.key(0), (1, 12, 3, H))
    rotated = np.asarray(rotate(x, *Rope(H).tables(POSITIONS)))
    pairs = np.asarray(x[..., : H // 2]) + 1j * np.asarray(x[..., H // 2 :])
    expected = pairs * np.exp(1j * np.arange(12)[:, None] * PLAIN)[None, :, None]
    np.testing.assert_allclose(rotated[..., : H // 2], expected.real, atol=1e-5)
    np.testing.assert_allclose(rotated[..., H // 2 :], expected.imag, atol=1e-5)


def test_interleaved_rotation_equals_rotation_of_permuted_halves() -> None:
    x, weights = jax.random.normal(jax.random.key(0), (2, 1, 12, 3, H + 2))  # the last two elements are not rotated
    tables, order = Rope(H).tables(POSITIONS), np.append(np.arange(H).reshape(-1, 2).T, [H, H + 1])

    def interleaved(x: jax.Array) -> jax.Array:
        return rotate(x, *tables, True)

    def halves(x: jax.Array) -> jax.Array:
        return rotate(x[..., order], *tables)[..., np.argsort(order)]

    np.testing.assert_allclose(interleaved(x), halves(x), atol=1e-6)
    found = jax.grad(lambda x: jnp.sum(interleaved(x) * weights))(x)
    expected = jax.grad(lambda x: jnp.sum(halves(x) * weights))(x)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_product_of_two_rotated_vectors_depends_on_their_distance_alone() -> None:
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, H))

    def product(query: int, key: int) -> float:
        turned = [rotate(x, *Rope(H).tables(jnp.array([[at]]))) for x, at in ((q, query), (k, key))]
        return float(jnp.sum(turned[0] * turned[1]))

    assert product(7, 4) == pytest.approx(product(103, 100), abs=1e-4)
    assert product(7, 4) != pytest.approx(product(7, 5), abs=1e-2)


def test_rotating_keeps_the_dtype() -> None:
    x = jnp.ones((1, 12, 1, H), jnp.bfloat16)
    assert rotate(x, *Rope(H).tables(POSITIONS)).dtype == jnp.bfloat16


# --- The kinds ---


def test_default_is_theta_to_the_minus_2i_over_h() -> None:
    np.testing.assert_allclose(frequencies(hf("default")), PLAIN, rtol=1e-6)
    np.testing.assert_allclose(
        frequencies(hf("default", rope_theta=500.0)), 500.0 ** (-np.arange(0, H, 2) / H), rtol=1e-6
    )


def test_linear_divides_by_the_factor() -> None:
    np.testing.assert_allclose(frequencies(hf("linear", factor=4.0)), PLAIN / 4, rtol=1e-6)


def test_dynamic_changes_nothing_up_to_max_positions_and_stretches_theta_beyond() -> None:
    rope = hf("dynamic", max_positions=16, factor=2.0)
    np.testing.assert_allclose(frequencies(rope, last=15), PLAIN, rtol=1e-6)
    theta = 10000.0 * (2 * 32 / 16 - 1) ** (H / (H - 2))
    np.testing.assert_allclose(frequencies(rope, last=31), theta ** (-np.arange(0, H, 2) / H), rtol=1e-5)


def test_longrope_divides_by_the_short_factors_up_to_the_original_length_and_by_the_long_ones_beyond() -> None:
    short, long = [1.0, 1.5, 2.0, 2.5], [2.0, 4.0, 6.0, 8.0]
    for name in ("longrope", "su"):
        rope = hf(name, short_factor=short, long_factor=long, original_max_position_embeddings=16)
        np.testing.assert_allclose(frequencies(rope, last=15), PLAIN / short, rtol=1e-6)
        np.testing.assert_allclose(frequencies(rope, last=16), PLAIN / long, rtol=1e-6)
        # 64 positions of 16: cos and sin grow by sqrt(1 + ln 4 / ln 16)
        assert float(rope.tables(POSITIONS)[0][0, 0, 0]) == pytest.approx(math.sqrt(1.5))


def test_llama3_keeps_short_wavelengths_and_divides_long_ones() -> None:
    rope = hf("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=256)
    found, wavelengths = frequencies(rope), 2 * np.pi / PLAIN
    np.testing.assert_allclose(found[wavelengths < 64], PLAIN[wavelengths < 64], rtol=1e-6)
    np.testing.assert_allclose(found[wavelengths > 256], PLAIN[wavelengths > 256] / 8, rtol=1e-6)
    assert not np.any((wavelengths >= 64) & (wavelengths <= 256))
    between = hf("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=100)
    assert PLAIN[1] / 8 < frequencies(between)[1] < PLAIN[1]


def test_yarn_keeps_what_turns_often_divides_what_turns_seldom_and_scales_cos_and_sin() -> None:
    rope = hf("yarn", factor=4.0, original_max_position_embeddings=1024)
    found = frequencies(rope)
    assert found[0] == pytest.approx(PLAIN[0])  # 163 turns
    assert found[-1] == pytest.approx(PLAIN[-1] / 4)  # 0.16 turns
    assert PLAIN[1] / 4 < found[1] < PLAIN[1]  # 16 turns
    assert float(rope.tables(POSITIONS)[0][0, 0, 0]) == pytest.approx(0.1 * math.log(4) + 1)
    fixed = hf("yarn", factor=4.0, attention_factor=1.25)
    assert float(fixed.tables(POSITIONS)[0][0, 0, 0]) == pytest.approx(1.25)


def test_the_older_field_name_type_is_read() -> None:
    assert from_hf({"type": "linear", "factor": 2.0}, head_dim=H, max_positions=64) == hf("linear", factor=2.0)
    assert from_hf({}, head_dim=H, max_positions=64) == hf("default")


# --- Mistakes ---

FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("linaer", {}, "unknown rope_type 'linaer'; supported: default, linear, dynamic, yarn, longrope, llama3"),
        ("ntk", {"factor": 2.0}, "unknown rope_type 'ntk'"),
        ("default", {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0"),
        ("linear", {}, "rope_type 'linear' needs factor in rope_scaling"),
        ("linear", {"factor": None}, "rope_type 'linear' needs factor in rope_scaling"),
        ("dynamic", {}, "rope_type 'dynamic' needs factor"),
        ("llama3", {"factor": 8.0}, "rope_type 'llama3' needs high_freq_factor, low_freq_factor in rope_scaling"),
        ("longrope", {}, "rope_type 'longrope' needs long_factor, short_factor"),
        ("longrope", FACTORS | {"long_factor": [1.0] * 3}, "long_factor has 3 numbers, but a head of width 8 needs 4"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_named(kind: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf(kind, **fields)


@pytest.mark.parametrize(
    ("kind", "fields", "other"),
    [
        ("default", {}, {"factor": 2.0}),
        ("linear", {"factor": 2.0}, {"beta_fast": 1, "finetuned": True}),
        ("longrope", FACTORS, {"beta_slow": 1}),
        ("yarn", {"factor": 4.0}, {"low_freq_factor": 1}),
    ],
)
def test_fields_that_a_type_does_not_use_change_nothing_and_are_named(
    kind: str, fields: dict[str, Any], other: dict[str, Any]
) -> None:
    message = f"ignoring {', '.join(sorted(other))} in rope_scaling, as transformers does for rope_type {kind!r}"
    with pytest.warns(UserWarning, match=message) as warned:
        read = hf(kind, **fields, **other)
    assert len(warned) == 1
    assert read == hf(kind, **fields)
