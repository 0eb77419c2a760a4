"""Models small enough that a test takes no time."""

import dataclasses
import functools
import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from tokenizers import decoders, models, pre_tokenizers

from peftjax.core import variables
from peftjax.io.save import save_model
from peftjax.models import from_hf_config
from peftjax.nn.experts import ExpertLinear
from peftjax.nn.linear import Linear
from peftjax.nn.routing import Router
from peftjax.quant import FORMATS
from peftjax.report.data import tree_bytes

CONFIG = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
VIT: dict[str, Any] = {
    "model_type": "vit",
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}


def model(seed: int = 0, *, dtype: str = "float32", remat: str = "none", **fields: Any) -> Any:
    """A random Llama of 3 layers; `fields` replace those of its config.json."""
    return make(from_hf_config(CONFIG | fields, dtype=dtype, remat=remat), seed)


def make(config: Any, seed: int = 0) -> Any:
    """A random model of any configuration, made by one program: `config.make` would compile hundreds."""
    return nnx.merge(*_made(config, seed), copy=True)


def quantized(model: Any, format_: str = "nf4") -> Any:
    """The model with every linear kernel but the head's in a number format, as `load_model(quantize=...)` has it."""
    for path, module in nnx.iter_modules(model):
        kernel = getattr(module, "kernel", None) if isinstance(module, Linear | ExpertLinear) else None
        if (
            kernel is not None
            and not isinstance(module, Router)
            and ".".join(map(str, path)) not in model.output_layers
        ):
            kernel.set_value(_encode(kernel.get_value(), format_))
    return model


@partial(jax.jit, static_argnums=1)
def _encode(kernels: jax.Array, format_: str) -> Any:
    encode = FORMATS[format_]
    for _ in kernels.shape[:-2]:  # of all layers and experts
        encode = jax.vmap(encode)
    return encode(kernels)


@functools.cache
def _made(config: Any, seed: int) -> tuple[nnx.GraphDef, nnx.State]:
    graph, shapes = nnx.split(config.abstract())
    weights = _weights(dataclasses.replace(config, remat="none", dtype="float32", param_dtype="float32"), seed)
    # on the host: jax would compile a conversion for each shape
    return graph, jax.tree.map(lambda leaf, own: jnp.asarray(np.asarray(leaf).astype(own.dtype)), weights, shapes)


@functools.cache
def _weights(config: Any, seed: int) -> nnx.State:
    """The weights of `config.make`, with numpy's random numbers: programs that draw many take seconds to compile."""
    mark = np.float32(2.0**60)
    with mock.patch.object(jax.random, "normal", lambda key, shape, dtype: jnp.full(shape, mark, dtype)):
        state = jax.jit(lambda: nnx.split(config.make(nnx.Rngs(seed)))[1])()
    rng = np.random.default_rng(seed)

    def drawn(leaf: jax.Array) -> jax.Array:
        if leaf.dtype != jnp.float32 or (deviation := np.asarray(leaf) / mark).max(initial=0) < 1e-9:
            return leaf
        return jnp.asarray(deviation * rng.standard_normal(leaf.shape, np.float32))

    return jax.tree.map(drawn, state)


def directory(path: Path, seed: int = 0) -> Path:
    """A Hugging Face directory: the model with random weights, and a tokenizer whose tokens are bytes."""
    if not path.exists():
        write_tokenizer(path)
        config = CONFIG | {"vocab_size": 257, "eos_token_id": 256, "architectures": ["LlamaForCausalLM"]}
        save_model(make(from_hf_config(config), seed), path.with_name("weights"))
        for file in path.with_name("weights").iterdir():
            file.rename(path / file.name)
    return path


def write_tokenizer(path: Path) -> None:
    """tokenizer.json and tokenizer_config.json of a tokenizer with one token for each byte, and <eos>."""
    path.mkdir(parents=True)
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<eos>", "pad_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"})
    )


# drawn and sliced with numpy, here and below: jax would compile a program for each shape
def tokens(seed: int = 0, shape: tuple[int, int] = (4, 8)) -> jax.Array:
    return jnp.asarray(_drawn(np.random.default_rng(seed), shape))


def batch(seed: int = 0, shape: tuple[int, int] = (4, 8)) -> dict[str, jax.Array]:
    """Random tokens to be predicted from the ones before, a few of them without loss."""
    rng = np.random.default_rng(seed)
    drawn = _drawn(rng, (shape[0], shape[1] + 1))
    weights = (rng.uniform(size=shape) > 0.2).astype(np.float32)
    return jax.tree.map(jnp.asarray, {"tokens": drawn[:, :-1], "targets": drawn[:, 1:], "loss_weights": weights})


def _drawn(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.integers(CONFIG["vocab_size"], size=shape, dtype=np.int32)


def randomize(model: Any, kind: type = variables.PeftParam, seed: int = 5, scale: float = 0.1) -> Any:
    """Give every variable of a kind random values, as if it had been trained."""
    _, leaves = variables.flat(model)
    rng = np.random.default_rng(seed)
    chosen = {
        path: jnp.asarray((scale * rng.normal(size=leaf.shape)).astype(leaf.dtype))
        for path, leaf in leaves.items()
        if type(leaf) is kind
    }
    variables.update(model, chosen)
    return model


def bits(model: Any, kind: type = nnx.Param) -> dict[str, bytes]:
    """The bytes of every variable of a kind, by path."""
    return {path: in_bytes(leaf.get_value()) for path, leaf in variables.flat(model)[1].items() if type(leaf) is kind}


def in_bytes(value: Any) -> bytes:
    """Of an array, or of every leaf of a quantized kernel."""
    return b"".join(leaf.tobytes() for leaf in jax.tree.leaves(value))


def on_a_device() -> int:
    """Bytes of the arrays alive, of each what the device with the most of it holds."""
    parts = (jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype) for x in jax.live_arrays())
    return tree_bytes(list(parts))
