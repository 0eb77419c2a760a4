"""Merging where a model lies on several devices. That what is merged computes the same: test_contract.py."""

import gc
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import tests.tiny as tiny
from peftjax import adapters, methods, sharding
from peftjax.core import variables
from peftjax.core.distributed import OnHost
from peftjax.report.data import tree_bytes

EMBED, MLP = 256, 512


def with_lora(format_: str) -> Any:
    model = tiny.model(hidden_size=EMBED, intermediate_size=MLP)
    model = adapters.attach(tiny.quantized(model) if format_ else model, methods.Lora(rank=4), rngs=nnx.Rngs(0))
    return tiny.randomize(model, scale=0.02)


def base(model: Any) -> dict[str, Any]:
    return {path: leaf.get_value() for path, leaf in variables.flat(model)[1].items() if type(leaf) is nnx.Param}


def shardings(model: Any) -> dict[str, Any]:
    return {path: jax.tree.map(lambda leaf: leaf.sharding, value) for path, value in base(model).items()}


@pytest.mark.slow
@pytest.mark.parametrize("format_", ["", "nf4"])
def test_every_kernel_stays_split_over_the_devices_and_none_is_ever_whole_on_one(
    format_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = base(adapters.merge(with_lora(format_)))
    model, mesh, seen = with_lora(format_), sharding.make_mesh({"fsdp": 4, "tensor": 2}), []
    sharding.place(model, mesh)
    bits, before = tiny.bits(model), shardings(model)
    gc.collect()
    held = tiny.on_a_device()

    def watched(kept: OnHost, array: jax.Array) -> None:
        seen.append(tiny.on_a_device() - held)
        keep(kept, array)

    keep = OnHost.__init__
    monkeypatch.setattr(OnHost, "__init__", watched)
    adapters.merge(model)
    for path, value in base(model).items():
        np.testing.assert_allclose(value, expected[path], atol=1e-5, err_msg=path)
    kernels = {path: tree_bytes(value) / 8 for path, value in base(model).items() if path.startswith("blocks.")}
    assert max(seen) < 1.1 * (sum(kernels.values()) if format_ else max(kernels.values()))
    assert format_ or shardings(model) == before

    adapters.unmerge(model)
    assert (tiny.bits(model), shardings(model)) == (bits, before)
