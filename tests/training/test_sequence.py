"""The length of sequences split over devices (mesh.sequence). That training is the same: methods/test_contract.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tests.tiny as tiny
from peftjax import adapters, methods, sharding
from peftjax.core import variables
from peftjax.core.errors import UserError
from peftjax.data.config import DataConfig
from peftjax.models import from_hf_config
from peftjax.tasks import TaskConfig, make_task
from peftjax.totals import chunked_cross_entropy, next_token_loss
from tests.models import test_bert, test_t5


@pytest.mark.parametrize(("length", "chunk"), [(12, 5), (16, 4), (12, 3)])
def test_the_loss_of_chunks_is_the_same_and_each_device_has_its_share_of_every_chunk(length: int, chunk: int) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, head = jax.random.normal(keys[0], (2, length, 8)), jax.random.normal(keys[1], (8, 24))
    targets = jax.random.randint(keys[2], (2, length), 0, 24)
    weights = jax.random.uniform(keys[3], (2, length))
    shapes = []

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        def logits(part: jax.Array) -> jax.Array:
            shapes.append(part.shape)
            return part @ head

        return chunked_cross_entropy(logits, hidden, targets, weights, chunk).loss

    expected = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, head)
    with jax.set_mesh(sharding.make_mesh({"sequence": 4})):
        shapes.clear()
        found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, head)
    assert {shape[1] % 4 for shape in shapes} == {0}
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6), found, expected)


TEXTS = {"tokens": tiny.tokens(shape=(2, 12)), "mask": jnp.arange(12)[None] < jnp.array([[12], [7]])}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "given"),
    [
        (test_t5.CONFIG, TEXTS | {"decoder_tokens": tiny.tokens(1, (2, 8))}),
        (test_bert.CONFIG | test_bert.CLASSIFIER, TEXTS | {"token_types": jnp.arange(24).reshape(2, 12) % 2}),
    ],
    ids=["t5", "bert"],
)
def test_encoders_and_decoders_compute_the_same(config: dict[str, Any], given: dict[str, jax.Array]) -> None:
    model, mesh = tiny.make(from_hf_config(config)), sharding.make_mesh({"sequence": 4, "tensor": 2})
    expected = model(**given)
    sharding.place(model, mesh)
    graph, leaves = variables.flat(model)
    with jax.set_mesh(mesh):
        rows = sharding.shard_batch({name: np.asarray(array) for name, array in given.items()}, mesh)
        assert not any(array.sharding.is_fully_replicated for array in rows.values())
        found = jax.jit(lambda values, rows: variables.join(graph, values)(**rows))(
            {path: leaf.get_value() for path, leaf in leaves.items()}, {name: array[0] for name, array in rows.items()}
        )
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.slow
def test_each_device_holds_its_part_of_the_activations_and_of_the_weights() -> None:
    def memory(parts: int) -> tuple[int, int]:
        """Bytes on a device: of the arguments of a step's gradient, and of what it needs in between."""
        mesh = sharding.make_mesh({"sequence": parts})
        model = tiny.model(remat="block", max_position_embeddings=512, hidden_size=64, intermediate_size=128)
        adapters.attach(model, methods.Lora(rank=4), rngs=nnx.Rngs(0))
        sharding.place(model, mesh)
        graph, trainable, frozen = variables.split_by_kind(model)
        loss: Callable = lambda trained, batch: (  # noqa: E731
            next_token_loss(variables.join(graph, trained, frozen), batch, 128).loss
        )
        with jax.set_mesh(mesh):
            batch = {name: np.asarray(array) for name, array in tiny.batch(shape=(2, 512)).items()}
            batch = {name: array[0] for name, array in sharding.shard_batch(batch, mesh).items()}
            used = jax.jit(jax.grad(loss)).lower(trainable, batch).compile().memory_analysis()
        return used.argument_size_in_bytes, used.temp_size_in_bytes

    one, split = memory(1), memory(4)
    assert split[0] < 0.5 * one[0]
    assert split[1] < 0.5 * one[1]


def test_a_length_that_the_mesh_does_not_divide_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny.VIT))
    model = adapters.attach(tiny.model(), methods.PromptTuning(tokens=3), rngs=nnx.Rngs(0))
    mesh = sharding.make_mesh({"sequence": 2})
    task = make_task(TaskConfig(), DataConfig(max_length=20), tmp_path)
    with pytest.raises(
        UserError,
        match=r"data\.max_length=20 and 3 virtual tokens: 23 positions are not a multiple of mesh\.sequence=2",
    ):
        task.check_lengths(model, mesh)
    task.check_lengths(adapters.detach(model), mesh)
    task = make_task(TaskConfig(), DataConfig(max_length=65), tmp_path)
    with pytest.raises(UserError, match=r"data\.max_length=65 exceeds the model's 64 positions"):
        task.check_lengths(model, mesh)
    images = make_task(TaskConfig(kind="image_classification", labels=("a", "b")), DataConfig(), tmp_path)
    with pytest.raises(UserError, match=r"patches and the class token: 5 positions are not a multiple of mesh\.seq"):
        images.check_lengths(tiny.make(from_hf_config(tiny.VIT)), mesh)
