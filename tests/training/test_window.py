"""The steps between two lines of the log."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from peftjax.data.batches import HostBatch
from peftjax.training.window import Window


def test_a_hundred_steps_on_eight_cpu_devices_are_counted() -> None:
    """Without waiting in between, XLA's CPU client aborts the process: more than 32 programs with collectives deadlock."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:8])

    @jax.jit
    def step(x: jax.Array) -> dict[str, jax.Array]:
        return {"loss": x.mean(), "grad_norm": jnp.linalg.norm(x)}

    x = jax.device_put(jnp.ones((64, 64)), NamedSharding(mesh, P("data")))
    window = Window("tokens")
    for number in range(100):
        window.add(number, step(x), HostBatch({}, ["record"], 8))
    numbers = window.close()
    assert numbers["loss"] == 1.0
    assert numbers["grad_norm"] == pytest.approx(64.0)
    assert numbers["tokens_per_second"] > 0
