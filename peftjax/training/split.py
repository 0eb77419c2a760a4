"""Splitting a model with its method attached into the parts of a train step: objective, optimizer, and state."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import optax
from flax import nnx
from jax.typing import ArrayLike

from peftjax.adapters.method import Method
from peftjax.core import variables
from peftjax.models.base import Model
from peftjax.models.kernels import use_kernel
from peftjax.tasks import Task
from peftjax.training import optim
from peftjax.training.config import Config
from peftjax.training.step import Objective


class Parts(NamedTuple):
    """The parts of a train step.

    Attributes:
        objective: The function that it minimizes.
        tx: The optimizer.
        trainable: The trainable leaves by path; `optax.MaskedNode()` for the others.
        frozen: The other leaves by path; `optax.MaskedNode()` for the trainable ones.
    """

    objective: Objective
    tx: optax.GradientTransformation
    trainable: variables.FlatTree
    frozen: variables.FlatTree


def split(
    config: Config, task: Task, model: Model, method: Method, optimizer: optax.GradientTransformation | None = None
) -> Parts:
    """Split a model, whose leaves may be arrays or shapes, and its attached method. The model is then in evaluation mode.

    `optimizer` replaces the one of `config.optim`.
    """
    _, leaves = variables.flat(model)
    use_kernel(model, config.model.attention, _platform(leaves))
    model.train()
    _, leaves = variables.flat(model)
    graph, trainable, frozen = variables.split_by_kind(model, method.trains)
    model.eval()
    given = method.optimizer(optim.in_float32(optimizer), leaves) if optimizer else None
    tx = given or make_tx(config, method, trainable, leaves)
    keys = tuple(path for path, leaf in leaves.items() if isinstance(leaf, variables.DropoutKey))
    return Parts(Objective(graph, task.loss, method.penalty, keys, task.balanced), tx, trainable, frozen)


def make_tx(
    config: Config,
    method: Method,
    trainable: variables.FlatTree,
    leaves: Mapping[str, nnx.Variable],
    peak: ArrayLike | None = None,
) -> optax.GradientTransformation:
    """The optimizer of `config.optim` for a method and a model with these leaves; see `optim.make_optimizer`."""
    decayed = optim.decay_mask(trainable, {path: leaf.axes for path, leaf in leaves.items()})
    return method.optimizer(optim.make_optimizer(config.optim, config.train.steps, decayed, peak), leaves)


def _platform(leaves: Mapping[str, nnx.Variable]) -> str:
    """The platform of the devices that hold a model's leaves."""
    leaf = jax.tree.leaves(next(iter(leaves.values())).get_value())[0]
    return str(next(iter(leaf.sharding.device_set)).platform)
