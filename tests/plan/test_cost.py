"""What a program costs, counted from its jaxpr and from its compiled text: loops as often as they run."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from peftjax import sharding
from peftjax.plan import hlo_cost
from peftjax.training import jaxpr_cost

LAYERS, ROWS, WIDTH = 6, 8, 64


def loss(kernels: jax.Array, x: jax.Array) -> jax.Array:
    """[L, D, D], [B, D] -> []"""

    def layer(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, None]:
        return jnp.sin(x @ kernel), None

    return jax.lax.scan(jax.checkpoint(layer), x, kernels)[0].sum()


@pytest.fixture(scope="module")
def traced() -> Any:
    shapes = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32), jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    return jax.jit(jax.grad(loss)).trace(*shapes)


@pytest.fixture(scope="module")
def compiled(traced: Any) -> Any:
    return traced.lower().compile()


def test_products_are_counted_in_every_trip_of_their_loops(traced: Any) -> None:
    # forward, forward again, and the two products of the backward pass
    assert jaxpr_cost.matmul_flops(traced.jaxpr.jaxpr) == 4 * LAYERS * 2 * ROWS * WIDTH * WIDTH


def test_live_bytes_are_the_gradient_and_what_the_backward_pass_keeps(traced: Any) -> None:
    kept, gradient = 4 * LAYERS * ROWS * WIDTH, 4 * LAYERS * WIDTH * WIDTH
    once = 4 * (WIDTH * WIDTH + 4 * ROWS * WIDTH)  # within a trip
    assert gradient + kept <= jaxpr_cost.live_bytes(traced.jaxpr.jaxpr) <= gradient + kept + once


def test_stored_bytes_are_what_the_backward_pass_keeps_and_at_most_what_the_compiler_needs(
    traced: Any, compiled: Any
) -> None:
    stored = jaxpr_cost.stored_bytes(traced.jaxpr.jaxpr)
    gradient = 4 * LAYERS * WIDTH * WIDTH  # stacked by the loop of the backward pass
    assert stored == max(4 * LAYERS * ROWS * WIDTH, gradient)
    assert stored <= compiled.memory_analysis().temp_size_in_bytes + gradient


def test_int4_takes_half_a_byte() -> None:
    jaxpr = jax.make_jaxpr(lambda x: jnp.concatenate([x, x]))(jax.ShapeDtypeStruct((64, 64), jnp.int4))
    assert jaxpr_cost.live_bytes(jaxpr.jaxpr) == 64 * 64


def test_memory_traffic_is_that_of_the_compiler_where_loops_run_once(compiled: Any) -> None:
    once = hlo_cost.traffic(compiled.as_text(), trips=False)
    assert once.memory == pytest.approx(compiled.cost_analysis()["bytes accessed"], rel=0.2)


def test_memory_traffic_is_that_of_every_trip(compiled: Any) -> None:
    traffic = hlo_cost.traffic(compiled.as_text())
    kernels = 4 * LAYERS * WIDTH * WIDTH
    assert traffic.unknown == 0
    # three products read the stack, one writes the gradient; the slices in between may be copies. Counting a whole stack
    # in each trip would give 6 times as much
    assert 4 * kernels < traffic.memory < 4 * 4 * kernels


def test_collectives_are_those_of_a_ring() -> None:
    mesh = sharding.make_mesh({"fsdp": 4}, devices=jax.devices()[:4])
    shape = (LAYERS, WIDTH, WIDTH)
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp", None))
    kernels = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split)
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))

    def forward(kernels: jax.Array, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, None]:
            whole = jax.lax.with_sharding_constraint(kernel, NamedSharding(mesh, PartitionSpec()))
            return jnp.sin(x @ whole), None

        return jax.lax.scan(layer, x, kernels)[0].sum()

    text = jax.jit(forward).lower(kernels, x).compile().as_text()
    sent = hlo_cost.traffic(text).collectives
    assert set(sent) == {"all-gather", "all-reduce"}, re.findall(r"all-\S+\(", text)
    assert sent["all-gather"] == (LAYERS, LAYERS * 4 * WIDTH * WIDTH * 3 // 4)
    assert sent["all-reduce"] == (1, 2 * 4 * 3 // 4)


# One line of each kind as XLA:GPU and the TPU compiler write them: asynchronous collectives, fast memory, loops without
# a trip count. The body runs 8 times; the first all-gather stands twice, under one channel.
TEXT = """
%body (p: (s32[], f32[8,64])) -> (s32[], f32[8,64]) {
  %p = (s32[], f32[8,64]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,64]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %fast = f32[8,64]{1,0:T(8,128)S(1)} add(%x, %x)
  %gathered = s4[16,64]{1,0:T(8,128)E(4)} all-gather(%q), channel_id=3, replica_groups={{0,1},{2,3}}, dimensions={0}
  %again = s4[16,64]{1,0:T(8,128)E(4)S(1)} all-gather(%q), channel_id=3, replica_groups={{0,1},{2,3}}, dimensions={0}
  %start = ((f32[8,64]{1,0}), (f32[4,64]{1,0})) reduce-scatter-start(%x), channel_id=4, replica_groups=mesh['a'=2,'b'=3] {'a'}
  %done = f32[4,64]{1,0} reduce-scatter-done(%start)
  ROOT %t = (s32[], f32[8,64]) tuple(%i, %x)
}

%condition (p.1: (s32[], f32[8,64])) -> pred[] {
  %p.1 = (s32[], f32[8,64]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(8)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: f32[8,64]) -> (s32[], f32[8,64]) {
  %a = f32[8,64]{1,0} parameter(0)
  %init = (s32[], f32[8,64]{1,0}) tuple(%zero, %a)
  ROOT %loop = (s32[], f32[8,64]{1,0}) while(%init), condition=%condition, body=%body
}
"""


def test_a_compilers_text_is_read_with_its_channels_memories_and_loops() -> None:
    found = hlo_cost.traffic(TEXT)
    assert found.unknown == 0
    assert found.collectives == {
        "all-gather": (8, 8 * (16 * 64 // 2) // 2),
        "reduce-scatter": (8, 8 * (4 * 4 * 64 * 2) // 2),
    }
    once = hlo_cost.traffic(TEXT, trips=False)
    added, gathered, scattered, compared = 2 * 4 * 8 * 64, 16 * 64 // 2, 4 * (8 + 4) * 64, 4 + 4 + 1
    assert once.memory == added + gathered + scattered + compared


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[2,4]<=[8]", 4),
        ("mesh['axis_0'=1,'axis_1'=2,'axis_2'=4], device_ids=([2,2,2]T(1,0,2)) {'axis_1'}", 2),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("mesh['a'=8] {'a':(2)4}", 4),
    ],
)
def test_the_devices_of_a_collective_are_read_in_every_notation(groups: str, devices: int) -> None:
    text = TEXT.replace("mesh['a'=2,'b'=3] {'a'}", groups)
    sent = 4 * 4 * 64 * devices * (devices - 1) // devices
    assert hlo_cost.traffic(text).collectives["reduce-scatter"] == (8, 8 * sent)


# One expert's codes, read out of a stack inside of a fusion of the TPU compiler, which first names the stack anew.
SLICED = """
%named (p: s4[128,64,64]) -> s4[128,64,64] {
  %p = s4[128,64,64]{2,1,0:T(64,128)(8,1)E(4)} parameter(0)
  ROOT %copy = s4[128,64,64]{2,1,0:T(8,128)(8,1)E(4)} copy(%p)
}

%decoded (codes: s4[128,64,64], i: s32[]) -> bf16[1,64,64] {
  %codes = s4[128,64,64]{2,1,0:T(64,128)(8,1)E(4)} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  %all = s4[128,64,64]{2,1,0:T(8,128)(8,1)E(4)} fusion(%codes), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%named
  %one = s4[1,64,64]{2,1,0:T(8,128)(8,1)E(4)} dynamic-slice(%all, %i, %i, %i), dynamic_slice_sizes={1,64,64}
  ROOT %wide = bf16[1,64,64]{2,1,0:T(8,128)(2,1)} convert(%one)
}

ENTRY %main (a: s4[128,64,64], b: s32[]) -> bf16[1,64,64] {
  %a = s4[128,64,64]{2,1,0:T(64,128)(8,1)E(4)} parameter(0)
  %b = s32[]{:T(128)S(6)} parameter(1)
  ROOT %out = bf16[1,64,64]{2,1,0:T(8,128)(2,1)} fusion(%a, %b), kind=kOutput, calls=%decoded
}
"""


def test_of_a_stack_only_the_slice_is_read() -> None:
    assert hlo_cost.traffic(SLICED).memory == 64 * 64 // 2 + 2 * 64 * 64


def test_the_bits_of_a_dtype() -> None:
    expected = {"int4": 4, "bfloat16": 16, "float32": 32, "uint8": 8, "bool": 8}
    assert {name: jaxpr_cost.bits(jnp.dtype(name)) for name in expected} == expected
