"""Load base models from Hugging Face directories, one tensor at a time."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from peftjax.core import variables
from peftjax.core.errors import UserError
from peftjax.io import bitsandbytes, mxfp4
from peftjax.io.bitsandbytes import Stored
from peftjax.io.entries import entries, is_linear
from peftjax.io.experts import with_experts
from peftjax.io.formats import Encode, encoders, unpackers
from peftjax.io.hf_config import read_config, read_fields
from peftjax.io.hf_files import find_model
from peftjax.io.match import match, tied_as_stored
from peftjax.io.multimodal import text_tensors, warn_of_the_rest
from peftjax.io.place import ordered, read_parameter
from peftjax.io.random_model import make, one_device
from peftjax.io.resize import with_rows, with_stored_rows
from peftjax.io.safetensors_files import StoredTensor, read_tensors
from peftjax.models.base import Model, Origin
from peftjax.models.heads import HeadOptions
from peftjax.models.multimodal import text_config


def load_model(
    path: str | Path,
    dtype: DTypeLike = "float32",
    quantize: str | None = None,
    *,
    param_dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    revision: str | None = None,
    remat: str = "none",
    skip: Sequence[str] = (),
    head: str | None = None,
    labels: int | Sequence[str] | None = None,
    problem_type: str | None = None,
    new_head: bool = False,
    resize_embeddings: int | None = None,
    seed: int = 0,
) -> Model:
    """Load a model from a Hugging Face directory.

    Only the text model of a multimodal directory is loaded. A warning names the other parts, which `save_model` copies.
    Tensors are read one at a time, and each process reads only what its devices hold. Peak memory is the model plus up to about
    three times its largest tensor.

    Args:
        path: A directory, a hub id, or "embedded", the bundled model. A directory with kernels in bitsandbytes' NF4 is
            loaded as it is.
        dtype: Compute dtype: "float32", "bfloat16" or "float16", or a dtype such as `jnp.bfloat16`.
        quantize: Format of the kernels: "nf4", "nf4_single" (without double quantization) or "int8"; each is quantized
            as it is read. Norms, biases, embeddings and output layers stay in `param_dtype`, and so do the modules `wo` of
            a T5, as in transformers.
        param_dtype: Dtype of the parameters; default: `dtype`.
        mesh: Devices to shard over; default: one device.
        revision: Branch, tag or commit of a hub id.
        remat: Rematerialization in the backward pass: "none", "dots", "block" or "offload".
        skip: Modules to leave unquantized, whole names or name endings.
        head: Task head of an encoder: "sequence_classification", "token_classification", "image_classification" or
            "none"; default: the one in config.json. A head that the checkpoint does not have is initialized at random.
        labels: Number of outputs of a new head, or their names.
        problem_type: Problem type of a new head, as in transformers.
        new_head: Replace the checkpoint's own head with a new one.
        resize_embeddings: Number of tokens of the tokenizer (`tokenizer.vocab_size`). The embedding and the head get a row for
            each that has none: the mean of the old rows, as in transformers, but without its noise.
        seed: Random seed of new parameters.

    Returns:
        The model, in evaluation mode.

    Raises:
        UserError: The directory is missing or incomplete, the architecture or an option is not supported, tensors are
            missing or do not match config.json (one message names them all), a name in `skip` matches no kernel, or the directory
            is quantized in another format than bitsandbytes' NF4 or than `quantize`, or only in some layers.

    Examples:
        >>> import jax.numpy as jnp
        >>> import peftjax
        >>> from flax import nnx
        >>> model = peftjax.load_model("embedded")
        >>> model(jnp.array([[5, 6, 7]])).shape  # logits
        (1, 3, 1024)
    """
    dtype = _dtype_name(dtype)
    param_dtype = _dtype_name(param_dtype) if param_dtype is not None else None
    directory = find_model(path, revision)
    started = time.perf_counter()
    options: HeadOptions = {"head": head, "labels": labels, "problem_type": problem_type, "new_head": new_head}
    config, quantization = read_config(directory, dtype, param_dtype, remat, options)
    tensors = mxfp4.with_decoded_kernels(read_tensors(directory))
    if config.whole:
        warn_of_the_rest(tensors, directory)
        tensors = text_tensors(tensors)
    packed = bitsandbytes.is_packed(tensors, quantization, directory)
    if packed and skip:
        raise UserError(f"skip={tuple(skip)!r} (model.skip_quantize): {directory} is already quantized")
    stored: Mapping[str, Stored] = bitsandbytes.with_packed_kernels(tensors, quantize) if packed else tensors
    config = tied_as_stored(config, stored)
    model = config.abstract()
    table = entries(model)
    stored = with_experts(model, table, stored)
    encode: Mapping[str, Encode] = {} if packed else encoders(model, table, quantize, skip)
    matched = match(model, table, stored, directory)
    if packed:
        encode = unpackers(model, table, matched)
    mesh = mesh or one_device()
    kept = np.dtype(config.param_dtype)
    values = {
        entry.path: read_parameter(entry, [matched[key] for key in entry.keys], kept, mesh, encode.get(entry.path))
        for entry in table
        if entry.keys[0] in matched
    }
    leaves = variables.flat(model)[1]
    rest = [path for path in leaves if path not in values]  # new heads, and dropout keys
    variables.update(model, values, make(config, rest, mesh, seed))
    model = with_rows(model, resize_embeddings, mesh)
    jax.block_until_ready([variable.get_value() for variable in variables.flat(model)[1].values()])
    model.origin = Origin(
        str(path),
        {
            "revision": revision,
            "dtype": dtype,
            "param_dtype": param_dtype or "",
            "quantize": quantize or "",
            "skip_quantize": tuple(skip),
            "remat": remat,
            "resize_embeddings": resize_embeddings,
            "new_head": new_head,
        },
        time.perf_counter() - started,
        tuple(path for path in rest if type(leaves[path]) is nnx.Param),
    )
    return model


def _dtype_name(dtype: DTypeLike) -> str:
    """The name of a dtype, or the string that was given, which `read_config` checks."""
    try:
        return dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:
        raise UserError(f"dtype={dtype!r} is not a dtype") from None


def load_kernels(
    path: str | Path, model: Model, revision: str | None = None
) -> Callable[[str, int | None], np.ndarray]:
    """Return a function that reads one unquantized kernel of a quantized model, for `attach(kernels=...)`.

    Args:
        path: The directory or hub id that the model was quantized from.
        model: The quantized model.
        revision: Branch, tag or commit of a hub id.

    Returns:
        A function from a module's path and a layer (None if it is not stacked) to its kernel, float32 [in, out].

    Raises:
        UserError: The directory is quantized, or its tensors are not the model's.

    Examples:
        >>> import peftjax
        >>> from flax import nnx
        >>> model = peftjax.load_model("embedded", quantize="nf4")
        >>> kernels = peftjax.load_kernels("embedded", model)
        >>> method = peftjax.Lora(rank=4, init="loftq")
        >>> model = peftjax.attach(model, method, rngs=nnx.Rngs(0), kernels=kernels)
    """
    directory = find_model(path, revision)
    tensors = mxfp4.with_decoded_kernels(read_tensors(directory))
    fields, quantization = read_fields(directory)
    if bitsandbytes.is_packed(tensors, quantization, directory):
        raise UserError(f"{directory} is already quantized; give the directory of the original model")
    if model.config.whole:
        tensors = text_tensors(tensors)
        fields = text_config(fields)
    model = with_stored_rows(model, fields)
    table = entries(model)
    stored = match(model, table, with_experts(model, table, tensors), directory)
    of_module = {entry.module: entry for entry in table if is_linear(model, entry)}

    def read(module: str, layer: int | None) -> np.ndarray:
        entry = of_module[module]
        tensor = stored[entry.keys[layer or 0]]
        assert isinstance(tensor, StoredTensor)
        return ordered(np.asarray(tensor.open()[...], np.float32), entry.order)

    return read
