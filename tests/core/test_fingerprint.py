import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from peftjax.core import fingerprint as fingerprint_module
from peftjax.core.fingerprint import fingerprint, marks

DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "uint8", "int4", "uint4", "bool"]


def words(dtype: str, shape: tuple[int, ...] = (6, 5)) -> np.ndarray:
    """Random bits, one unsigned integer an element, within the width of the dtype."""
    return np.random.default_rng(0).integers(0, 2 ** bits(dtype), shape, dtype=np.uint64)


def bits(dtype: str) -> int:
    if dtype == "bool":
        return 1
    kind = jnp.finfo if jnp.issubdtype(jnp.dtype(dtype), jnp.floating) else jnp.iinfo
    return kind(jnp.dtype(dtype)).bits


def as_dtype(array: np.ndarray, dtype: str) -> jax.Array:
    if dtype == "bool":
        return jnp.asarray(array.astype(bool))
    unsigned = jnp.asarray(array.astype(np.uint32)).astype(f"uint{bits(dtype)}")
    return jax.lax.bitcast_convert_type(unsigned, jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_single_flipped_bit_changes_it(dtype: str) -> None:
    base = words(dtype)
    seen = {fingerprint({"x": as_dtype(base, dtype)})}
    flips = 0
    for index in np.ndindex(base.shape):
        for bit in range(bits(dtype)):
            flipped = base.copy()
            flipped[index] ^= np.uint64(1 << bit)
            seen.add(fingerprint({"x": as_dtype(flipped, dtype)}))
            flips += 1
    assert len(seen) == flips + 1


def test_any_swap_of_two_elements_or_rows_changes_it() -> None:
    x = np.random.default_rng(1).standard_normal((7, 6)).astype(np.float32)
    seen, swaps = {fingerprint({"x": jnp.asarray(x)})}, 0
    flat = x.reshape(-1)
    for i in range(flat.size):
        for j in range(i):
            order = np.arange(flat.size)
            order[[i, j]] = order[[j, i]]
            seen.add(fingerprint({"x": jnp.asarray(flat[order].reshape(x.shape))}))
            swaps += 1
    for i in range(7):
        for j in range(i):
            order = np.arange(7)
            order[[i, j]] = order[[j, i]]
            seen.add(fingerprint({"x": jnp.asarray(x[order])}))
            swaps += 1
    assert len(seen) == swaps + 1


def test_an_exchange_of_values_that_differ_in_the_sign_only_changes_it() -> None:
    """The difference of 1.0 and -1.0 is 2^31: times an even number it is 0, so a plain weighted sum would miss it."""
    x = np.ones(64, np.float32)
    seen = set()
    for i in range(64):
        signs = x.copy()
        signs[i] = -1
        seen.add(fingerprint({"x": jnp.asarray(signs)}))
    assert len(seen) == 64


def test_it_is_the_same_on_one_device_and_on_any_sharding_of_eight() -> None:
    assert jax.device_count() >= 8
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:8])
    cases = [
        ("float32", P("a", "b")),
        ("float32", P("b", None, "a")),
        ("bfloat16", P(None, ("a", "b"))),
        ("int4", P("a")),
    ]
    for dtype, spec in cases:
        x = as_dtype(words(dtype, (8, 16, 8)), dtype)
        sharded = jax.device_put(
            np.asarray(x), NamedSharding(mesh, spec)
        )  # from the host: a compiled copy may quiet a NaN
        assert fingerprint({"x": sharded}) == fingerprint({"x": x}), (dtype, spec)


def test_a_flipped_bit_or_swapped_rows_of_a_sharded_array_change_it() -> None:
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,), devices=jax.devices()[:8])
    base = words("bfloat16", (16, 4))
    flipped, swapped = base.copy(), base.copy()
    flipped[15, 3] ^= np.uint64(1)
    swapped[[0, 15]] = swapped[[15, 0]]  # rows of two devices
    prints = {
        fingerprint({"x": jax.device_put(as_dtype(x, "bfloat16"), NamedSharding(mesh, P("a")))})
        for x in (base, flipped, swapped)
    }
    assert len(prints) == 3


def test_many_sharded_arrays_have_one() -> None:
    """Without waiting in between, XLA's CPU client aborts the process: more than 32 programs with collectives deadlock."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:8])
    x = as_dtype(words("float32", (8, 16)), "float32")
    sharded = jax.device_put(x, NamedSharding(mesh, P("a", "b")))
    tree = dict.fromkeys(map(str, range(100)), x)
    assert fingerprint(dict.fromkeys(tree, sharded)) == fingerprint(tree)


def test_names_shapes_and_dtypes_count_and_the_order_of_the_names_does_not() -> None:
    x = jnp.arange(6, dtype=jnp.int32)
    trees = [
        {"x": x},
        {"y": x},
        {"x": x.reshape(2, 3)},
        {"x": x.reshape(3, 2)},
        {"x": jax.lax.bitcast_convert_type(x, jnp.uint32)},
        {"x": jax.lax.bitcast_convert_type(x, jnp.float32)},
        {"x": x, "y": x},
        {"x": x, "y": x + 0 * x},
        {},
    ]
    assert len({fingerprint(tree) for tree in trees}) == len(trees) - 1
    assert fingerprint({"a": x, "b": x + 1}) == fingerprint({"b": x + 1, "a": x})
    assert fingerprint({"a": x, "b": x + 1}) != fingerprint({"a": x + 1, "b": x})


def test_minus_zero_and_the_payload_of_a_nan_count() -> None:
    values = [0x00000000, 0x80000000, 0x7FC00000, 0x7FC00001]
    assert len({fingerprint({"x": as_dtype(np.array([v], np.uint64), "float32")}) for v in values}) == 4


def test_scalars_empty_arrays_prng_keys_and_masked_leaves_have_one() -> None:
    tree = {"step": jnp.int32(3), "none": jnp.zeros((0, 4)), "rng": jax.random.key(0), "frozen": optax.MaskedNode()}
    prints = {
        fingerprint(tree),
        fingerprint({**tree, "step": jnp.int32(4)}),
        fingerprint({**tree, "rng": jax.random.key(1)}),
        fingerprint({**tree, "rng": jax.random.key(0, impl="rbg")}),
    }
    assert len(prints) == 4
    assert fingerprint(tree) == fingerprint({name: leaf for name, leaf in tree.items() if name != "frozen"})


def test_it_is_the_same_in_every_version() -> None:
    """An adapter names its base by this number: a change of the formula would disown every adapter there is."""
    tree = {"kernel": jnp.arange(12, dtype=jnp.float32).reshape(3, 4), "codes": jnp.array([-8, 0, 7], jnp.int4)}
    assert fingerprint(tree) == "04b46ed3e99b500f"


def test_it_makes_no_array_of_the_size_of_its_argument() -> None:
    x = jax.ShapeDtypeStruct((64, 256, 256), jnp.bfloat16)
    memory = fingerprint_module._mixed_sums.lower(x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2**16


def test_marks_are_those_of_the_weights_in_any_dtype_and_on_any_mesh() -> None:
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    weights = jax.random.normal(jax.random.key(0), (3, 130, 200))
    tree = {"kernel": weights, "scale": weights[0, 0]}
    expected = marks(tree)
    assert expected["kernel"] != expected["scale"]
    assert marks({path: leaf.astype(jnp.bfloat16) for path, leaf in tree.items()}) == expected
    sharded = jax.device_put(weights, NamedSharding(mesh, P(None, "a", "b")))
    assert marks({"kernel": sharded})["kernel"] == expected["kernel"]
    assert marks({"kernel": weights * 1.01})["kernel"] != expected["kernel"]
