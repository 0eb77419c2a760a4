"""Soft prompts and prefixes: where they stand, what they are made of at the start, and what they refuse."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tests.tiny as tiny
from peftjax import adapters
from peftjax.decoding import generate_ids
from peftjax.methods import PrefixTuning, PromptTuning, PTuning

METHODS = {
    "prompt": PromptTuning(tokens=5),
    "prefix": PrefixTuning(tokens=5),
    "p_tuning": PTuning(tokens=5, hidden=8),
    "projected": PrefixTuning(tokens=5, projection=True),
}


ENCODED = [pytest.param(name, marks=pytest.mark.slow) for name in ("p_tuning", "projected")]  # compile more


@pytest.fixture(params=["prompt", "prefix", *ENCODED])
def method(request: pytest.FixtureRequest) -> adapters.Method:
    return METHODS[request.param]


def attached(method: adapters.Method, **fields: Any) -> Any:
    return adapters.attach(tiny.model(**fields), method, rngs=nnx.Rngs(1))


def mistral(window: int) -> dict[str, Any]:
    return {"model_type": "mistral", "sliding_window": window}


def test_a_soft_prompt_does_what_its_vectors_do_as_tokens_of_the_vocabulary() -> None:
    base = tiny.model()
    ids = jnp.array([7, 3, 11])
    tokens = tiny.tokens()
    longer = jnp.concatenate([jnp.broadcast_to(ids[None], (len(tokens), 3)), tokens], axis=1)
    model = adapters.attach(base, PromptTuning(init="text", text_ids=(7, 3, 11), tokens=3), rngs=nnx.Rngs(0))
    prompted = model(tokens)
    np.testing.assert_allclose(prompted, adapters.use(model, None)(longer)[:, 3:], atol=1e-5)


@pytest.mark.slow_cases
@pytest.mark.parametrize("fields", [{}, mistral(4)], ids=["full", "windowed"])
def test_packed_documents_are_computed_as_if_each_were_alone(method: adapters.Method, fields: dict[str, Any]) -> None:
    model = attached(method, **fields)
    first, second = tiny.tokens()[:1, :7], tiny.tokens()[1:2, :8]
    packed = model(
        jnp.concatenate([first, second], axis=1),
        positions=jnp.concatenate([jnp.arange(7), jnp.arange(8)])[None],
        segments=jnp.repeat(jnp.array([1, 2]), jnp.array([7, 8]))[None],
    )
    np.testing.assert_allclose(packed[:, :7], model(first), atol=1e-5)
    np.testing.assert_allclose(packed[:, 7:], model(second), atol=1e-5)


@pytest.mark.slow_cases
@pytest.mark.parametrize("fields", [{}, mistral(40)], ids=["full", "windowed"])
def test_padding_on_the_left_changes_nothing(method: adapters.Method, fields: dict[str, Any]) -> None:
    model = attached(method, **fields)
    tokens = tiny.tokens()[:1, :7]
    padded = jnp.pad(tokens, ((0, 0), (4, 0)))
    mask = jnp.pad(jnp.ones((1, 7), bool), ((0, 0), (4, 0)))
    positions = jnp.maximum(jnp.arange(11) - 4, 0)[None]
    np.testing.assert_allclose(model(padded, mask=mask, positions=positions)[:, 4:], model(tokens), atol=1e-5)


@pytest.mark.slow
def test_text_generated_with_a_cache_is_that_of_the_whole_sequence_each_time(method: adapters.Method) -> None:
    model = tiny.randomize(attached(method))
    prompts = [[5, 9, 2], [1, 30, 8, 21, 4]]
    answers = generate_ids(model, prompts, max_new_tokens=6)
    for prompt, answer in zip(prompts, answers, strict=True):
        sequence = list(prompt)
        for token in answer:
            assert int(jnp.argmax(model(jnp.array([sequence]))[0, -1])) == token
            sequence.append(token)
    assert answers != generate_ids(adapters.use(model, None), prompts, max_new_tokens=6)


def test_a_window_hides_the_prefix_while_generating() -> None:
    model = tiny.randomize(attached(PrefixTuning(tokens=6), **mistral(4)))
    prompts = [[5, 9, 2], [1, 30, 8, 21, 4]]
    for prompt, answer in zip(prompts, generate_ids(model, prompts, max_new_tokens=4), strict=True):
        logits = model(jnp.array([prompt + answer]))[0]
        assert answer == [int(token) for token in jnp.argmax(logits[len(prompt) - 1 : -1], axis=-1)]


def test_a_soft_prompt_and_a_prefix_work_together() -> None:
    model = attached(PromptTuning(tokens=3))
    prompt = model(tiny.tokens())
    adapters.attach(model, PrefixTuning(tokens=4), "prefix", rngs=nnx.Rngs(2))
    prefix = model(tiny.tokens())
    both = adapters.use(model, ("default", "prefix"))
    assert both.virtual == 7
    assert np.abs(both(tiny.tokens()) - prompt).max() > 1e-3
    assert np.abs(both(tiny.tokens()) - prefix).max() > 1e-3
    answers = generate_ids(both, [[5, 9, 2]], max_new_tokens=3)
    assert answers[0][0] == int(jnp.argmax(both(jnp.array([[5, 9, 2]]))[0, -1]))


def test_a_prompt_starts_from_what_it_is_told_to() -> None:
    table = np.asarray(tiny.model().embed.embedding.get_value())

    def vectors(**options: Any) -> np.ndarray:
        model = attached(PromptTuning(tokens=5, **options))
        return np.asarray(model.embed.adapters.adapter("default").embeddings.get_value())

    np.testing.assert_array_equal(vectors(init="text", text_ids=(4, 2)), table[[4, 2, 4, 2, 4]])
    np.testing.assert_array_equal(vectors(init="text", text_ids=tuple(range(9))), table[:5])
    drawn = vectors(init="vocabulary")
    assert all((table == row).all(1).any() for row in drawn)
    told = PromptTuning(init="text", text="ab").tokenized(lambda text: [ord(letter) - 96 for letter in text])
    assert told.text_ids == (1, 2)


def test_a_prefix_of_zeros_only_takes_attention_away() -> None:
    model = attached(PrefixTuning(tokens=2, init="zero"))
    assert not np.asarray(model.blocks.attention.adapters.adapter("default").states.get_value()).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptTuning(tokens=0), "method.tokens must be a positive integer, got 0"),
        (lambda: PromptTuning(tokens=2.5), "method.tokens must be a positive integer, got 2.5"),
        (lambda: PromptTuning(init="words"), "method.init must be one of random, vocabulary, text, got 'words'"),
        (lambda: PromptTuning(text="abc"), "method.text='abc' and method.init='random': set method.text if, and only if"),
        (lambda: PTuning(encoder="gru"), "method.encoder must be one of mlp, lstm, none, got 'gru'"),
        (lambda: PTuning(hidden=2.5), "method.hidden must be 0 .the model's width. or a positive integer, got 2.5"),
        (lambda: PrefixTuning(hidden=-4, projection=True), "method.hidden must be 0 .* or a positive integer, got -4"),
        (lambda: PrefixTuning(hidden=4), "method.hidden=4 needs method.projection=True"),
        (lambda: attached(PromptTuning(tokens=64)), "method.tokens=64 leaves no room for text: the model has 64 positions"),
        (lambda: attached(PromptTuning(init="text", text="abc")), "method.text has no tokens yet"),
        (lambda: attached(PromptTuning(init="text", text_ids=(3, 48))), "48 is not a token of .*; its ids are 0 to 47"),
        (lambda: generate_ids(attached(PromptTuning(tokens=60)), [[1, 2]], max_new_tokens=3), "less its 60 virtual"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
