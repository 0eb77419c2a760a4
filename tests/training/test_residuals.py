"""What a train step keeps for its backward pass: every activation once, and no copy of the frozen base."""

from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from peftjax import adapters, methods, sharding
from peftjax.core import variables
from peftjax.models import from_hf_config
from peftjax.models.base import no_mesh
from peftjax.totals import next_token_loss
from peftjax.training.abstract import place_shapes
from peftjax.training.step import Objective, abstract_state, make_train_step
from tests import tiny

LAYERS, ROWS, LENGTH, EMBED, MLP, HEADS, RANK = 3, 2, 8, 64, 192, 4, 4
SIZES: dict[str, Any] = {
    "hidden_size": EMBED,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
}
MESH = sharding.make_mesh({"fsdp": 1}, devices=jax.devices()[:1])
FORMATS = ["float32", "bfloat16", "nf4", pytest.param("nf4_single", marks=pytest.mark.slow), "int8"]


def step_of(format_: str, remat: str, **sizes: Any) -> tuple[Any, Any, Any, Any, Any]:
    """(objective, optimizer, state, frozen, batch) for LoRA on a base in the given format, computed in bfloat16: shapes."""
    dtype = "float32" if format_ == "float32" else "bfloat16"
    config = from_hf_config(tiny.CONFIG | SIZES | sizes, dtype=dtype, remat=remat)

    def make() -> Any:
        model = config.make(nnx.Rngs(0))
        for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            variable.set_value(variable.get_value().astype(dtype))
        if format_ not in ("float32", "bfloat16"):
            tiny.quantized(model, format_)
        return adapters.attach(model, methods.Lora(rank=RANK, targets="all-linear"), rngs=nnx.Rngs(1))

    with no_mesh():
        model = nnx.eval_shape(make)
    place_shapes(model, MESH)
    graph, trainable, frozen = variables.split_by_kind(model)
    tx = optax.sgd(1.0)
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    batch = {"tokens": tokens, "targets": tokens, "loss_weights": jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.float32)}
    objective = Objective(graph, partial(next_token_loss, chunk=LENGTH))
    return objective, tx, abstract_state(trainable, tx), frozen, batch


def kept(format_: str, remat: str) -> Counter:
    """The shapes of the stacked results of the forward pass's loop over layers."""
    objective, _, state, frozen, batch = step_of(format_, remat)
    with jax.set_mesh(MESH):
        traced = jax.make_jaxpr(jax.grad(objective, has_aux=True))(state.trainable, frozen, batch)
    forward = next(eqn for eqn in traced.eqns if eqn.primitive.name == "scan")
    shapes = [(str(value.aval.dtype), value.aval.shape) for value in forward.outvars]
    return Counter(shape for shape in shapes if shape[1][:1] == (LAYERS,))


@pytest.mark.parametrize("format_", FORMATS)
def test_the_forward_pass_keeps_every_activation_once_and_nothing_of_the_base(format_: str) -> None:
    dtype = "float32" if format_ == "float32" else "bfloat16"
    each = (LAYERS, ROWS, LENGTH)
    assert kept(format_, "none") == {
        (dtype, (*each, EMBED)): 5,  # the inputs of both norms, of query, key and value, of out, of gate and up
        (dtype, (*each, HEADS, EMBED // HEADS)): 3,  # query, key and value
        (dtype, (*each, MLP)): 3,  # gate, up and the input of down
        (dtype, (*each, RANK)): 7,  # x A, scaled, of seven layers
    }


@pytest.mark.slow_cases
@pytest.mark.parametrize("format_", FORMATS)
def test_with_rematerialization_the_forward_pass_keeps_what_its_policy_names(format_: str) -> None:
    dtype = "float32" if format_ == "float32" else "bfloat16"
    each = (LAYERS, ROWS, LENGTH)
    assert kept(format_, "block") == kept(format_, "offload") == {(dtype, (*each, EMBED)): 1}
    # "dots": the input, and the outputs of all linear layers except the last of the seven, which is not needed
    assert kept(format_, "dots") == {(dtype, (*each, EMBED)): 5, (dtype, (*each, MLP)): 2}


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots", "block"])
@pytest.mark.parametrize("format_", FORMATS)
def test_temporaries_are_a_small_part_of_the_base(format_: str, remat: str) -> None:
    """8 layers of width 512 and 16 positions: a float32 copy of the base would be twice the base in bfloat16, or more."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 48}
    objective, tx, state, frozen, batch = step_of(format_, remat, **sizes)
    microbatches = {name: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype) for name, leaf in batch.items()}
    compiled = make_train_step(objective, tx, state).lower(state, frozen, microbatches).compile()
    weights = 8 * (4 * 512 * 512 + 3 * 512 * 1024)
    bits = {"float32": 32, "bfloat16": 16, "nf4": 4.127, "nf4_single": 4.5, "int8": 8}[format_]
    memory = compiled.memory_analysis()
    assert memory is not None
    decoded = 4 * 512 * 1024 * 4  # four kernels in float32
    assert memory.temp_size_in_bytes < 0.25 * weights * bits / 8 + decoded
