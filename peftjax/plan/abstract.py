"""The train step of a config from shapes alone: a model, a state and a batch without any weights."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
from flax import nnx
from jax.sharding import Mesh

from peftjax import methods, sharding
from peftjax.adapters.attach import attach_unchecked
from peftjax.core import variables
from peftjax.data.rows import empty_row
from peftjax.io.bitsandbytes import check_config
from peftjax.io.random_model import make_quantized
from peftjax.models import from_hf_config
from peftjax.tasks import base as tasks
from peftjax.training.step import TrainState, abstract_state, prepare

Batch = dict[str, jax.ShapeDtypeStruct]


class StepArguments(NamedTuple):
    """The arguments of a train step, as `jax.ShapeDtypeStruct`s with shardings."""

    state: TrainState
    frozen: variables.FlatTree
    batch: Batch


def abstract_model(config: Any, hf_config: Mapping[str, Any]) -> nnx.Module:
    """Return the model that `config` trains, quantized and with its adapters, as shapes.

    Call it outside of `jax.set_mesh`: inside, `nnx.eval_shape` turns a quantized kernel into a plain array.

    Args:
        config: The training config.
        hf_config: The fields of the model's config.json.

    Raises:
        UserError: The architecture is not supported, or the method does not fit the model.
    """
    fields = dict(hf_config)
    stored = fields.pop("quantization_config", None)  # the checkpoint is quantized already
    quantize = config.model.quantize
    if stored:
        check_config(stored, config.model.path)
        quantize = "nf4" if stored.get("bnb_4bit_use_double_quant") else "nf4_single"
    family = from_hf_config(
        fields,
        dtype=config.model.dtype,
        param_dtype=config.model.param_dtype,
        remat=config.model.remat,
        **tasks.head_options(config, config.task.labels),
    )
    method = methods.from_config(config.method).tokenized(lambda text: [0])  # the tokens do not change any shape

    def make() -> nnx.Module:
        model: nnx.Module = make_quantized(family, quantize or None, config.model.skip_quantize, config.seed)
        method.check(model)
        # `attach` would require the data or the kernels that some adapters start from; they do not change any shape
        attach_unchecked(model, method, "default", rngs=nnx.Rngs(config.seed))
        return model

    return nnx.eval_shape(make)


def abstract_step(config: Any, model: nnx.Module, mesh: Mesh) -> tuple[jax.stages.Wrapped, StepArguments]:
    """Return the jitted train step that `config` describes, and its arguments as shapes with shardings.

    Call it inside `jax.set_mesh(mesh)`. The model's leaves get their shardings in place.
    """
    model.train()
    _, leaves = variables.flat(model)
    variables.update(model, {path: _placed(leaf.get_value(), leaf.axes, mesh) for path, leaf in leaves.items()})
    method, loss = methods.from_config(config.method), tasks.of(config).totals(config.train.loss_chunk)
    step, state, frozen = prepare(config, model, method, loss, abstract_state)
    microbatches = (config.train.accumulate, config.train.batch_size // config.train.accumulate)
    batch: Batch = {}
    for name, row in row_shapes(config, model).items():
        shape = (*microbatches, *row.shape)  # [A, B, ...]
        batch[name] = _placed(jax.ShapeDtypeStruct(shape, row.dtype), sharding.batch_axes(len(row.shape)), mesh)
    return cast(jax.stages.Wrapped, step.jitted(state)), StepArguments(state, frozen, batch)


def row_shapes(config: Any, model: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of one example of the config's task."""
    image = (*model.config.image, model.config.channels) if hasattr(model.config, "image") else ()
    row = empty_row(config, classes=len(getattr(model.config, "labels", ())), image=image)
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in row.items()}


def count_positions(model: Any, batch: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """Return the number of positions in a batch, padding included: tokens of an encoder-decoder's encoder or of any
    other text model, patches and class tokens of an image model."""
    if "pixels" in batch:
        return math.prod(batch["pixels"].shape[:2]) * (1 + int(model.config.patches))
    return math.prod(batch["tokens"].shape)


def _placed(value: Any, axes: Sequence[str | None], mesh: Mesh) -> Any:
    """The shapes of a parameter's arrays (a quantized one has several), with the shardings of its logical axes."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        value,
        sharding.placement(value, axes, mesh),
    )
