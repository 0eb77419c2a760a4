"""Merging where a model lies on several devices. That what is merged computes the same: test_contract.py."""

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import tests.tiny as tiny
from peftjax import adapters, methods, sharding
from peftjax.core import variables
from peftjax.core.errors import UserError
from peftjax.core.host_arrays import OnHost
from peftjax.methods.lora.adapter import LoraLinear
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


def test_updates_are_computed_in_the_highest_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """As GPUs and TPUs do not by default; a CPU shows no difference."""
    compute, precisions = LoraLinear.delta, set()

    def watched(adapter: LoraLinear) -> jax.Array:
        precisions.add(jax.config.jax_default_matmul_precision)
        return compute(adapter)

    monkeypatch.setattr(LoraLinear, "delta", watched)
    adapters.merge(adapters.attach(tiny.model(), methods.Lora(rank=2, targets=("q_proj",)), rngs=nnx.Rngs(0)))
    assert precisions == {"highest"}


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


def test_a_merged_adapter_cannot_be_activated_as_well() -> None:
    model = adapters.attach(with_lora(""), methods.Lora(rank=2), "other", rngs=nnx.Rngs(1))
    merged = adapters.merge(model, "default")
    expected = merged(tiny.tokens())
    for names in ("default", ("other", "default")):
        with pytest.raises(UserError, match="'default' is merged into the base, and would be applied twice; undo"):
            adapters.use(merged, names)
    np.testing.assert_array_equal(merged(tiny.tokens()), expected)
    adapters.use(adapters.unmerge(merged, "default"), ("other", "default"))


def test_a_merge_inside_jit_is_refused() -> None:
    model = adapters.attach(tiny.model(), methods.Lora(rank=2), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="merge: a model cannot be merged inside a transformed function"):
        nnx.jit(lambda model: adapters.merge(model)(tiny.tokens()))(model)


@pytest.mark.slow
def test_a_model_is_copied_and_pickled_with_its_adapters() -> None:
    model = with_lora("nf4")
    expected = model(tiny.tokens())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        np.testing.assert_array_equal(other(tiny.tokens()), expected)
        assert adapters.attached(other) == adapters.attached(model)
        adapters.use(other, None)
        np.testing.assert_array_equal(model(tiny.tokens()), expected)
    merged = adapters.merge(model)
    for other in (copy.deepcopy(merged), pickle.loads(pickle.dumps(merged))):
        np.testing.assert_array_equal(other(tiny.tokens()), merged(tiny.tokens()))
        np.testing.assert_array_equal(adapters.unmerge(other)(tiny.tokens()), expected)


def test_threads_answer_with_different_adapters_of_one_model() -> None:
    model = tiny.randomize(adapters.attach(with_lora(""), methods.Lora(rank=2), "other", rngs=nnx.Rngs(1)), scale=0.05)
    parts, expected = [], []
    for name in ("default", "other", None):
        parts.append(nnx.split(adapters.use(model, name)))
        expected.append(np.asarray(model(tiny.tokens())))
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda index: nnx.merge(*parts[index % 3])(tiny.tokens()), range(12)))
    for index, answer in enumerate(answers):
        np.testing.assert_array_equal(answer, expected[index % 3])
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
