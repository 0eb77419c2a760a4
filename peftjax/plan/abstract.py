"""The train step of a config from shapes alone: traced, not compiled, with no weights anywhere."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from peftjax import methods, sharding
from peftjax.adapters.attach import attach_unchecked
from peftjax.core import config as configs
from peftjax.core import variables
from peftjax.data.rows import empty_row
from peftjax.io.bitsandbytes import check_config
from peftjax.io.random_model import make_quantized
from peftjax.models import from_hf_config
from peftjax.plan import jaxpr_cost as cost
from peftjax.tasks import base as tasks
from peftjax.training.step import TrainState, abstract_state, prepare

Arguments = tuple[TrainState, variables.FlatTree, dict[str, jax.ShapeDtypeStruct]]  # state, frozen, batch


def abstract_model(config: Any, hf_config: Mapping[str, Any]) -> Any:
    """The model that `config` trains, quantized and with its adapters, as shapes. Outside of any `jax.set_mesh`: within,
    `nnx.eval_shape` would make a plain array of a quantized kernel."""
    dtype, param_dtype, remat = (config.model[field] for field in ("dtype", "param_dtype", "remat"))
    fields = dict(hf_config)
    stored = fields.pop("quantization_config", None)  # a directory that is quantized already
    quantize = config.model.quantize
    if stored:
        check_config(stored, config.model.path)
        quantize = "nf4" if stored.get("bnb_4bit_use_double_quant") else "nf4_single"
    head = tasks.head_options(config, config.task.labels)
    family = from_hf_config(fields, dtype=dtype, param_dtype=param_dtype, remat=remat, **head)
    method = methods.from_config(config.method).tokenized(lambda text: [0])  # which tokens does not change a shape

    def make() -> Any:
        model = make_quantized(family, quantize or None, config.model.skip_quantize, config.seed)
        method.check(model)
        # `attach` would ask for the data or the kernels that the adapters begin with, which do not change their shapes
        return attach_unchecked(model, method, "default", rngs=nnx.Rngs(config.seed))

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
    return step.jitted(state), (state, frozen, batch)


def place(value: Any, axes: Sequence[str | None], mesh: Mesh) -> Any:
    """Shapes with the places that `sharding.placement` gives them."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        value,
        sharding.placement(value, axes, mesh),
    )


@dataclasses.dataclass(frozen=True)
class Sketch:
    """A train step that is traced, not compiled."""

    model: Any
    arguments: Arguments
    traced: Any
    groups: dict[str, int]  # bytes of a device's share of the arguments, by what they are
    gradients: int  # bytes of a device's share of them
    live: int  # `cost.live_bytes` over the number of devices: an estimate of the temporaries

    @property
    def needed(self) -> int:
        return sum(self.groups.values()) + self.live


def sketch(config: Any, hf_config: Mapping[str, Any], mesh: Mesh) -> Sketch:
    """The train step of `config` on a mesh, traced.

    Raises:
        UserError: as `tasks.check_length`, building the model and attaching the method do.
    """
    model = abstract_model(config, hf_config)
    tasks.check_length(config, model, mesh)
    with jax.set_mesh(mesh):
        step, arguments = abstract_step(config, model, mesh)
        traced = step.trace(*arguments)
    state, frozen, batch = arguments
    base = {path for path, leaf in variables.flat(model)[1].items() if type(leaf) is nnx.Param}
    full = methods.from_config(config.method).trains is nnx.Param
    groups = {
        "frozen base": _share([leaf for path, leaf in frozen.items() if path in base]),
        "adapters' frozen parts": _share([leaf for path, leaf in frozen.items() if path not in base]),
        "parameters, all trained" if full else "adapters": _share(state.trainable),
        "optimizer state": _share((state.step, state.optimizer, state.key)),
        "batch": _share(batch),
    }
    return Sketch(
        model=model,
        arguments=arguments,
        traced=traced,
        groups={name: size for name, size in groups.items() if size},
        gradients=_share(state.trainable, 32 if config.train.accumulate > 1 else 0),
        live=cost.live_bytes(traced.jaxpr.jaxpr) // mesh.size,
    )


def _share(tree: Any, bits: int = 0) -> int:
    """Bytes of what one device holds of the leaves, an element in so many bits, or in its own number (4 of int4)."""
    leaves = jax.tree.leaves(tree)
    return sum(
        -(-math.prod(leaf.sharding.shard_shape(leaf.shape)) * (bits or cost.bits(leaf.dtype)) // 8) for leaf in leaves
    )


def changed(config: Any, **fields: Any) -> Any:
    """The config with other values of some fields, named as in model__remat="block", or of a whole section."""
    values = config.to_dict()
    for name, value in fields.items():
        section, _, field = name.partition("__")
        values[section] = values[section] | {field: value} if field else value
    return configs.validate(values, method_defaults=methods.method_defaults)


def full_fine_tuning(config: Any) -> Any:
    """The same training without a method."""
    return changed(config, method=methods.method_defaults("full"), model__quantize="", model__skip_quantize=())
