"""What a plan counts of a mixture of experts: the experts that tokens use, and the padding of their blocks."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from peftjax import sharding
from peftjax.nn.feedforward import silu
from peftjax.nn.moe import MixtureOfExperts
from peftjax.plan import hlo_cost
from peftjax.plan.experts import ExpertUse, expert_use
from peftjax.quant.grouped import grouped_matmul
from peftjax.training import jaxpr_cost
from tests import tiny

EXPERTS, CHOICES, WIDTH, HIDDEN, BATCH, LENGTH = 8, 2, 16, 24, 2, 32


def layer() -> MixtureOfExperts:
    options: dict[str, Any] = {"activation": silu, "stddev": 0.1, "dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    return MixtureOfExperts(EXPERTS, CHOICES, True, WIDTH, HIDDEN, **options)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("sizes", "padding"),
    [
        ({}, EXPERTS * 16 // 2),  # half a block of 16 rows for every expert
        ({"fsdp": 2}, 2 * EXPERTS * 8 // 2),  # blocks of 8 rows on each of two devices
        ({"fsdp": 2, "tensor": 2}, 4 * EXPERTS // 2 * 8 // 2),  # and half of the experts on each of four
        ({"tensor": 4}, EXPERTS * 16 // 2),
    ],
)
def test_the_products_are_those_of_the_chosen_experts_and_half_a_block_of_padding_each(
    sizes: dict[str, int], padding: int
) -> None:
    mesh = sharding.make_mesh(sizes)
    with jax.set_mesh(mesh):
        graph, state = nnx.split(layer())
        x = jax.ShapeDtypeStruct((BATCH, LENGTH, WIDTH), jnp.float32)
        traced = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).trace(state, x)
        use = expert_use(layer(), BATCH, LENGTH)
    pairs = BATCH * LENGTH * CHOICES
    expected = 2 * 3 * WIDTH * HIDDEN * (pairs + padding)  # gate, up and down
    router = 2 * BATCH * LENGTH * WIDTH * EXPERTS
    combined = 2 * pairs * WIDTH * sizes.get("tensor", 1)  # each device combines the rows of its own experts
    assert jaxpr_cost.matmul_flops(traced.jaxpr.jaxpr, use.blocks) == expected + router + combined
    assert use.active == CHOICES / EXPERTS


def test_few_tokens_use_at_most_one_block_for_each_of_their_experts() -> None:
    use = expert_use(layer(), 1, 1)
    assert use.reads == CHOICES / EXPERTS
    assert expert_use(tiny.model(), 1, 8) == ExpertUse(1, 1, 1)


BLOCKS, SIDE = 16, 256
ONE = 4 * SIDE * SIDE  # bytes of one expert's kernel


def test_the_memory_traffic_is_that_of_the_kernels_of_the_blocks_in_use() -> None:
    given = jnp.ones((BLOCKS, 1, SIDE)), jnp.ones((EXPERTS, SIDE, SIDE)), jnp.arange(BLOCKS) // 2, jnp.array(BLOCKS)
    text = jax.jit(grouped_matmul).lower(*given).compile().as_text()
    traffic = lambda share: hlo_cost.traffic(text, blocks_in_use=share).memory  # noqa: E731
    assert traffic(0) < EXPERTS * ONE  # the kernels are not read as a whole
    each = (traffic(1) - traffic(0.25)) / (0.75 * BLOCKS)
    assert ONE < each < 4 * ONE  # a slice may be copied before it is multiplied
