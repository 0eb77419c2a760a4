"""The mesh, and the one table from logical axes to mesh axes."""

import dataclasses
import itertools
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from peftjax import sharding
from peftjax.core.errors import UserError
from peftjax.nn.embedding import Embedding
from peftjax.quant import nf4
from peftjax.quant.matmul import matmul
from peftjax.train import train
from peftjax.training import config as configs
from tests.runs import free_port


def test_a_mesh_of_one_device_is_the_default() -> None:
    assert sharding.make_mesh().size == 1


def test_minus_one_takes_the_devices_that_are_left() -> None:
    assert dict(sharding.make_mesh({"data": 2, "fsdp": -1}).shape) == {"data": 2, "fsdp": 4, "sequence": 1, "tensor": 1}


def test_minus_one_must_leave_no_device_unused() -> None:
    with pytest.raises(ValueError, match=r"mesh\.fsdp=-1 cannot use all 8 devices: the other axes take 3"):
        sharding.make_mesh({"data": 3, "fsdp": -1})
    with pytest.raises(ValueError, match=r"needs 9 devices, but this machine has 8"):
        sharding.make_mesh({"data": 9, "fsdp": -1})


def test_a_mesh_larger_than_the_machine_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"mesh data=4, fsdp=4, sequence=1, tensor=1 needs 16 devices, but this machine has 8"
    ):
        sharding.make_mesh({"data": 4, "fsdp": 4})


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("layers", "embed", "mlp"), (3, 32, 40), PartitionSpec(None, ("fsdp",), ("tensor",))),
        (("embed", "vocab"), (32, 49), PartitionSpec(("fsdp",), None)),  # 49 is not divisible
        (("batch", "length"), (8, 16), PartitionSpec(("data", "fsdp"), None)),
        (("embed", "embed"), (32, 32), PartitionSpec(("fsdp",), None)),  # a mesh axis splits one dimension
        (("rank", "mlp"), (4, 40), PartitionSpec(("fsdp",), ("tensor",))),
        (("block", None), (4, 4), PartitionSpec(None, None)),
    ],
)
def test_the_table_says_how_an_array_is_split(axes: tuple, shape: tuple, expected: PartitionSpec) -> None:
    assert sharding.partition(axes, shape, sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})) == expected


def test_a_constraint_holds_on_the_mesh_in_force_and_is_nothing_without_one() -> None:
    x = jnp.ones((8, 4))
    assert sharding.constrain(x, "batch", None) is x
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
    with jax.set_mesh(mesh):
        placed = jax.jit(lambda x: sharding.constrain(x, "batch", None))(x)
    assert placed.sharding.shard_shape(x.shape) == (1, 4)


def test_a_quantized_kernel_is_gathered_as_codes_where_the_batch_is_split_and_stays_split_by_tensor() -> None:
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    kernel = nf4.quantize(jax.random.normal(jax.random.key(0), (256, 8)))
    kernel = jax.device_put(kernel, sharding.placement(kernel, ("embed", "mlp"), mesh))
    x = jax.device_put(jnp.ones((8, 256)), sharding.spec(("batch", None), (8, 256), mesh))
    with jax.set_mesh(mesh):
        product = jax.jit(lambda x, kernel: matmul(x, sharding.gathered(kernel, ("embed", "mlp")))).lower(x, kernel)
        program = product.compile().as_text()
    sent = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather", program)
    assert {shape for _, shape in sent} == {"4,64,4", "4,4"}  # [in/64, 64, out / 2] codes and [in/64, out / 2] absmax
    assert {dtype for dtype, _ in sent} <= {"s8", "u8"}  # a CPU's program has int4 as int8


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "sequence": 2, "tensor": 2}])
def test_no_device_gets_the_embedded_rows_of_the_whole_batch(sizes: dict[str, int]) -> None:
    mesh = sharding.make_mesh(sizes)
    embedding = Embedding(512, 64, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    table = embedding.embedding.get_value()
    tokens = np.random.default_rng(0).integers(0, 512, (8, 32))  # fewer than rows of the table, which would be gathered

    @jax.jit
    def look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
        return sharding.constrain(embedding.lookup(tokens, table), "batch", "length", None)

    placed = jax.device_put(table, sharding.spec(("vocab", "embed"), table.shape, mesh))
    split = jax.device_put(tokens, sharding.spec(("batch", "length"), tokens.shape, mesh))
    with jax.set_mesh(mesh):
        program = look_up.lower(placed, split).compile().as_text()
        np.testing.assert_array_equal(look_up(placed, split), table[tokens])
    assert not re.findall(r"= f32\[[\d,]+\]\S* all-gather", program)


def test_codes_and_absmax_of_a_kernel_are_split_alike_on_any_mesh() -> None:
    meshes = [sharding.make_mesh({"fsdp": fsdp, "tensor": 8 // fsdp}) for fsdp in (1, 2, 4, 8)]
    for inputs, outputs in itertools.product((64, 128, 192, 320, 512, 96), (4, 6, 12, 64)):  # 96: no whole blocks
        for nested in (False, True):
            kernel = jax.eval_shape(
                partial(nf4.quantize, nested=nested), jax.ShapeDtypeStruct((inputs, outputs), jnp.float32)
            )
            for mesh, axes in itertools.product(meshes, (("embed", "mlp"), ("mlp", "embed"), ("heads", "embed"))):
                codes, absmax, *scales = jax.tree.leaves(sharding.placement(kernel, axes, mesh))
                blocks = tuple(codes.spec)
                assert tuple(absmax.spec) == (blocks[::2] if len(blocks) == 3 else blocks), (
                    inputs,
                    outputs,
                    mesh,
                    axes,
                )
                assert all(scale.is_fully_replicated for scale in scales)


def test_what_the_mesh_does_not_divide_is_told_with_what_a_device_holds_more_of_it() -> None:
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    kernel = jax.ShapeDtypeStruct((192, 8), jnp.float32)
    leaves = {
        "even": nnx.Param(kernel, axes=("embed", "mlp")),
        "odd": nnx.Param(jax.ShapeDtypeStruct((192, 7), jnp.float32), axes=("embed", "mlp")),
        "blocks": nnx.Param(jax.eval_shape(nf4.quantize, kernel), axes=("embed", "mlp")),  # 3 blocks on 4 devices
        "norm": nnx.Param(jax.ShapeDtypeStruct((7,), jnp.float32), axes=(None,)),
    }
    assert sharding.undivided(leaves, mesh) == {"odd": 1 / 4 - 1 / 8, "blocks": 1 / 2 - 1 / 8}


def test_members_of_a_population_take_over_what_divides_both_their_number_and_the_data_axis() -> None:
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
    assert sharding.split_members(mesh, 3) is mesh
    split = sharding.split_members(mesh, 6)
    assert dict(split.shape) == {"members": 2, "data": 2, "fsdp": 2, "sequence": 1, "tensor": 1}
    assert list(split.devices.flat) == list(mesh.devices.flat)
    with jax.set_mesh(split):
        assert (sharding.members_axis(4), sharding.members_axis(3)) == ("members", None)


def test_processes_that_split_only_features_or_members_share_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device(NamedTuple):
        process_index: int

    def shares(sizes: dict[str, int], local: int) -> list[tuple[int, tuple[int, ...]]]:
        devices = np.empty(8, object)
        devices[:] = [Device(index // local) for index in range(8)]
        shape = {"members": 1, "data": 1, "fsdp": 1, "sequence": 1, "tensor": 1} | sizes
        mesh = SimpleNamespace(shape=shape, devices=devices.reshape(*shape.values()))
        found = []
        for process in range(8 // local):
            monkeypatch.setattr(jax, "process_index", lambda process=process: process)
            share = sharding.batch_share(mesh)
            found.append((share["parts"], share["own"]))
        return found

    assert shares({"data": 4, "fsdp": 2}, local=2) == [(8, (0, 1)), (8, (2, 3)), (8, (4, 5)), (8, (6, 7))]
    assert shares({"data": 2, "tensor": 4}, local=2) == [(2, (0,)), (2, (0,)), (2, (1,)), (2, (1,))]
    assert shares({"tensor": 8}, local=4) == [(1, (0,)), (1, (0,))]
    assert shares({"data": 2, "sequence": 2, "tensor": 2}, local=2) == [(2, (0,)), (2, (0,)), (2, (1,)), (2, (1,))]
    assert shares({"members": 2, "data": 2, "tensor": 2}, local=2) == [(2, (0,)), (2, (1,)), (2, (0,)), (2, (1,))]
    assert shares({"members": 4, "fsdp": 2}, local=2) == [(1, (0,))] * 4


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a TPU device tells about its place."""

    id: int
    coords: tuple[int, int, int]
    process_index: int
    slice_index: int = 0
    device_kind: str = "TPU v5 lite"
    platform: str = "tpu"
    core_on_chip: int = 0


def tpu(monkeypatch: pytest.MonkeyPatch, width: int, height: int, slices: int = 1) -> list[Chip]:
    """Slices of width x height chips, with four of them, 2x2, on each host."""
    places = [(index, x, y) for index in range(slices) for y in range(height) for x in range(width)]
    chips = []
    for number, (index, x, y) in enumerate(places):
        host = index * width * height // 4 + y // 2 * (width // 2) + x // 2
        chips.append(Chip(number, (x, y, 0), host, index))
    monkeypatch.setattr(jax, "devices", lambda: chips)
    monkeypatch.setattr(jax, "process_count", lambda: len(chips) // 4)
    return chips


def hops(axis: list[Chip]) -> list[int]:
    """Links between neighbors on a mesh axis."""
    return [
        sum(abs(a - b) for a, b in zip(one.coords, two.coords, strict=True)) for one, two in itertools.pairwise(axis)
    ]


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": -1},
        {"fsdp": -1},
        {"fsdp": 4, "tensor": 4},
        {"data": 2, "fsdp": 2, "tensor": 4},
        {"data": 4, "sequence": 4},
    ],
)
def test_neighbors_on_the_axes_of_a_tpu_mesh_are_linked(sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    chips = tpu(monkeypatch, 4, 4)
    for mesh in (sharding.make_mesh(sizes), sharding.make_mesh(sizes, chips)):
        assert set(mesh.devices.flat) == set(chips)
        widest = [axis for axis, size in mesh.shape.items() if size >= 4]
        for axis in widest:
            lines = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), -1).reshape(-1, mesh.shape[axis])
            assert all(set(hops(line)) == {1} for line in lines)


@pytest.mark.parametrize(
    ("sizes", "parts", "own"),
    [
        ({"data": 16}, 16, [(0, 1, 6, 15), (2, 3, 4, 5), (7, 12, 13, 14), (8, 9, 10, 11)]),  # a ring
        ({"fsdp": 4, "tensor": 4}, 4, [(0, 1), (0, 1), (2, 3), (2, 3)]),
        ({"tensor": 16}, 1, [(0,)] * 4),
    ],
)
def test_a_process_loads_the_rows_of_its_chips_wherever_they_are_in_the_mesh(
    sizes: dict[str, int], parts: int, own: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tpu(monkeypatch, 4, 4)
    mesh = sharding.make_mesh(sizes)
    for process, rows in enumerate(own):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert sharding.batch_share(mesh) == {"parts": parts, "own": rows}


@pytest.mark.parametrize("width", [2, 4])
def test_only_data_and_fsdp_cross_between_tpu_slices(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chips = tpu(monkeypatch, width, width, slices=4)
    for sizes in (
        {"data": 4, "tensor": -1},
        {"fsdp": 8, "tensor": -1},
        {"data": 2, "fsdp": -1},
        {"data": 2, "fsdp": 2, "tensor": -1},
    ):
        mesh = sharding.make_mesh(sizes)
        assert set(mesh.devices.flat) == set(chips)
        slices = np.vectorize(lambda chip: chip.slice_index, otypes=[int])(mesh.devices)
        across = math.gcd(mesh.shape["data"], 4)
        blocks = slices.reshape(across, mesh.shape["data"] // across, 4 // across, -1)
        assert blocks[:, 0, :, 0].ravel().tolist() == [0, 1, 2, 3]
        assert (blocks == blocks[:, :1, :, :1]).all()
        if mesh.shape["tensor"] == width:
            assert all(set(hops(line)) == {1} for line in mesh.devices.reshape(-1, width))
    for sizes in ({"tensor": -1}, {"data": 2, "sequence": -1}):
        with pytest.raises(UserError, match=r"on 4 TPU slices: data x fsdp must be a multiple of 4.* use mesh\.data=4"):
            sharding.make_mesh(sizes)


def test_a_few_chips_and_chips_that_fill_no_box_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    chips = tpu(monkeypatch, 4, 4)
    assert list(sharding.make_mesh({"data": 15}, chips[:15]).devices.flat) == chips[:15]
    chips = tpu(monkeypatch, 2, 4)
    assert list(sharding.make_mesh({"data": 2, "tensor": 4}).devices.flat) == chips


@pytest.mark.parametrize("tensor", [2, 10, 20, 28])
def test_a_tpu_slice_of_any_size_can_have_any_mesh_that_fits(tensor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chips = tpu(monkeypatch, 4, 28 if tensor == 28 else 20)
    mesh = sharding.make_mesh({"data": 2, "fsdp": -1, "tensor": tensor})
    assert set(mesh.devices.flat) == set(chips)


def test_gpus_are_grouped_by_host(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [Chip(index, (0, 0, 0), 3 - index, platform="gpu", device_kind="H100") for index in range(4)]
    monkeypatch.setattr(jax, "devices", lambda: gpus)
    assert (
        list(sharding.make_mesh({"data": 2, "tensor": 2}).devices.flat) == gpus[::-1]
    )  # in the order of the processes
    hosts = [dataclasses.replace(gpu, slice_index=gpu.process_index % 2) for gpu in gpus]
    monkeypatch.setattr(jax, "devices", lambda: hosts)
    assert [gpu.process_index for gpu in sharding.make_mesh({"data": 2, "tensor": 2}).devices.flat] == [0, 2, 1, 3]


PLACED = """
import sys
import jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
from peftjax import sharding
from peftjax.data.batches import Batching
first, second, third, fourth = sharding.make_mesh({"data": 4}).devices.flat
assert (first.process_index, second.process_index, third.process_index) == (0, 0, 1)
batch = np.arange(16 * 6).reshape(16, 6)
for sizes in ({"data": 4}, {"data": 2, "sequence": 2}):
    for devices in ([first, third, fourth, second], [third, first, second, fourth], [first, second, third, fourth]):
        mesh = sharding.make_mesh(sizes, devices)
        own = batch[Batching(16, 2, **sharding.batch_share(mesh)).own_rows()]
        placed = sharding.shard_batch({"tokens": own}, mesh, 2)["tokens"]
        assert placed.shape == (2, 8, 6)
        for shard in placed.addressable_shards:
            np.testing.assert_array_equal(shard.data, batch.reshape(2, 8, 6)[shard.index])
"""


@pytest.mark.slow
def test_every_device_gets_its_rows_in_any_order_of_the_devices() -> None:
    address = f"127.0.0.1:{free_port()}"
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    commands = [[sys.executable, "-c", PLACED, address, str(i)] for i in range(2)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) for command in commands]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


def test_processes_that_cannot_share_a_microbatch_evenly_are_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding.batch, "batch_share", lambda mesh: {"parts": 2, "own": (0,)})
    config = configs.changed(configs.Config(), {"mesh.fsdp": 8, "train.batch_size": 16, "train.accumulate": 4})
    message = (
        r"a batch of 4 rows on data x fsdp = 8 devices of several processes: train\.batch_size / train\.accumulate must"
    )
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
