"""Make models with random weights, and the parts of a model that its checkpoint lacks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import jax
from flax import nnx
from jax.sharding import Mesh

from peftjax import quant, sharding
from peftjax.core import variables
from peftjax.core.errors import UserError
from peftjax.core.paths import matches
from peftjax.io.entries import Entry, entries
from peftjax.io.experts import single_names
from peftjax.io.formats import encoders
from peftjax.io.hf_config import PACKED, read_config, stored_quantization
from peftjax.io.hf_files import find_model
from peftjax.io.resize import resized
from peftjax.models.base import Model, ModelConfig
from peftjax.models.heads import HeadOptions


def make_random(
    path: str | Path,
    dtype: str = "float32",
    quantize: str | None = None,
    *,
    param_dtype: str | None = None,
    mesh: Mesh | None = None,
    revision: str | None = None,
    remat: str = "none",
    skip: Sequence[str] = (),
    resize_embeddings: int | None = None,
    seed: int = 0,
    **head: Unpack[HeadOptions],
) -> Model:
    """Make a model with random weights from a directory's config.json, sharded over `mesh` from the start.

    Takes the arguments of `load_model`.

    Raises:
        UserError: As `load_model`, except that no weights are read; or the directory is quantized and `quantize` is None.
    """
    directory = find_model(path, revision)
    config, quantization = read_config(directory, dtype, param_dtype, remat, head)
    if quantization and not quantize and stored_quantization(directory):
        raise UserError(f'{directory} is quantized; to make random weights pass quantize="nf4"')
    config = resized(config, resize_embeddings)
    model = config.abstract()
    paths = list(variables.flat(model)[1])
    variables.update(model, make(config, paths, mesh or one_device(), seed, quantize, skip))
    return model


def make(
    config: ModelConfig,
    paths: Sequence[str],
    mesh: Mesh,
    seed: int,
    quantize: str | None = None,
    skip: Sequence[str] = (),
) -> variables.FlatTree:
    """Make the initial values of some variables of a model, sharded over `mesh`, without computing the others."""
    if not paths:
        return {}
    axes: dict[str, Any] = {}

    def make() -> variables.FlatTree:
        made = variables.flat(make_quantized(config, quantize, skip, seed))[1]
        axes.update({path: made[path].axes for path in paths})
        return {path: made[path].get_value() for path in paths}

    shardings = {path: sharding.placement(leaf, axes[path], mesh) for path, leaf in jax.eval_shape(make).items()}
    return jax.jit(make, out_shardings=sharding.as_jit_returns(shardings))()


def draw_again(model: Model, mesh: Mesh, seed: int) -> None:
    """Redraw the parameters that the checkpoint lacks, in place, as `load_model` draws them with another seed."""
    if model.origin:
        variables.update(model, make(model.config, model.origin.drawn, mesh, seed))


def make_quantized(
    config: ModelConfig,
    quantize: str | None,
    skip: Sequence[str],
    seed: int,
    stored: Mapping[str, Any] | None = None,
) -> Model:
    """Make a model with random weights, its kernels quantized as by `load_model`. Meant to be traced.

    The kernels of a bitsandbytes directory have formats already: its `stored_quantization` replaces `quantize` and `skip`.
    """
    model = config.make(nnx.Rngs(seed))
    leaves, table = variables.flat(model)[1], entries(model)
    formats = (
        _stored_formats(model, table, stored)
        if stored
        else dict.fromkeys(encoders(model, table, quantize, skip), quantize or "")
    )
    variables.update(model, {path: quant.quantize(leaves[path].get_value(), kind) for path, kind in formats.items()})
    return model


def _stored_formats(model: Model, table: Sequence[Entry], quantization: Mapping[str, Any]) -> dict[str, str]:
    """The formats in which the kernels of a bitsandbytes directory are loaded, by path.

    Without weights, all modules that config.json does not exclude count as quantized. Experts that are parameters of one
    module are not quantized.
    """
    kind = "nf4" if quantization.get("bnb_4bit_use_double_quant") else "nf4_single"
    skip = tuple(quantization.get("llm_int8_skip_modules") or ())
    expected = encoders(model, table, kind, ())
    packed = {model.hf_stored(name) for name in quantization.get(PACKED, ())}
    formats: dict[str, str] = {}
    for entry in table:
        singles = single_names(model, entry.keys[0])
        weight = singles[0][0] if singles else entry.keys[0]
        module = weight.removesuffix(".weight")
        if PACKED in quantization:
            quantized = weight in packed
        else:
            quantized = entry.path in expected and module != weight and not matches(module, skip)
        if quantized:  # the absmax of several projections in one kernel are decoded
            formats[entry.path] = "nf4_single" if singles and len(singles[0]) > 1 else kind
    return formats


def one_device() -> Mesh:
    """Return a mesh of one device of this process."""
    return sharding.make_mesh(devices=jax.local_devices()[:1])  # jax.devices()[0] may be another process's
