"""Foreign NNX models with slots: they compute what they did, and methods sit in them as in ours."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from peftjax import adapters, sharding
from peftjax.adapters import wrap_optimizer
from peftjax.core import variables
from peftjax.core.errors import UserError
from peftjax.core.variables import trainable_mask
from peftjax.io.adapter_load import load_adapter
from peftjax.io.adapter_save import save_adapter
from peftjax.losses import training_view
from peftjax.methods import Houlsby, Hra, Ia3, LoHa, Lora, PrefixTuning, PromptTuning, TrainableTokens, Vera
from peftjax.nn.adopt import adopt
from peftjax.totals import Totals
from peftjax.training.step import Objective, init_state, make_train_step
from tests import tiny


class Classifier(nnx.Module):
    """Tokens to classes, made of every layer that can be adopted."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(20, 12, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(3, 12, 12, decode=False, rngs=rngs)
        self.general = nnx.LinearGeneral((3, 4), (2, 6), axis=(-2, -1), rngs=rngs)
        self.einsum = nnx.Einsum("btnh,nhd->btd", (2, 6, 12), (12,), rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(12, 12, rngs=rngs), nnx.Linear(12, 12, use_bias=False, rngs=rngs)])
        self.head = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        x = x + self.attention(x)
        x = x + self.einsum(self.general(x.reshape(*x.shape[:-1], 3, 4)))
        for block in self.blocks:
            x = x + jax.nn.relu(block(x))
        return self.head(x.mean(axis=1))


TOKENS = jnp.array([[1, 2, 3, 4], [5, 6, 7, 19]])
ALL = ("query", "key", "value", "out", "general", "einsum", "blocks.0", "blocks.1", "head", "embed")


def adopted(method: adapters.Method | None = None) -> Any:
    model = adopt(Classifier(nnx.Rngs(0)))
    return model if method is None else adapters.attach(model, method, rngs=nnx.Rngs(1))


def randomized(model: Any) -> Any:
    rng = np.random.default_rng(0)
    leaves = variables.flat(model)[1].items()
    variables.update(
        model,
        {
            path: leaf.get_value() + 0.3 * jnp.array(rng.normal(size=leaf.shape), jnp.float32)
            for path, leaf in leaves
            if isinstance(leaf, variables.PeftParam)
        },
    )
    return model


def test_an_adopted_model_computes_what_it_did_bit_for_bit() -> None:
    np.testing.assert_array_equal(adopted()(TOKENS), Classifier(nnx.Rngs(0))(TOKENS))


def test_its_layers_are_still_flaxs_at_their_paths_with_their_values() -> None:
    model, before = adopted(), Classifier(nnx.Rngs(0))
    assert isinstance(model.head, nnx.Linear)
    ours, theirs = variables.flat(model)[1], variables.flat(before)[1]
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        if hasattr(leaf.get_value(), "ndim"):
            np.testing.assert_array_equal(np.ravel(ours[path].get_value()), np.ravel(leaf.get_value()), err_msg=path)


@pytest.mark.slow_cases
@pytest.mark.parametrize("target", ALL)
def test_lora_in_any_layer_is_the_update_of_its_matrix(target: str) -> None:
    model = adopted(Lora(rank=2, targets=(target,)))
    np.testing.assert_array_equal(model(TOKENS), adopted()(TOKENS))
    attached = randomized(model)(TOKENS)
    assert np.abs(attached - adopted()(TOKENS)).max() > 1e-3
    np.testing.assert_allclose(adapters.merge(model)(TOKENS), attached, atol=1e-5)
    np.testing.assert_array_equal(adapters.detach(model)(TOKENS), adopted()(TOKENS))


class Tied(nnx.Module):
    """Tokens to logits over the tokens, with the transposed table as its output layer."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(20, 12, rngs=rngs)
        self.hidden = nnx.Linear(12, 12, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.embed.attend(jax.nn.relu(self.hidden(self.embed(tokens))))


@pytest.mark.parametrize(
    "method",
    [
        Lora(rank=2, targets=("embed",)),
        Lora(rank=2, targets=("hidden",), modules_to_save=("embed",)),
        TrainableTokens(token_indices=(2, 19)),
    ],
    ids=lambda method: method.method,
)
def test_adapters_of_an_embedding_change_an_output_layer_that_is_its_transposed_table(method: adapters.Method) -> None:
    before = Tied(nnx.Rngs(0))(TOKENS)
    model = randomized(adapters.attach(adopt(Tied(nnx.Rngs(0))), method, rngs=nnx.Rngs(1)))
    attached = model(TOKENS)
    adapters.merge(model)
    table = model.embed.embedding.get_value()
    np.testing.assert_allclose(attached, jax.nn.relu(model.hidden(table[TOKENS])) @ table.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(adapters.detach(model)(TOKENS), before)


def test_a_soft_prompt_does_not_change_the_transposed_table() -> None:
    model = adapters.attach(adopt(Tied(nnx.Rngs(0))), PromptTuning(tokens=3), rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(model(TOKENS)[:, 3:], Tied(nnx.Rngs(0))(TOKENS))


@pytest.mark.parametrize("method", [Lora(rank=2), LoHa(rank=2), Vera(rank=2), Ia3(targets=("layer",)), Hra(rank=2)])
def test_adapters_compute_in_the_dtype_of_their_layer(method: adapters.Method) -> None:
    layer = nnx.Linear(12, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    model = adapters.attach(adopt(nnx.Dict(layer=layer)), method, rngs=nnx.Rngs(1))
    assert randomized(model).layer(jnp.ones((2, 12))).dtype == jnp.bfloat16


def test_the_train_step_trains_a_users_network_with_a_loss_of_its_own() -> None:
    model = adopted(Lora(rank=2, targets="all-linear", exclude=("head",), modules_to_save=("head",)))
    mesh = sharding.make_mesh({"data": 2})
    sharding.place(model, mesh)
    graph, trainable, frozen = variables.split_by_kind(model)

    def loss(model: Any, batch: Any) -> Totals:
        logits, labels = model(batch["tokens"]), batch["labels"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return Totals(losses.sum(), jnp.float32(len(labels)), jnp.sum(logits.argmax(-1) == labels).astype(jnp.float32))

    optimizer = optax.adam(1e-2)
    state, losses = init_state(trainable, optimizer, seed=0), []
    step = make_train_step(Objective(graph, loss), optimizer, state)
    batch = {"tokens": np.array(TOKENS), "labels": np.array([0, 3])}
    with jax.set_mesh(mesh):
        for _ in range(20):
            state, measured = step(state, frozen, sharding.shard_batch(batch, mesh))
            losses.append(float(measured["loss"]))
    assert losses[-1] < 0.2 * losses[0]


def test_a_soft_prompt_makes_the_embedded_sequence_longer() -> None:
    model = adopted(PromptTuning(tokens=3))
    embedded = model.embed(TOKENS)
    assert embedded.shape == (2, 7, 12)
    np.testing.assert_array_equal(embedded[:, 3:], adopted().embed(TOKENS))
    assert np.abs(model(TOKENS) - adopted()(TOKENS)).max() > 1e-3


def test_bottleneck_adapters_sit_in_the_sublayers_that_are_named() -> None:
    model = adopt(Classifier(nnx.Rngs(0)), sublayers={"attention": 12, "blocks.0": 12})
    np.testing.assert_array_equal(model(TOKENS), Classifier(nnx.Rngs(0))(TOKENS))
    assert isinstance(model.attention, nnx.MultiHeadAttention)
    adapters.attach(model, Houlsby(reduction_factor=4), rngs=nnx.Rngs(1))
    assert adapters.count_trainable(model) == 2 * (2 * 12 * 3 + 3 + 12)
    attached = randomized(model)(TOKENS)
    assert np.abs(attached - adopted()(TOKENS)).max() > 1e-3
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        np.testing.assert_array_equal(other(TOKENS), attached)
    np.testing.assert_array_equal(adapters.detach(model)(TOKENS), adopted()(TOKENS))


class Stacked(nnx.Module):
    def __init__(self, make: Callable[..., Any] = lambda rngs: nnx.Linear(4, 4, rngs=rngs)) -> None:
        self.first = nnx.LinearGeneral((2, 2), (4,), axis=(-2, -1), rngs=nnx.Rngs(0))
        self.layers = nnx.vmap(lambda key: make(rngs=nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 2))


def einsum(rngs: nnx.Rngs) -> nnx.Einsum:
    return nnx.Einsum("bd,df->bf", (4, 4), (4,), rngs=rngs)


@pytest.mark.parametrize(
    ("make", "name"),
    [(einsum, "kernel"), (lambda rngs: nnx.Embed(3, 4, rngs=rngs), "embedding")],
    ids=["einsum", "embed"],
)
def test_a_model_with_a_stack_of_layers_is_refused_and_unchanged(make: Callable[..., Any], name: str) -> None:
    model = Stacked(make)
    before = nnx.split(model)[0]
    with pytest.raises(UserError, match=rf"layers\.{name} has shape \(2, ., 4\).*stacks of layers made by vmap"):
        adopt(model)
    assert nnx.split(model)[0] == before
    assert model.first.kernel.shape == (2, 2, 4)


def test_a_model_of_shapes_can_be_adopted_and_has_the_structure_of_one_of_arrays() -> None:
    sublayers = {"attention": 12}
    model = adopt(nnx.eval_shape(lambda: Classifier(nnx.Rngs(0))), sublayers=sublayers)
    graph, state = nnx.split(adopt(Classifier(nnx.Rngs(0)), sublayers=sublayers))
    assert nnx.split(model)[0] == graph
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(lambda leaf: leaf.shape, nnx.state(model))


def test_flaxs_names_of_mesh_axes_fit_the_matrix() -> None:
    names = {
        ("x", None, None, "y"): ("x", None),
        (None, None, "y", None): (None, "y"),
        ("x", "y", None, None): (None, None),
    }
    for given, expected in names.items():
        model = nnx.Dict(layer=nnx.LinearGeneral((2, 2), (2, 2), axis=(-2, -1), rngs=nnx.Rngs(0)))
        model.layer.kernel.set_metadata(out_sharding=given)
        adopt(model)
        assert model.layer.kernel.get_metadata()["out_sharding"] == expected


class Scaled(nnx.Module):
    """A network with arrays that are attributes."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layer, self.scale, self.shift = (
            nnx.Linear(4, 4, rngs=rngs),
            jnp.full((1, 4), 2.0),
            np.ones((1, 4), np.float32),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.add(jnp.multiply(self.layer(x), self.scale), self.shift)


def test_arrays_that_are_attributes_of_a_module_stay_what_they_are(tmp_path: Path) -> None:
    x = jnp.ones((2, 4))
    model = adapters.attach(adopt(Scaled(nnx.Rngs(0))), Lora(rank=2, dropout=0.5, lr_ratio=4.0), rngs=nnx.Rngs(1))
    expected = randomized(model)(x)
    mask = trainable_mask(model)
    assert mask["layer"]["adapters"]["default"]["a"] is True
    assert mask["scale"] is mask["shift"] is False
    view = training_view(model, {"x": x})
    assert isinstance(view.scale, jax.Array)
    assert view(x).shape == expected.shape
    wrap_optimizer(optax.adam(1e-2), model).init(nnx.state(model, variables.PeftParam))
    again = load_adapter(adopt(Scaled(nnx.Rngs(0))), save_adapter(model, tmp_path / "adapter"))
    np.testing.assert_array_equal(again(x), expected)
    np.testing.assert_allclose(adapters.merge(model)(x), expected, rtol=1e-5)


class Reward(nnx.Module):
    """A number for each sequence, from a model of ours."""

    def __init__(self, backbone: Any, rngs: nnx.Rngs) -> None:
        self.backbone, self.score = backbone, nnx.Linear(backbone.config.embed, 1, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.score(self.backbone.hidden(tokens)[0][:, -1])


def test_adapters_attach_to_a_model_inside_a_users_module_and_not_to_the_module(tmp_path: Path) -> None:
    model = adopt(Reward(tiny.model(), nnx.Rngs(0)))
    with pytest.raises(UserError, match=r"backbone is a peftjax model inside a Reward; .*: pass model\.backbone"):
        adapters.attach(model, Lora(rank=2), rngs=nnx.Rngs(1))
    before = model(TOKENS)
    adapters.attach(model.backbone, Lora(rank=2), rngs=nnx.Rngs(1))
    attached = tiny.randomize(model, scale=0.3)(TOKENS)
    assert np.abs(attached - before).max() > 1e-3
    again = Reward(tiny.model(), nnx.Rngs(0))
    load_adapter(again.backbone, save_adapter(model.backbone, tmp_path / "adapter"))
    np.testing.assert_array_equal(again(TOKENS), attached)


class OwnLinear(nnx.Linear):
    """A subclass, which may compute anything."""


def test_bottleneck_adapters_of_an_adopted_network_have_no_file(tmp_path: Path) -> None:
    model = adopt(Classifier(nnx.Rngs(0)), sublayers={"attention": 12})
    adapters.attach(model, Houlsby(reduction_factor=4), rngs=nnx.Rngs(1))
    with pytest.raises(UserError, match=r"the file format of houlsby, AdapterHub's, is for models from load_model"):
        save_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adopt(Classifier(nnx.Rngs(0)), sublayers={"atention": 12}), "the model has no module 'atention'"),
        (lambda: adopt(Classifier), "the model must be an nnx.Module, not <class .*Classifier'>"),  # type: ignore[type-var]
        (lambda: adopt(adopted(), sublayers=["attention"]), "sublayers must give the width"),  # type: ignore[arg-type]
        (lambda: adopt(nnx.Linear(2, 2, rngs=nnx.Rngs(0))), "the model is itself a Linear; wrap it in an nnx.Module"),
        (
            lambda: adapters.attach(Stacked(), Lora(), rngs=nnx.Rngs(0)),
            r"attach: no layer .* peftjax.adopt\(model\) adds",
        ),
        (
            lambda: adapters.attach(adopt(nnx.Dict(layer=OwnLinear(4, 4, rngs=nnx.Rngs(0)))), Lora(), rngs=nnx.Rngs(0)),
            "attach: no layer .* but not to subclasses of these",
        ),
        (
            lambda: adapters.attach(adopted(), Lora, rngs=nnx.Rngs(0)),
            r"attach: the method must be an instance such as Lora\(rank=8\)",
        ),
        (lambda: adapters.attach(adopted(), Lora(), rngs=0), r"attach: rngs must be nnx.Rngs\(seed\), not 0"),
        (
            lambda: adapters.rows(adopted(Lora(rank=2)), ["default"]),
            "rows: Classifier is not a peftjax decoder or encoder",
        ),
        (lambda: adopt(Stacked()), r"layers.kernel has shape \(2, 4, 4\)"),
        (lambda: adopted(Houlsby()), "'houlsby' needs residual sublayers with a slot, and this model has none"),
        (
            lambda: adopted(PrefixTuning()),
            "method.name='prefix' needs attention layers with a slot, and this model has none",
        ),
        (lambda: adopted(Lora(targets=("heed",))), "'heed' matches no layer of this model. Did you mean 'head'"),
    ],
)
def test_what_cannot_be_adopted_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("string", ["btd,df->bft", "bd,bdf->bf"])
def test_an_einsum_that_is_no_product_with_a_matrix_is_left_alone(string: str) -> None:
    shape = (2, 4, 4) if string.startswith("bd,") else (4, 4)
    model = nnx.Dict(layer=nnx.Einsum(string, shape, rngs=nnx.Rngs(0)))
    adopt(model)
    assert type(model.layer) is nnx.Einsum


def test_a_sublayer_that_is_adopted_twice_keeps_its_adapters() -> None:
    model = nnx.Dict(layer=nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0))))
    adopt(model, sublayers={"layer": 4})
    adapters.attach(model, Houlsby(), rngs=nnx.Rngs(0))
    adopt(model, sublayers={"layer": 4})
    assert model.layer.adapters.names() == ["default"]
