"""Devices by name, and the meshes that they can have."""

import os
import subprocess
import sys

import pytest

from peftjax.core.errors import UserError
from peftjax.plan import chips, devices


@pytest.mark.parametrize(
    ("name", "full", "count", "platform"),
    [
        ("v5e", "v5e:1x1", 1, "tpu"),
        ("v5e:4x4", "v5e:4x4", 16, "tpu"),
        ("V5P:2x2x4", "v5p:2x2x4", 16, "tpu"),
        ("a100-80gb", "a100-80gb", 1, "cuda"),
        ("h100:8", "h100:8", 8, "cuda"),
        ("cpu:4", "cpu:4", 4, "cpu"),
    ],
)
def test_a_device_is_found_by_its_name(name: str, full: str, count: int, platform: str) -> None:
    device = devices.find(name)
    assert (device.name, device.count, device.platform) == (full, count, platform)
    assert devices.find(full) == device


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a600", "Did you mean 'a6000'"),
        ("tpu", "rtx4090"),  # the list of all
        ("v5e:3x3", "v5e comes in 1x1, 2x2, 2x4, 4x4"),
        ("v5p:4x4", "2x2x4"),
        ("h100:9", "from 1 to 8"),
        ("h100:many", "from 1 to 8"),
        ("cpu:0", "from 1 to 256"),
    ],
)
def test_an_unknown_device_is_refused_with_what_there_is(name: str, told: str) -> None:
    with pytest.raises(UserError, match=rf"--device={name}: .*{told}"):
        devices.find(name)


def test_a_mesh_takes_all_devices_or_is_refused() -> None:
    device = devices.find("h100:8")
    assert device.mesh_shape({"data": 2, "fsdp": -1, "tensor": 1}) == {"data": 2, "fsdp": 4, "sequence": 1, "tensor": 1}
    for sizes in ({"data": 1, "fsdp": 1, "tensor": 1}, {"data": 3, "fsdp": -1, "tensor": 1}):
        with pytest.raises(UserError, match=r"h100:8 is 8 devices.*mesh\.fsdp=-1"):
            device.mesh_shape(sizes)


def test_every_chip_says_what_a_roofline_needs() -> None:
    for name, chip in chips.CHIPS.items():
        assert 15 * chips.GIB < chip.memory < 141 * chips.GIB, name
        assert chip.links < chip.bandwidth < chip.flops, name
        assert (chip.gpu is None) == bool(chip.shapes), name


LINKS = """
import itertools, sys
from peftjax.plan import devices
mesh = devices.find(sys.argv[1]).mesh({"fsdp": 4, "tensor": -1})
for lines in (mesh.devices[0, :, 0].T, mesh.devices[0, :, 0]):
    for line in lines:
        for one, two in itertools.pairwise(line):
            assert sum(abs(a - b) for a, b in zip(one.coords, two.coords)) == 1, mesh
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:4x4", "v6e:4x4"])
def test_neighbors_in_a_mesh_of_a_tpu_topology_are_linked(name: str) -> None:
    device = devices.find(name)
    if missing := device.missing():
        pytest.skip(missing)
    command = [sys.executable, "-c", LINKS, name]
    ended = subprocess.run(command, env=os.environ | device.environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
