"""The train step of a config from shapes alone, to be compiled for devices that need not be there."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from peftjax import methods, sharding, tasks
from peftjax.core import variables
from peftjax.data.rows import empty_row
from peftjax.io.hf_model import make_quantized
from peftjax.models import from_hf_config
from peftjax.step import TrainState, abstract_state, prepare

Arguments = tuple[TrainState, variables.FlatTree, dict[str, jax.ShapeDtypeStruct]]  # state, frozen, batch


def abstract_model(config: Any, hf_config: dict[str, Any]) -> Any:
    """The model that `config` trains, quantized and with its adapters, as shapes. Outside of any `jax.set_mesh`: within,
    `nnx.eval_shape` would make a plain array of a quantized kernel."""
    dtype, param_dtype, remat = (config.model[field] for field in ("dtype", "param_dtype", "remat"))
    head = tasks.head_options(config, config.task.labels)
    family = from_hf_config(hf_config, dtype=dtype, param_dtype=param_dtype, remat=remat, **head)
    method = methods.from_config(config.method)

    def make() -> Any:
        model = make_quantized(family, config.model.quantize or None, config.model.skip_quantize, config.seed)
        return methods.attach(model, method, rngs=nnx.Rngs(config.seed))

    return nnx.eval_shape(make)


def abstract_step(config: Any, model: Any, mesh: Mesh) -> tuple[Any, Arguments]:
    """The train step that `config` describes and its arguments (state, frozen, batch) as shapes with their places."""
    method = methods.from_config(config.method)
    model.train()
    _, leaves = variables.flat(model)
    variables.update(model, {path: place(leaf.get_value(), leaf.axes, mesh) for path, leaf in leaves.items()})
    loss = tasks.of(config).totals(config.train.loss_chunk)
    step, state, frozen = prepare(config, model, method, loss, abstract_state)
    image = (*model.config.image, model.config.channels) if hasattr(model.config, "image") else ()
    row = empty_row(config, classes=len(getattr(model.config, "labels", ())), image=image)
    lead = (config.train.accumulate, config.train.batch_size // config.train.accumulate)
    batch = {
        name: place(jax.ShapeDtypeStruct((*lead, *array.shape), array.dtype), sharding.batch_axes(array.ndim), mesh)
        for name, array in row.items()
    }
    return step, (state, frozen, batch)


def place(value: Any, axes: Sequence[str | None], mesh: Mesh) -> Any:
    """Shapes with the places that `sharding.placement` gives them."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        value,
        sharding.placement(value, axes, mesh),
    )
