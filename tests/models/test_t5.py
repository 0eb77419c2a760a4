"""T5 by itself: its config.json, its cache, its dropout, and methods in two stacks. Equality with transformers and peft
is in tests/interop."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import peftjax
from peftjax import adapters, methods
from peftjax.core import variables
from peftjax.decoding import generate_ids
from peftjax.models import from_hf_config
from peftjax.nn.dropout import with_dropout_keys
from peftjax.sampling import Sampling
from peftjax.totals import seq2seq_loss
from tests import tiny

CONFIG = {
    "model_type": "t5",
    "vocab_size": 48,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
D, F, L = 16, 24, 2


def model(**fields: Any) -> Any:
    return tiny.make(from_hf_config(CONFIG | fields))


def inputs() -> dict[str, jax.Array]:
    """Two texts, the second of them padded on the right, and two targets."""
    return {
        "tokens": tiny.tokens(shape=(2, 9)),
        "mask": jnp.arange(9)[None] < jnp.array([[9], [5]]),
        "decoder_tokens": tiny.tokens(1, (2, 7)),
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"feed_forward_proj": "gated-swiglu"}, "unknown feed_forward_proj 'gated-swiglu'"),
        ({"dense_act_fn": "gelu"}, "dense_act_fn='gelu' contradict feed_forward_proj='relu'"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder=false"),
        ({"relative_attention_max_distance": 4}, "relative_attention_max_distance=4 more than half of it"),
        ({"sliding_window": 4}, "sliding_window=4: transformers reads this for model_type 't5'"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused_by_name(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf_config(CONFIG | fields)


def test_each_version_says_its_head_and_its_scaling_in_its_own_way() -> None:
    def head(**fields: Any) -> tuple[bool, bool]:
        config = from_hf_config(CONFIG | fields)
        again = from_hf_config(config.to_hf())
        assert dataclasses.replace(again, hf="") == dataclasses.replace(config, hf="")
        return config.tied, config.scaled

    assert head() == (True, True)
    assert head(tie_word_embeddings=False) == (False, False)  # v1.1 as released
    assert head(tie_word_embeddings=True, scale_decoder_outputs=False) == (False, False)  # v1.1 by transformers 5
    assert head(model_type="mt5") == (True, False)


@pytest.mark.slow
def test_a_mask_of_numbers_equals_one_of_booleans() -> None:
    model, tokens = tiny.make(from_hf_config(CONFIG)), tiny.tokens(shape=(2, 4))
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1]])
    expected = model(tokens, mask=jnp.asarray(mask, bool), decoder_tokens=tokens)
    np.testing.assert_array_equal(model(tokens, mask=mask, decoder_tokens=tokens), expected)


@pytest.mark.slow
def test_a_target_read_in_parts_has_the_states_of_the_whole() -> None:
    whole = model(num_decoder_layers=3)
    given = inputs()
    decode = nnx.jit(lambda model, tokens, cache: model.decode(tokens, cache))
    cache, parts = nnx.jit(lambda model: model.make_cache(given["tokens"], given["mask"], 9))(whole), []
    for start, stop in ((0, 6), (6, 7)):
        states, cache = decode(whole, given["decoder_tokens"][:, start:stop], cache)
        parts.append(states)
    expected = nnx.jit(lambda model: model.hidden(**given))(whole)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, atol=1e-5)


def test_the_loss_is_that_of_the_logits_at_the_targets() -> None:
    given = inputs()
    targets = jnp.roll(given["decoder_tokens"], -1, axis=1)
    weights = jnp.ones(targets.shape).at[1, 4:].set(0)
    totals = seq2seq_loss(model(), given | {"targets": targets, "loss_weights": weights}, 3)
    scores = jax.nn.log_softmax(model()(**given))
    expected = -(weights * jnp.take_along_axis(scores, targets[..., None], axis=2)[..., 0]).sum()
    np.testing.assert_allclose(totals.loss, expected, rtol=1e-5)


@pytest.mark.slow
def test_dropout_draws_by_its_keys_in_training_and_is_absent_in_evaluation(tmp_path: Path) -> None:
    peftjax.save_model(model(), tmp_path)
    loaded, given = peftjax.load_model(tmp_path), inputs()
    expected = model()(**given)
    np.testing.assert_array_equal(loaded(**given), expected)
    loaded.train()
    graph, leaves = variables.flat(loaded)
    tree = {path: leaf.get_value() for path, leaf in leaves.items()}
    keys = tuple(path for path, leaf in leaves.items() if isinstance(leaf, variables.DropoutKey))
    assert len(keys) == 4 + 4 + 6  # at both ends of both stacks, and in their blocks

    @jax.jit
    def drawn(key: jax.Array) -> jax.Array:
        return variables.join(graph, with_dropout_keys(tree, keys, key))(**given)

    one, other = drawn(jax.random.key(1)), drawn(jax.random.key(2))
    assert np.abs(one - other).max() > 1e-2
    np.testing.assert_array_equal(one, drawn(jax.random.key(1)))
    never = model(dropout_rate=1e-9)  # zeroes nothing, and computes attention as in training
    never.train()
    np.testing.assert_allclose(never(**given), expected, atol=1e-5)


METHODS = {
    "lora": (methods.Lora(rank=2, targets=("q", "wo")), 2 * L * (3 * (D + D) + 2 * (F + D))),
    "houlsby": (methods.Houlsby(reduction_factor=4), 4 * L * (2 * D * 4 + 4 + D)),
    "pfeiffer": (methods.Pfeiffer(reduction_factor=4), 2 * L * (2 * D * 4 + 4 + D)),
    "prompt": (methods.PromptTuning(tokens=3), 3 * D),
    "projected": (methods.PrefixTuning(tokens=3, projection=True, hidden=4), None),
}


@pytest.mark.slow_cases
@pytest.mark.filterwarnings("ignore:adapter_config.json. .* describes how the adapter was trained")  # by a projection
@pytest.mark.parametrize("name", METHODS)
def test_adapters_sit_in_both_stacks_and_go_through_their_files(name: str, tmp_path: Path) -> None:
    method, trained = METHODS[name]
    adapted = tiny.randomize(adapters.attach(model(), method, rngs=nnx.Rngs(0)))
    assert trained is None or adapters.count_trainable(adapted) == trained
    with_adapters = adapted(**inputs())
    assert np.abs(with_adapters - model()(**inputs())).max() > 1e-3
    peftjax.save_adapter(adapted, tmp_path / "adapter")
    again = peftjax.load_adapter(model(), tmp_path / "adapter")
    np.testing.assert_allclose(again(**inputs()), with_adapters, atol=1e-5)


@pytest.mark.slow
def test_a_soft_prompt_does_what_its_vectors_do_as_tokens_of_the_vocabulary() -> None:
    given = inputs()
    prompted = adapters.attach(model(), methods.PromptTuning(init="text", text_ids=(7, 3), tokens=2), rngs=nnx.Rngs(0))
    longer = jnp.concatenate([jnp.broadcast_to(jnp.array([[7, 3]]), (2, 2)), given["tokens"]], axis=1)
    mask = jnp.pad(given["mask"], ((0, 0), (2, 0)), constant_values=True)
    expected = model()(longer, mask=mask, decoder_tokens=given["decoder_tokens"])
    np.testing.assert_allclose(prompted(**given), expected, atol=1e-5)
    prompts = [[5, 9, 2, 11], [1, 30]]
    with_prompt = generate_ids(prompted, prompts, max_new_tokens=6, sampling=Sampling(1.0), seed=4)
    with_tokens = generate_ids(
        model(), [[7, 3, *prompt] for prompt in prompts], max_new_tokens=6, sampling=Sampling(1.0), seed=4
    )
    assert with_prompt == with_tokens


def test_a_merged_head_of_its_own_is_saved_beside_the_scaling(tmp_path: Path) -> None:
    adapted = tiny.randomize(adapters.attach(model(), methods.Lora(rank=2, targets=("lm_head",)), rngs=nnx.Rngs(0)))
    expected = adapted(**inputs())
    peftjax.save_model(adapters.merge(adapted), tmp_path)
    again = peftjax.load_model(tmp_path)
    assert not again.tied
    np.testing.assert_allclose(again(**inputs()), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "method", "message"),
    [
        (
            {"num_decoder_layers": 3},
            methods.PrefixTuning(),
            "as many layers in the encoder as in the decoder, as in peft; this model has 2 and 3",
        ),
        ({}, methods.Pfeiffer(leave_out=(1,)), "refers to the layers of a single stack, but this model has several"),
    ],
)
def test_what_two_stacks_make_ambiguous_is_refused(fields: dict, method: adapters.Method, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapters.attach(model(**fields), method, rngs=nnx.Rngs(0))


def test_a_batch_of_several_adapters_is_refused() -> None:
    adapted = adapters.attach(model(), methods.Lora(rank=2, targets=("q",)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="not supported for an encoder-decoder"):
        adapters.rows(adapted, ["default", None])
