"""T5 beside transformers and peft: states and logits, files both ways, generation, and steps of training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

import peftjax
from peftjax import methods
from peftjax.core import variables
from peftjax.generate import generate
from peftjax.losses import seq2seq_loss
from peftjax.models.t5 import buckets_of_distances
from tests.interop.peers import STEPS, THEIRS, adamw, assert_close, assert_far, attached, optimizer_for, shake

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings(*THEIRS)]
torch.set_num_threads(1)

LAYERS, TOKENS = 3, 5
VARIANTS: dict[str, dict[str, Any]] = {
    "v1.0": {"d_kv": 8},
    "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "d_kv": 6, "num_decoder_layers": 2},
}


@pytest.fixture(scope="session")
def t5s(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Random T5s of both versions, made once."""
    folder = tmp_path_factory.mktemp("t5s")

    def base(name: str) -> Path:
        if not (folder / name).exists():
            save_base(folder / name, transformers.T5Config, transformers.T5ForConditionalGeneration, VARIANTS[name])
        return folder / name

    return base


def save_base(path: Path, make_config: Any, make_model: Any, fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "d_model": 32, "d_ff": 40, "num_layers": LAYERS, "num_heads": 4}
    buckets = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
    config = make_config(**sizes | buckets | {"decoder_start_token_id": 0} | fields)
    model = make_model(config)
    if "gated" in config.feed_forward_proj:  # released with a head of its own, whatever its config.json says
        model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(48, 32))
    shake(dict(model.named_parameters()), 0.1)
    model.save_pretrained(path)


def load_theirs(path: Path) -> Any:
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(path).eval()


def inputs(seed: int = 3) -> dict[str, np.ndarray]:
    """Two texts, the second of them padded on the right, and two targets."""
    rng = np.random.default_rng(seed)
    mask = np.arange(20)[None] < np.array([[20], [13]])
    return {
        "tokens": rng.integers(2, 48, (2, 20)),
        "mask": mask,
        "decoder_tokens": np.pad(rng.integers(2, 48, (2, 15)), ((0, 0), (1, 0))),
    }


def call_theirs(model: Any, given: dict[str, np.ndarray], **options: Any) -> Any:
    return model(
        input_ids=torch.tensor(given["tokens"]),
        attention_mask=torch.tensor(given["mask"].astype(np.int64)),
        decoder_input_ids=torch.tensor(given["decoder_tokens"]),
        **options,
    )


def logits(model: Any) -> np.ndarray:
    if isinstance(model, nnx.Module):
        return np.asarray(model(**{name: jnp.asarray(value) for name, value in inputs().items()}))
    with torch.no_grad():
        return call_theirs(model, inputs()).logits.numpy()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_state_and_the_logits_are_those_of_transformers(name: str, t5s: Callable) -> None:
    theirs, ours, given = load_theirs(t5s(name)), peftjax.load_model(t5s(name)), inputs()
    with torch.no_grad():
        expected = call_theirs(theirs, given, output_hidden_states=True)
    real = given["mask"]
    # Within the stack: the first blocks alone, with the bias that all share.
    places = {"encoder": 20, "decoder": 16}
    bias = {
        stack: getattr(ours, f"{stack}_bias")(jnp.arange(length), jnp.arange(length), jnp.float32)
        for stack, length in places.items()
    }
    for stack, length in places.items():
        attention = getattr(theirs, stack).block[0].layer[0].SelfAttention
        np.testing.assert_allclose(
            bias[stack], attention.compute_bias(length, length).detach(), atol=1e-6, err_msg=stack
        )
    first = {stack: first_layer(getattr(ours, stack)) for stack in places}
    keys = jnp.asarray(real)[:, None, None]
    before = [
        jnp.asarray(states[0].numpy()) for states in (expected.encoder_hidden_states, expected.decoder_hidden_states)
    ]
    after = [states[1].numpy() for states in (expected.encoder_hidden_states, expected.decoder_hidden_states)]
    assert_close(np.asarray(first["encoder"](before[0], keys, bias["encoder"]))[real], after[0][real])
    memory = jnp.asarray(expected.encoder_last_hidden_state.numpy())
    causal = jnp.tril(jnp.ones((16, 16), bool))[None, None]
    cross = first["decoder"].cross.keys_values(memory)
    assert_close(first["decoder"](before[1], causal, bias["decoder"], cross, keys, None, 0)[0], after[1])
    states, _ = ours.encode(jnp.asarray(given["tokens"]), mask=jnp.asarray(real))
    assert_close(np.asarray(states)[real], memory.__array__()[real])
    got = logits(ours)
    assert np.abs(expected.logits.numpy()).max() > 1
    assert np.abs(got - expected.logits.numpy()).max() < 1e-5


def first_layer(stack: Any) -> Any:
    graph, leaves = variables.flat(stack)
    return variables.merge(graph, {path: leaf.get_value()[0] for path, leaf in leaves.items()})
