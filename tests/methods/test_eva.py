"""EVA: what is found in the inputs of layers, where the ranks go, and what is attached then."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tests.tiny as tiny
from peftjax import adapters, sharding
from peftjax.adapters.sites import adapters_named
from peftjax.io.adapter_load import load_adapter
from peftjax.io.adapter_save import save_adapter
from peftjax.methods import Lora
from peftjax.methods.lora.eva import Memory, redistribute, remember

E, L = 32, 3  # embed, layers


def batches(count: int = 2) -> list[dict[str, Any]]:
    return [tiny.batch(seed, (4, 16)) for seed in range(count)]


def attached(model: Any = None, **options: Any) -> Any:
    options = {"rank": 4, "init": "eva", "targets": ("q_proj", "down_proj", "embed_tokens")} | options
    return adapters.attach(model or tiny.model(), Lora(**options), rngs=nnx.Rngs(0), batches=batches())


def test_the_memory_of_many_batches_is_the_principal_components_of_all_their_rows() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(90, 10)) * 0.5 ** np.arange(10) + 3 * rng.normal(size=10)
    rows = rows.astype(np.float32)
    memory = Memory(jnp.zeros((4, 10)), jnp.zeros(10), jnp.zeros(()), jnp.zeros(()))
    counts = np.ones(90)
    counts[[3, 40, 77]] = 0
    for part in range(3):
        here = slice(30 * part, 30 * part + 30)
        memory = remember(memory, jnp.asarray(rows[here]).reshape(5, 6, 10), jnp.asarray(counts[here]).reshape(5, 6))
    kept = rows[counts > 0]
    _, values, vectors = np.linalg.svd(kept - kept.mean(0), full_matrices=False)
    np.testing.assert_allclose(memory.mean, kept.mean(0), rtol=1e-5)
    np.testing.assert_allclose(memory.spread, np.square(kept - kept.mean(0)).sum(), rtol=1e-5)
    basis = np.asarray(memory.basis)
    np.testing.assert_allclose(
        basis[:2].T @ basis[:2], (vectors[:2].T * values[:2] ** 2) @ vectors[:2], rtol=0, atol=0.1
    )
    np.testing.assert_allclose(np.linalg.norm(basis, axis=1), values[:4], rtol=1e-2)
    assert float(memory.seen) == 87


def test_ranks_go_where_most_is_explained_and_their_sum_stays() -> None:
    explained = {
        "a": np.array([0.5, 0.3, 0.2, 0.1]),
        "b": np.array([0.05, 0.04, 0.03, 0.02]),
        "c": np.array([0.9, 0.01]),
    }
    assert redistribute(explained, {"a": 2, "b": 2, "c": 1}) == {"a": 4, "b": 0, "c": 1}


def test_it_starts_as_the_base_with_orthonormal_rows_and_ranks_that_move(tmp_path: Path) -> None:
    model = attached()
    np.testing.assert_array_equal(model(tiny.tokens()), tiny.model()(tiny.tokens()))
    method = adapters.attached(model)["default"]
    ranks, names = [], []
    for site, adapter in adapters_named(model, "default"):
        if site.path == "embed":
            assert adapter.ranks == (4,)
            continue
        for layer, rank in enumerate(adapter.ranks):
            a = np.asarray(adapter.a.get_value())[layer]
            np.testing.assert_allclose(a[:, :rank].T @ a[:, :rank], np.eye(rank), atol=1e-3)
            assert not a[:, rank:].any()
            np.testing.assert_allclose(adapter.scale.get_value()[layer, :rank], 8 / 4)
            ranks.append(rank)
            names += [site.names[layer]] if rank else []
    assert sum(ranks) == 2 * L * 4
    assert len(set(ranks)) > 1
    assert max(ranks) <= 8
    assert set(method.targets) == {*names, "model.embed_tokens"}
    model = tiny.randomize(model)
    back = load_adapter(tiny.model(), save_adapter(model, tmp_path / "adapter"))
    np.testing.assert_array_equal(back(tiny.tokens()), model(tiny.tokens()))


@pytest.mark.slow
def test_with_rho_1_the_method_stays_and_sharded_batches_give_the_same_directions() -> None:
    method = Lora(rank=4, alpha=8, init="eva", eva_rho=1.0, targets=("q_proj",))
    one = adapters.attach(tiny.model(), method, rngs=nnx.Rngs(0), batches=batches())
    assert adapters.attached(one)["default"] == method
    mesh, model = sharding.make_mesh({"fsdp": 2, "tensor": 2}), tiny.model()
    sharding.place(model, mesh)
    shown = [sharding.shard_batch({key: np.asarray(x) for key, x in batch.items()}, mesh) for batch in batches()]
    shown = [{key: value[0] for key, value in batch.items()} for batch in shown]
    adapters.attach(model, method, rngs=nnx.Rngs(0), batches=shown)
    expected, found = (np.asarray(each.blocks.attention.query.adapters.default.a.get_value()) for each in (one, model))
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"init": "eva"}, None, r"attach: lora is initialized from data; pass batches=\[...\]"),
        ({}, batches(1), "attach: lora with these options is not initialized from data; leave out batches="),
        (
            {"init": "eva", "eva_rho": 0.5},
            batches(1),
            r"method.eva_rho must be at least 1, which keeps the ranks, got 0.5",
        ),
        ({"init": "eva"}, [tiny.tokens()], "needs batches .* got "),
        (
            {"init": "eva"},
            [],
            "only 0 tokens with a loss reached model.layers.0.self_attn.k_proj, fewer than the 16 directions",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_the_model_alone(options: Any, given: Any, message: str) -> None:
    model = tiny.model()
    with pytest.raises(ValueError, match=message):
        adapters.attach(model, Lora(**options), rngs=nnx.Rngs(0), batches=given)
    assert nnx.split(model)[0] == nnx.split(tiny.model())[0]
