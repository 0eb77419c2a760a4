"""Models small enough that a test takes no time."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.core import variables
from peftjax.models import from_hf_config

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


def model(seed: int = 0, *, dtype: str = "float32", remat: str = "none", **fields: Any) -> Any:
    """A random Llama of 3 layers; `fields` replace those of its config.json."""
    return nnx.merge(*_made(from_hf_config(CONFIG | fields, dtype=dtype, remat=remat), seed))


@functools.cache
def _made(config: Any, seed: int) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(config.make(nnx.Rngs(seed)))


def tokens(seed: int = 0, shape: tuple[int, int] = (4, 8)) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), shape, 0, CONFIG["vocab_size"])


def batch(seed: int = 0, shape: tuple[int, int] = (4, 8)) -> dict[str, jax.Array]:
    """Random tokens to be predicted from the ones before, a few of them without loss."""
    drawn = tokens(seed, (shape[0], shape[1] + 1))
    weights = (jax.random.uniform(jax.random.key(seed + 1), shape) > 0.2).astype(jnp.float32)
    return {"tokens": drawn[:, :-1], "targets": drawn[:, 1:], "loss_weights": weights}


def randomize(model: Any, kind: type = variables.PeftParam, seed: int = 5, scale: float = 0.1) -> Any:
    """Give every variable of a kind random values, as if it had been trained."""
    _, leaves = variables.flat(model)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    chosen = {
        path: (scale * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)
        for key, (path, leaf) in zip(keys, leaves.items(), strict=True)
        if type(leaf) is kind
    }
    variables.update(model, chosen)
    return model


def bits(model: Any, kind: type = nnx.Param) -> dict[str, bytes]:
    """The bytes of every variable of a kind, by path."""
    return {path: leaf.get_value().tobytes() for path, leaf in variables.flat(model)[1].items() if type(leaf) is kind}
