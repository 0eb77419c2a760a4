"""The train step: accumulation exact by tokens, dropout by step and microbatch, moments where their parameters are."""

import ast
import importlib
import inspect
from functools import partial
from types import ModuleType
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from peftjax import adapters, methods, sharding
from peftjax.core import variables
from peftjax.totals import next_token_loss
from peftjax.training import optim
from peftjax.training import step as step_module
from peftjax.training.step import Objective, init_state, make_train_step
from tests import tiny


def trained_once(microbatches: int, *, dropout: float = 0.0, step: int = 0) -> tuple[Any, dict[str, float]]:
    """One step of SGD on one batch of 4 rows, whose rows have very different numbers of tokens with a loss."""
    model = adapters.attach(tiny.model(), methods.Lora(rank=4, dropout=dropout), rngs=nnx.Rngs(1))
    tiny.randomize(model)
    sharding.place(model, sharding.make_mesh())
    model.train()
    graph, leaves = variables.flat(model)
    _, trainable, frozen = variables.split_by_kind(model)
    config = optim.OptimConfig(name="sgd", learning_rate=1.0, momentum=0.0, clip_norm=0.0)
    optimizer = optim.make_optimizer(config, 10, dict.fromkeys(trainable, False))
    state = init_state(trainable, optimizer, seed=0)._replace(step=jax.numpy.array(step, "int32"))
    keys = tuple(path for path, leaf in leaves.items() if isinstance(leaf, variables.DropoutKey))
    batch = {name: np.array(value) for name, value in tiny.batch().items()}
    batch["loss_weights"][0] = 0
    batch["loss_weights"][1, 2:] = 0
    placed = sharding.shard_batch(batch, sharding.make_mesh(), microbatches)
    state, measured = make_train_step(
        Objective(graph, partial(next_token_loss, chunk=4), dropout_keys=keys), optimizer, state
    )(state, frozen, placed)
    return state.trainable, {name: float(value) for name, value in measured.items()}


@pytest.mark.parametrize("microbatches", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_accumulated_microbatches_equal_one_batch_however_the_tokens_fall(microbatches: int) -> None:
    whole, numbers = trained_once(1)
    parts, accumulated = trained_once(microbatches)
    assert accumulated == pytest.approx(numbers, rel=1e-5)
    for path, value in whole.items():
        if not isinstance(value, optax.MaskedNode):
            np.testing.assert_allclose(parts[path], value, atol=1e-6, err_msg=path)


def test_dropout_differs_from_step_to_step_and_is_the_same_for_a_step() -> None:
    losses = [trained_once(1, dropout=0.5, step=step)[1]["loss"] for step in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_moments_lie_where_their_parameters_lie() -> None:
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    model = adapters.attach(tiny.model(), methods.Lora(rank=4), rngs=nnx.Rngs(1))
    sharding.place(model, mesh)
    _, trainable, _ = variables.split_by_kind(model)
    state = init_state(trainable, optax.adam(1e-3), seed=0)
    moments = state.optimizer[0].mu
    split = [
        path for path, leaf in trainable.items() if hasattr(leaf, "sharding") and not leaf.sharding.is_fully_replicated
    ]
    assert split
    assert all(moments[path].sharding == trainable[path].sharding for path in split)


def test_the_step_that_plan_compiles_is_the_one_in_train() -> None:
    def step_in(module: ModuleType) -> str:
        functions = [
            node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.FunctionDef)
        ]
        (step,) = (function for function in functions if function.name == "train_step")
        return ast.dump(step)

    assert step_in(importlib.import_module("peftjax.train")) == step_in(step_module)
