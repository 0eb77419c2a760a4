"""Optimizers with what a method adds, in the loops of users."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import peftjax
from peftjax.core import variables
from tests import tiny

LORA_PLUS = peftjax.Lora(rank=2, lr_ratio=16.0, modules_to_save=("norm",))
ADALORA = peftjax.AdaLora(init_rank=4, target_rank=2, total_steps=6, warmup_steps=1, final_steps=1)
OFT = peftjax.Oft(block_size=8, constrained=True)


def attached(method: peftjax.Method) -> Any:
    return tiny.randomize(peftjax.attach(tiny.model(), method, rngs=nnx.Rngs(0)), scale=0.3)


def random_like(state: Any) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.array(rng.normal(size=leaf.shape), jnp.float32), state)


@pytest.mark.slow_cases
@pytest.mark.parametrize("method", [LORA_PLUS, ADALORA, OFT], ids=["lora+", "adalora", "oft"])
def test_the_updates_of_a_state_are_those_of_training(method: peftjax.Method) -> None:
    model = attached(method)
    _, leaves = variables.flat(model)
    _, tree, _ = variables.split_by_kind(model)
    params = nnx.state(model, peftjax.PeftParam)
    ours, theirs = method.optimizer(optax.adam(1e-2), leaves), peftjax.wrap_optimizer(optax.adam(1e-2), model)
    state, opt = ours.init(tree), theirs.init(params)
    for _ in range(4):
        gradients = random_like(params)
        flat = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(gradients)}
        expected, state = ours.update({path: flat.get(path, optax.MaskedNode()) for path in tree}, state, tree)
        updates, opt = theirs.update(gradients, opt, params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        for path, leaf in nnx.to_flat_state(updates):
            np.testing.assert_array_equal(leaf.get_value(), expected[".".join(map(str, path))])
        params, tree = optax.apply_updates(params, updates), optax.apply_updates(tree, expected)


@pytest.mark.slow
def test_adalora_prunes_ranks_in_a_loop_with_the_optimizer_of_nnx() -> None:
    model = attached(ADALORA)
    optimizer = nnx.Optimizer(model, peftjax.wrap_optimizer(optax.adam(1e-2), model), wrt=peftjax.PeftParam)

    @nnx.jit
    def step(model: Any, optimizer: nnx.Optimizer, batch: dict[str, jax.Array]) -> None:
        def loss(model: Any) -> jax.Array:
            return peftjax.losses.next_token(model, batch) + ADALORA.penalty(model)

        optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, peftjax.PeftParam))(model))

    for _ in range(6):
        step(model, optimizer, tiny.batch())
    values = [leaf.get_value() for path, leaf in variables.flat(model)[1].items() if path.endswith(".singular_values")]
    assert sum(int(np.count_nonzero(value)) for value in values) == 3 * len(values) * ADALORA.target_rank  # 3 layers


def test_each_of_several_methods_changes_the_updates_of_its_own_adapter() -> None:
    model, own = tiny.model(), {"one": peftjax.Lora(rank=2, lr_ratio=4.0), "two": peftjax.Lora(rank=3, lr_ratio=16.0)}
    own["three"] = peftjax.Lora(rank=2)
    for name, method in own.items():
        peftjax.attach(model, method, name=name, rngs=nnx.Rngs(0))
    peftjax.use(model, tuple(own))
    params = nnx.state(model, peftjax.PeftParam)
    tx = peftjax.wrap_optimizer(optax.sgd(1.0), model)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    found = {(path[-2], path[-1]): np.unique(leaf.get_value()) for path, leaf in nnx.to_flat_state(updates)}
    assert found == {
        (name, leaf): [-method.lr_ratio if leaf == "b" else -1.0] for name, method in own.items() for leaf in ("a", "b")
    }


@pytest.mark.parametrize("method", [LORA_PLUS, ADALORA, OFT], ids=["lora+", "adalora", "oft"])
def test_further_arguments_of_an_update_reach_the_optimizer(method: peftjax.Method) -> None:
    model, given = attached(method), []

    def update(updates: Any, state: Any, params: Any = None, *, value: float) -> tuple[Any, Any]:
        given.append(value)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    params = nnx.state(model, peftjax.PeftParam)
    for tx in (inner, optax.sgd(1.0)):  # the second one ignores them
        tx = peftjax.wrap_optimizer(tx, model)
        tx.update(random_like(params), tx.init(params), params, value=3.0)
    assert given == [3.0]


def test_with_other_methods_the_optimizer_stays_as_it_is() -> None:
    tx = optax.adam(1e-2)
    assert peftjax.wrap_optimizer(tx, attached(peftjax.Lora(rank=2))) is tx
    assert peftjax.wrap_optimizer(tx, tiny.model()) is tx
