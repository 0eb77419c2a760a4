"""Models with random weights, and the parts of a model that its checkpoint lacks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from peftjax import quant, sharding
from peftjax.core import variables
from peftjax.io.entries import entries
from peftjax.io.formats import encoders
from peftjax.io.hf_config import read_config
from peftjax.io.hf_files import resolve


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
    head: str | None = None,
    labels: int | Sequence[str] | None = None,
    problem_type: str | None = None,
    new_head: bool = False,
    seed: int = 0,
) -> Any:
    """A model with random weights, from the config.json of a directory alone; born sharded over `mesh`. The other
    arguments are those of `load_model`."""
    directory = resolve(path, revision)
    chosen = {"head": head, "labels": labels, "problem_type": problem_type, "new_head": new_head}
    config, packed = read_config(directory, dtype, param_dtype, remat, chosen)
    if packed and not quantize:
        raise ValueError(f'{directory} is quantized; for random weights say so by quantize="nf4"')
    model = nnx.eval_shape(lambda: config.make(nnx.Rngs(0)))
    paths = list(variables.flat(model)[1])
    variables.update(model, make(config, paths, mesh or one_device(), seed, quantize, skip))
    return model


def make(
    config: Any, paths: Sequence[str], mesh: Mesh, seed: int, quantize: str | None = None, skip: Sequence[str] = ()
) -> variables.FlatTree:
    """Values of some variables, as a model of this config is born with; nothing else is computed."""
    if not paths:
        return {}
    axes: dict[str, Any] = {}

    def make() -> variables.FlatTree:
        made = variables.flat(make_quantized(config, quantize, skip, seed))[1]
        axes.update({path: made[path].axes for path in paths})
        return {path: made[path].get_value() for path in paths}

    shardings = {path: sharding.placement(leaf, axes[path], mesh) for path, leaf in jax.eval_shape(make).items()}
    return jax.jit(make, out_shardings=shardings)()


def make_quantized(config: Any, quantize: str | None, skip: Sequence[str], seed: int) -> Any:
    """A model of a family's `config` with random weights, its kernels quantized as by `load_model`; to be traced."""
    model = config.make(nnx.Rngs(seed))
    leaves = variables.flat(model)[1]
    chosen = encoders(model, entries(model), quantize, skip)
    variables.update(model, {path: quant.quantize(leaves[path].get_value(), quantize or "") for path in chosen})
    return model


def one_device() -> Mesh:
    return sharding.make_mesh(devices=jax.local_devices()[:1])  # jax.devices()[0] may be another process's
