"""The train step of a config from shapes alone: a model, a state and a batch without any weights."""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from peftjax import sharding
from peftjax.adapters import Method
from peftjax.adapters.attach import attach_unchecked
from peftjax.core import variables
from peftjax.data.tokenizer import load_tokenizer
from peftjax.io.bitsandbytes import check_config
from peftjax.io.random_model import make_quantized
from peftjax.io.resize import resized
from peftjax.models import from_hf_config
from peftjax.models.base import Model, ModelConfig, no_mesh
from peftjax.tasks import Task
from peftjax.tasks.model import compute_dtype
from peftjax.training import jaxpr_cost
from peftjax.training.config import Config
from peftjax.training.split import split
from peftjax.training.step import TrainState, abstract_state, make_train_step

Batch = dict[str, jax.ShapeDtypeStruct]
ModelT = TypeVar("ModelT", bound=nnx.Module)


class StepArguments(NamedTuple):
    """The arguments of a train step, as `jax.ShapeDtypeStruct`s with shardings."""

    state: TrainState
    frozen: variables.FlatTree
    batch: Batch


def abstract_model(config: Config, task: Task, hf_config: Mapping[str, Any]) -> Model:
    """Return the model that `config` trains, quantized and with its adapters, as shapes.

    `hf_config` has the fields of the model's config.json, with the quantization_config that describes its weights.

    Raises:
        UserError: The architecture is not supported, or the method does not fit the model.
    """
    fields = dict(hf_config)
    stored = fields.pop("quantization_config", None)  # the checkpoint is already quantized
    if stored:
        check_config(stored, config.model.path)
    family = from_hf_config(
        fields,
        dtype=compute_dtype(config.model, hf_config),
        param_dtype=config.model.param_dtype,
        remat=config.model.remat,
        **task.head_options(config.model.new_head),
    )
    if config.model.resize_embeddings:
        family = resized(family, load_tokenizer(config.model.path, config.model.revision).vocab_size)
    stored_text = json.dumps(stored) if stored else ""
    base = nnx.merge(*_abstract_base(family, config.model.quantize, config.model.skip_quantize, stored_text), copy=True)
    if not config.start_from:  # `check` rejects some options that an adapter file may have
        config.method.check(base)
    return outline(base, config.method)


@functools.lru_cache
def _abstract_base(
    family: ModelConfig, quantize: str, skip: tuple[str, ...], stored: str
) -> tuple[nnx.GraphDef, nnx.State]:
    """A quantized base model as shapes; `stored` is its quantization_config as JSON, or empty."""
    quantization = json.loads(stored) if stored else None
    with no_mesh():
        return nnx.split(nnx.eval_shape(lambda: make_quantized(family, quantize, skip, 0, quantization)))


def outline(base: ModelT, method: Method) -> ModelT:
    """The base with the adapters of a method, as shapes."""
    method = method.tokenized(lambda text: [0])  # the tokens do not change any shape
    graph, state = nnx.split(base)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)

    def attached(state: nnx.State) -> ModelT:
        model: ModelT = nnx.merge(graph, state)
        # `attach` would require the data or the kernels that some adapters start from; they do not change any shape
        return attach_unchecked(model, method, "default", rngs=nnx.Rngs(0))

    with no_mesh():
        model: ModelT = nnx.eval_shape(attached, shapes)
    return model


def abstract_step(
    config: Config,
    task: Task,
    model: Model,
    mesh: Mesh,
    optimizer: optax.GradientTransformation | None = None,
    row: Mapping[str, Any] | None = None,
) -> tuple[jax.stages.Wrapped, StepArguments]:
    """Return the jitted train step that `config` describes, and its arguments as shapes with shardings.

    Call it inside `jax.set_mesh(mesh)`. The model's leaves get their shardings in place. `optimizer` replaces the one of
    `config.optim`, as in `split`. `row` has the shapes of a row by name; by default the longest one.
    """
    place_shapes(model, mesh)
    objective, tx, trainable, frozen = split(config, task, model, config.method, optimizer)
    state = abstract_state(trainable, tx)
    batch = abstract_batch(config, row or task.row_shapes(), mesh)
    step = make_train_step(objective, tx, state)
    return cast(jax.stages.Wrapped, step), StepArguments(state, frozen, batch)


def place_shapes(model: nnx.Module, mesh: Mesh) -> None:
    """Give the shapes of a model's leaves their shardings, in place."""
    _, leaves = variables.flat(model)
    variables.update(model, {path: _placed(leaf.get_value(), leaf.axes, mesh) for path, leaf in leaves.items()})


def abstract_batch(config: Config, row: Mapping[str, Any], mesh: Mesh) -> Batch:
    """Return a batch of rows with the shapes of `row` by name, as shapes [A, B, ...] with shardings."""
    microbatches = (config.train.accumulate, config.train.batch_size // config.train.accumulate)
    batch: Batch = {}
    for name, each in row.items():
        shape = jax.ShapeDtypeStruct((*microbatches, *each.shape), each.dtype)
        batch[name] = _placed(shape, sharding.batch_axes(len(each.shape)), mesh)
    return batch


def _placed(value: Any, axes: Sequence[str | None], mesh: Mesh) -> Any:
    """The shapes of a parameter's arrays (a quantized one has several), with the shardings of its logical axes."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        value,
        sharding.placement(value, axes, mesh),
    )


def bytes_per_device(tree: Any, bits: int | None = None) -> int:
    """Bytes of the leaves' shards on one device. bits: per element; None: of each leaf's dtype (4 for int4)."""
    return sum(
        -(-math.prod(leaf.sharding.shard_shape(leaf.shape)) * (bits or jaxpr_cost.bits(leaf.dtype)) // 8)
        for leaf in jax.tree.leaves(tree)
    )
