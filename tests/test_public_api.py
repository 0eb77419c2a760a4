"""The public names, and the training loops of the README and docs/own_loop.md, executed as they stand there."""

import dataclasses
import functools
import importlib
import inspect
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import peftjax
from peftjax import losses
from peftjax.core import variables
from peftjax.core.errors import UserError
from tests import tiny
from tests.docs.pages import ROOT, blocks


def loops() -> dict[str, str]:
    """The loops of the README, which docs/own_loop.md repeats, and that with optax.masked, which only the docs have."""
    readme, docs = (
        [block.code for block in blocks(ROOT / name, "python")] for name in ("README.md", "docs/own_loop.md")
    )
    split, optimizer, mask = (code for code in readme if "def step(" in code)
    assert {split, optimizer, mask} <= set(docs)
    (masked,) = (code for code in docs if "optax.masked" in code)
    return {"split": split, "optimizer": optimizer, "mask": mask, "masked": mask + masked}


LOOPS = loops()

slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def packed_batch() -> dict[str, jax.Array]:
    """Two documents in each row."""
    ones = jnp.ones((4, 4), jnp.int32)
    positions = jnp.tile(jnp.arange(4), (4, 2))
    return tiny.batch() | {"positions": positions, "segments": jnp.concatenate([ones, 2 * ones], axis=1)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.directory(tmp_path_factory.mktemp("models") / "model")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a loop did: its losses, how often its step was traced, its model, and the base's bits before the first step."""

    losses: list[float]
    traces: int
    model: Any
    before: dict[str, bytes]


@functools.cache
def run(loop: str, directory: Path, rate: float = 0.1, quantize: str = "None", packed: bool = False) -> Run:
    """Execute a loop for 12 steps on one batch, with a learning rate for a tiny model."""
    code = LOOPS[loop].replace("dropout=0.1", f"dropout={rate}").replace("1e-4", "1e-2")
    code = code.replace('"DIR"', f'"{directory}", quantize={quantize}')
    code = code.replace("    loss = ", "    traces.append(1)\n    loss = ")
    scope: dict[str, Any] = {"traces": []}
    exec(code, scope)
    before, step = tiny.bits(scope["model"]), scope["step"]
    batch = packed_batch() if packed else tiny.batch()
    if loop == "optimizer":
        values = [step(scope["model"], scope["optimizer"], batch) for _ in range(12)]
        return Run(list(map(float, values)), len(scope["traces"]), scope["model"], before)
    name, others = ("adapter", "base") if loop == "split" else ("params", "rest")

    def steps(count: int) -> tuple[list[float], Any]:
        state, opt, values = scope[name], scope["opt"], []
        for _ in range(count):
            state, opt, value = step(state, opt, batch)
            values.append(float(value))
        return values, state

    values, state = steps(12)
    assert steps(3)[0] == values[:3]  # dropout included: nothing that a step depends on is hidden
    return Run(values, len(scope["traces"]), nnx.merge(scope["graph"], state, scope[others]), before)


@pytest.mark.slow_cases
@pytest.mark.parametrize("loop", ["split", "optimizer", slow("mask"), slow("masked")])
def test_a_loop_lowers_the_loss_and_changes_nothing_but_the_adapter(loop: str, directory: Path) -> None:
    done = run(loop, directory)
    assert done.losses[-1] < done.losses[0] - 0.3
    assert tiny.bits(done.model) == done.before
    assert all(value.deterministic for _, value in nnx.iter_modules(done.model) if hasattr(value, "deterministic"))
    for path, leaf in variables.flat(done.model)[1].items():
        assert not isinstance(leaf, variables.DropoutKey) or not np.any(leaf.get_value()), path
    # Other loops return the base or the optimizer's counter too, which jit then places on the model's mesh: one more trace.
    assert done.traces <= (1 if loop == "split" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["optimizer", "mask"])
def test_without_dropout_the_loops_compute_the_same_losses(loop: str, directory: Path) -> None:
    expected = run("split", directory, rate=0).losses
    np.testing.assert_allclose(run(loop, directory, rate=0).losses, expected, rtol=1e-6)


@pytest.mark.slow_cases
@pytest.mark.parametrize("loop", ["split", "optimizer", slow("mask"), slow("masked")])
def test_dropout_is_active_in_every_loop(loop: str, directory: Path) -> None:
    without, dropped = run(loop, directory, rate=0).losses, run(loop, directory).losses
    assert dropped[0] == pytest.approx(without[0], rel=1e-6)  # LoRA starts as a no-op
    assert all(abs(a - b) > 1e-4 for a, b in zip(dropped[1:], without[1:], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["split", "optimizer"])
def test_a_loop_trains_on_an_nf4_base_and_on_packed_documents(loop: str, directory: Path) -> None:
    done = run(loop, directory, quantize='"nf4"', packed=True)
    assert done.losses[-1] < done.losses[0] - 0.3
    assert tiny.bits(done.model) == done.before


@pytest.mark.parametrize("loop", ["mask", "masked"])
def test_frozen_parameters_get_updates_of_exactly_zero(loop: str, directory: Path) -> None:
    scope: dict[str, Any] = {}
    exec(LOOPS[loop].replace("DIR", str(directory)), scope)
    gradients = jax.tree.map(jnp.ones_like, scope["params"])
    updates, _ = scope["tx"].update(gradients, scope["opt"], scope["params"])
    updates = nnx.to_flat_state(updates)
    assert {type(leaf) for _, leaf in updates} == {nnx.Param, peftjax.PeftParam}
    for path, leaf in updates:
        assert np.any(leaf.get_value()) == (type(leaf) is peftjax.PeftParam), path
    moments = [leaf for leaf in jax.tree.leaves(scope["opt"]) if leaf.ndim]
    assert len(moments) == 2 * sum(type(leaf) is peftjax.PeftParam for _, leaf in updates)


# --- trainable_mask ---


def test_the_mask_of_a_module_of_its_state_and_of_its_variables_by_path_agree() -> None:
    model = peftjax.attach(tiny.model(), peftjax.Lora(rank=2), rngs=nnx.Rngs(0))
    by_path = peftjax.trainable_mask(variables.flat(model)[1])
    for nested in (peftjax.trainable_mask(model), peftjax.trainable_mask(nnx.state(model))):
        assert {".".join(map(str, path)): value for path, value in nnx.to_flat_state(nested)} == by_path
    assert {path.split(".")[-1] for path, trains in by_path.items() if trains} == {"a", "b"}
    base = peftjax.trainable_mask(model, nnx.Param)
    assert {value for path, value in nnx.to_flat_state(base) if path[-1] in ("a", "b", "scale", "key")} <= {True, False}
    assert base["embed"]["embedding"] is True
    assert base["blocks"]["attention"]["query"]["adapters"]["default"]["a"] is False


def test_a_tree_without_types_has_no_mask() -> None:
    with pytest.raises(UserError, match=r"a leaf is a .*, not an nnx\.Variable"):
        peftjax.trainable_mask(nnx.to_pure_dict(nnx.state(tiny.model())))


# --- Dropout of the public losses ---


def adapted(rate: float = 0.5) -> Any:
    model = peftjax.attach(tiny.model(), peftjax.Lora(rank=4, dropout=rate), rngs=nnx.Rngs(0))
    return tiny.randomize(model, scale=0.3)


def masks(model: Any, batch: dict[str, jax.Array], key: jax.Array | None = None) -> dict[str, np.ndarray]:
    """The dropout keys of a view for training, by path."""
    leaves = variables.flat(losses.training_view(model, batch, key))[1]
    return {path: leaf.get_value() for path, leaf in leaves.items() if isinstance(leaf, variables.DropoutKey)}


def test_every_layer_draws_its_own_mask() -> None:
    found = np.concatenate(list(masks(adapted(), tiny.batch()).values()))
    assert len(np.unique(found, axis=0)) == len(found) == 3 * 7  # layers x linear layers


@pytest.mark.parametrize("change", ["a token", "an order", "a parameter", "a stored key"])
def test_any_change_of_the_batch_or_of_what_is_trained_changes_the_masks(change: str) -> None:
    model, batch = adapted(), tiny.batch()
    before = masks(model, batch)
    query = model.blocks.attention.query.adapters.default
    if change == "a token":
        batch["tokens"] = batch["tokens"].at[3, 5].add(1)
    if change == "an order":
        batch = {name: array[::-1] for name, array in batch.items()}
    if change == "a parameter":
        query.a[...] = query.a.at[1, 0, 0].set(jnp.nextafter(query.a[1, 0, 0], 1.0))
    if change == "a stored key":
        query.dropout.key[...] = query.dropout.key.at[0, 0].set(1)
    for path, value in masks(model, batch).items():
        assert np.all(np.any(value != before[path], axis=-1)), path


def test_a_key_decides_the_masks_alone() -> None:
    one, other = (masks(adapted(), batch, jax.random.key(7)) for batch in (tiny.batch(0), tiny.batch(1)))
    for path, value in masks(adapted(), tiny.batch(0), jax.random.key(8)).items():
        np.testing.assert_array_equal(one[path], other[path])
        assert np.all(np.any(one[path] != value, axis=-1))


def test_a_loss_for_evaluation_has_no_dropout_whatever_the_mode_of_the_model() -> None:
    model, batch = adapted(), tiny.batch()
    expected = losses.next_token_loss(model, batch, 128)
    model.train()
    assert losses.next_token(model, batch, train=False) == expected.loss / expected.tokens
    assert losses.next_token(model, batch) != expected.loss / expected.tokens
    assert not model.blocks.attention.query.adapters.default.dropout.deterministic


def test_a_view_for_training_shares_its_variables_and_keeps_the_state_of_layers_of_flax() -> None:
    class Network(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.linear, self.dropout = nnx.Linear(4, 4, rngs=rngs), nnx.Dropout(0.5, deterministic=True, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.dropout(self.linear(x))

    model, x = Network(nnx.Rngs(0)), jnp.ones((8, 4))
    view = losses.training_view(model, {"x": x})
    assert view.linear.kernel is model.linear.kernel
    assert model.dropout.deterministic
    assert np.any(view(x) == 0)
    assert model.dropout.rngs.count[...] == 1


def test_the_masks_of_flaxs_dropout_change_with_the_batch_and_the_key_and_repeat_with_them() -> None:
    model = peftjax.adopt(nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1))))
    peftjax.attach(model, peftjax.Lora(rank=2), rngs=nnx.Rngs(2))
    graph, adapter, base = nnx.split(model, peftjax.PeftParam, ...)

    @jax.jit
    def dropped(adapter: nnx.State, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return losses.training_view(nnx.merge(graph, adapter, base), {"x": x}, key)(x) == 0

    x, later = jnp.ones((2, 64)), jax.tree.map(lambda leaf: leaf + 1e-3, adapter)
    keys = jax.random.split(jax.random.key(0))
    masks = [dropped(adapter, x), dropped(later, x), dropped(adapter, 2 * x), *(dropped(adapter, x, k) for k in keys)]
    assert all(0.3 < float(mask.mean()) < 0.7 for mask in masks)
    assert len({np.asarray(mask).tobytes() for mask in masks}) == len(masks)
    np.testing.assert_array_equal(masks[0], dropped(adapter, x))
    np.testing.assert_array_equal(masks[3], dropped(later, 2 * x, keys[0]))
    views = [losses.training_view(model, {"x": x, "noise": key}) for key in keys]  # a key is an array of a batch, too
    assert np.any((views[0](x) == 0) != (views[1](x) == 0))


# --- The other losses ---


def labelled(rng: np.random.Generator) -> dict[str, jax.Array]:
    tokens = jnp.asarray(rng.integers(0, 48, (4, 8)))
    return {"tokens": tokens, "mask": jnp.ones((4, 8), bool), "loss_weights": jnp.array([1.0, 0.0, 1.0, 0.5])}


class Encoder(nnx.Module):
    """Logits [B, C] from the first token, or [B, T, C]."""

    def __init__(self, classes: int, each: bool = False) -> None:
        self.table, self.each = nnx.Param(jax.random.normal(jax.random.key(0), (48, classes))), each

    def __call__(
        self, tokens: jax.Array, mask: jax.Array | None = None, token_types: jax.Array | None = None
    ) -> jax.Array:
        return self.table[...][tokens if self.each else tokens[:, 0]]


def test_losses_of_labelled_examples_are_weighted_means() -> None:
    rng = np.random.default_rng(0)
    batch = labelled(rng)
    weights = np.asarray(batch["loss_weights"])

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    logits = np.asarray(Encoder(3)(batch["tokens"]))
    labels = rng.integers(0, 3, 4)
    expected = np.average(-log_softmax(logits)[np.arange(4), labels], weights=weights)
    np.testing.assert_allclose(losses.classification(Encoder(3), batch | {"labels": labels}), expected, rtol=1e-5)

    several = rng.integers(0, 2, (4, 3)).astype(np.float32)
    each = np.asarray(optax.sigmoid_binary_cross_entropy(logits, several)).mean(-1)
    expected = np.average(each, weights=weights)
    np.testing.assert_allclose(losses.multi_label(Encoder(3), batch | {"labels": several}), expected, rtol=1e-5)

    numbers = rng.normal(size=4).astype(np.float32)
    expected = np.average((np.asarray(Encoder(1)(batch["tokens"]))[:, 0] - numbers) ** 2, weights=weights)
    np.testing.assert_allclose(losses.regression(Encoder(1), batch | {"labels": numbers}), expected, rtol=1e-5)

    words = rng.integers(0, 3, (4, 8))
    everywhere = np.broadcast_to(weights[:, None], (4, 8))
    each = -np.take_along_axis(log_softmax(np.asarray(Encoder(3, True)(batch["tokens"]))), words[..., None], -1)[..., 0]
    given = batch | {"labels": words, "loss_weights": jnp.asarray(everywhere)}
    np.testing.assert_allclose(
        losses.token_classification(Encoder(3, True), given), np.average(each, weights=everywhere), rtol=1e-5
    )


def test_a_loss_takes_a_loaded_model_and_arrays_of_numpy() -> None:
    """mypy checks the types."""
    tokens = np.arange(18).reshape(2, 9)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_weights": np.ones((2, 8), np.float32)}
    model = peftjax.load_model("embedded")
    loss = losses.next_token(model, batch, train=False)
    assert loss == losses.next_token(model, {name: jnp.array(array) for name, array in batch.items()}, train=False)


def test_a_batch_that_lacks_an_array_is_an_error_that_names_it() -> None:
    batch = tiny.batch()
    del batch["targets"]
    with pytest.raises(UserError, match=r"losses\.next_token: the batch has no 'targets'; it needs tokens, targets"):
        losses.next_token(tiny.model(), batch)
    with pytest.raises(UserError, match=r"losses\.image_classification: the batch has no 'pixels'"):
        losses.image_classification(tiny.model(), batch)
    with pytest.raises(UserError, match=r"losses\.next_token: tokens is a list; make it an array"):
        losses.next_token(tiny.model(), tiny.batch() | {"tokens": [[1, 2]]})  # type: ignore[dict-item]


def test_arrays_that_would_broadcast_to_another_loss_are_refused() -> None:
    batch = {"tokens": jnp.ones((2, 4), int), "mask": jnp.ones((2, 4), bool), "loss_weights": jnp.ones(2)}
    whole, each = jnp.zeros(2, int), jnp.zeros((2, 1))
    with pytest.raises(UserError, match=r"losses\.classification: labels has the shape \[2\]; .* it must be \[2, 4\]"):
        losses.classification(Encoder(3, True), batch | {"labels": whole})
    with pytest.raises(UserError, match=r"losses\.classification: loss_weights has the shape \[2, 1\]"):
        losses.classification(Encoder(3), batch | {"labels": whole, "loss_weights": each})
    with pytest.raises(UserError, match=r"losses\.multi_label: labels has the shape \[2\]; .* it must be \[2, 2\]"):
        losses.multi_label(Encoder(2), batch | {"labels": whole})
    with pytest.raises(UserError, match=r"losses\.regression: labels has the shape \[2, 1\]"):
        losses.regression(Encoder(1), batch | {"labels": each})
    with pytest.raises(UserError, match=r"losses\.regression: the model has 3 outputs; load it with labels=1"):
        losses.regression(Encoder(3), batch | {"labels": whole})
    with pytest.raises(UserError, match=r"losses\.next_token: loss_weights has the shape \[4\]"):
        losses.next_token(tiny.model(), tiny.batch() | {"loss_weights": jnp.ones(4)})


# --- Names ---


@pytest.mark.parametrize("module", [peftjax, losses], ids=["peftjax", "losses"])
def test_public_names_are_sorted_and_documented(module: Any) -> None:
    names = module.__all__
    assert names == sorted(names)
    for name in names:
        value = getattr(module, name)
        assert inspect.getdoc(value), name
        if inspect.isclass(value):
            assert "__doc__" in vars(value), name
            assert not value.__doc__.startswith(f"{name}("), f"{name} has no docstring but its signature"


def test_generate_and_train_are_the_functions_and_not_the_commands() -> None:
    for name in ("generate", "train"):
        command = importlib.import_module(f"peftjax.{name}")
        assert inspect.isfunction(command.main)
        assert inspect.isfunction(getattr(peftjax, name))
    model = tiny.model()
    assert peftjax.generate(model, [[5, 6]], max_new_tokens=2) == peftjax.generate(
        model, [[5, 6]], max_new_tokens=2, sampling=peftjax.Sampling()
    )


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("LoRA", " Did you mean 'Lora'?"),
        ("IA3", " Did you mean 'Ia3'?"),
        ("Prefix_Tuning", " Did you mean 'PrefixTuning' or 'PTuning' or 'PromptTuning'?"),
        ("zzz", ""),
    ],
)
def test_a_misspelled_name_is_an_attribute_error_with_suggestions(name: str, suggestion: str) -> None:
    with pytest.raises(AttributeError) as error:
        getattr(peftjax, name)
    assert str(error.value) == f"module 'peftjax' has no attribute {name!r}.{suggestion}"
    assert not hasattr(peftjax, "__wrapped__")
