"""Generation: equal to the whole forward pass token by token, whatever the batch; sampling as it says."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from peftjax import adapters, methods
from peftjax.core import variables
from peftjax.core.errors import NotFiniteError, UserError
from peftjax.decoding import _compiled, _decode, _decode_each, _padded, generate_each, generate_ids
from peftjax.sampling import Sampling
from tests import tiny

PROMPTS = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15, 16]]


def greedy(model, prompt: list[int], count: int) -> list[int]:
    """One token at a time by whole forward passes, without a cache."""
    tokens = list(prompt)
    for _ in range(count):
        padded = jnp.array([tokens + [0] * (24 - len(tokens))])
        tokens.append(int(jnp.argmax(model(padded)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


def test_greedy_generation_in_a_batch_equals_each_prompt_by_whole_forward_passes() -> None:
    model = tiny.model()
    assert generate_ids(model, PROMPTS, max_new_tokens=6) == [greedy(model, prompt, 6) for prompt in PROMPTS]


def test_a_sliding_window_is_kept_while_generating() -> None:
    model = tiny.model(model_type="mistral", sliding_window=3)
    assert generate_ids(model, PROMPTS, max_new_tokens=6) == [greedy(model, prompt, 6) for prompt in PROMPTS]


def test_a_stop_token_ends_its_row_and_is_not_given_back() -> None:
    model = tiny.model()
    free = generate_ids(model, PROMPTS, max_new_tokens=6)
    stop = free[0][2]
    for row, stopped in zip(free, generate_ids(model, PROMPTS, max_new_tokens=6, stop=[stop]), strict=True):
        assert stopped == (row[: row.index(stop)] if stop in row else row)


def test_the_active_adapter_takes_part_and_a_swap_compiles_nothing() -> None:
    model = tiny.model()
    base = generate_ids(model, PROMPTS, max_new_tokens=6)
    for seed, name in enumerate(("first", "second")):
        adapters.attach(model, methods.Lora(rank=4, dropout=0.1 * seed), name, rngs=nnx.Rngs(seed))
        tiny.randomize(model, scale=1.0, seed=seed)
    first = generate_ids(adapters.use(model, "first"), PROMPTS, max_new_tokens=6)
    decode = compiled_decode(model)
    compiled = decode._cache_size()
    second = generate_ids(adapters.use(model, "second"), PROMPTS, max_new_tokens=6)
    assert decode._cache_size() == compiled
    assert base != first != second
    assert generate_ids(adapters.use(model, None), PROMPTS, max_new_tokens=6) == base


def compiled_decode(model: nnx.Module) -> Any:
    return _compiled(_decode, frozenset(jax.tree.leaves(nnx.state(model))[0].devices()))


@pytest.mark.slow_cases
@pytest.mark.parametrize("members", [1, 2])
def test_every_token_is_written_into_the_cache_in_place(members: int) -> None:
    """The loops carry the cache: if a layer returned its part instead, every token would copy all keys and values.

    So would a loop that each member of a population ends alone: it would select between the old and the new cache.
    """
    model = tiny.model()
    arguments = (jnp.ones((2, 32), jnp.int32), jnp.ones((2, 32), bool), jnp.zeros(48, bool), jax.random.key(0))
    leaves, shape = (nnx.split(model)[1],), "f32[3,2,37,2,8]"  # [L, B, S, K, H]
    decode = compiled_decode(model)
    if members > 1:
        adapters.attach(model, methods.Lora(rank=2), rngs=nnx.Rngs(0))
        own, shared = own_and_shared(model)
        leaves, shape = ([own] * members, shared), f"f32[{members},{shape[4:]}"
        decode = _compiled(_decode_each, frozenset(jax.devices()[:1]))
    lowered = decode.lower(nnx.split(model)[0], *leaves, *arguments, sampling={}, top_k=0, max_new=5)
    loops, _ = lowered.compile().as_text().split("\nENTRY ")
    made = re.findall(rf" = {re.escape(shape)}\S* ([\w-]+)\(", loops)
    assert "dynamic-update-slice" in made
    assert not {"copy", "select", "scatter"} & set(made)


def own_and_shared(model: nnx.Module) -> tuple[variables.FlatTree, variables.FlatTree]:
    """The leaves of the adapters, and the base."""
    leaves, kinds = variables.flat(model)[1], (variables.PeftParam, variables.PeftConstant)
    own = {path: leaf.get_value() for path, leaf in leaves.items() if isinstance(leaf, kinds)}
    return own, {path: leaf.get_value() for path, leaf in leaves.items() if path not in own}


@pytest.mark.parametrize(
    "members",
    [
        pytest.param([methods.Lora(rank=rank) for rank in (1, 3, 2)], id="ranks"),
        pytest.param([methods.PromptTuning(tokens=3)] * 3, id="prompts", marks=pytest.mark.slow),
        pytest.param([methods.PrefixTuning(tokens=3)] * 3, id="prefixes", marks=pytest.mark.slow),
    ],
)
def test_members_of_a_population_answer_as_they_do_alone_and_fail_alone(members: list[methods.Method]) -> None:
    models = [adapters.attach(tiny.model(), method, rngs=nnx.Rngs(0)) for method in members]
    for seed, model in enumerate(models):
        tiny.randomize(model, scale=1.0, seed=seed)
        model.eval()
    alone = [generate_ids(model, PROMPTS, max_new_tokens=6) for model in models]
    stop = alone[0][0][1]  # so that rows and members end at different steps
    alone = [generate_ids(model, PROMPTS, max_new_tokens=6, stop=[stop]) for model in models]
    assert alone[0] != alone[1]
    own = [own_and_shared(model)[0] for model in models]
    own = [variables.filled(leaves, own[1]) for leaves in own]
    own[2] = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), own[2])
    found = generate_each(models[0], own, own_and_shared(models[0])[1], PROMPTS, max_new_tokens=6, stop=[stop])
    assert found[:2] == alone[:2]
    assert isinstance(found[2], NotFiniteError)
    assert "the logits after 0 new tokens of prompts[0] are NaN" in str(found[2])


def test_prompts_of_similar_length_share_a_compiled_function() -> None:
    model = tiny.model()
    generate_ids(model, [[5] * 3], max_new_tokens=4)
    decode = compiled_decode(model)
    compiled = decode._cache_size()
    generate_ids(model, [[5] * 20], max_new_tokens=4)
    assert decode._cache_size() == compiled
    lengths = np.arange(1, 8193)
    padded = np.array([_padded(int(length)) for length in lengths])
    assert (padded >= lengths).all()
    assert (padded[:512] - lengths[:512] < 32).all()
    assert (padded[512:] <= lengths[512:] * 1.125).all()
    assert len(set(padded.tolist())) == 512 // 32 + 8 * 4  # the sizes up to 512, and 8 for each of 4 doublings


@pytest.mark.slow_cases
@pytest.mark.parametrize("filtered", [True, False])
def test_other_values_of_sampling_compile_nothing(filtered: bool) -> None:
    model = tiny.model()
    decode = compiled_decode(model)
    before, answers = decode._cache_size(), []
    values: list[tuple] = [(0.7, 20, 0.9), (3, 20, np.float32(0.99)), (np.float64(1.4), 20, 0.5)]
    for seed, (temperature, *filters) in enumerate(values):
        sampling = Sampling(temperature, *filters) if filtered else Sampling(temperature)
        answers += generate_ids(model, [[5] * (3 + 9 * seed)], max_new_tokens=4, sampling=sampling, seed=seed)
    assert decode._cache_size() == before + 1
    assert len(set(map(tuple, answers))) == len(values)


@pytest.mark.slow_cases
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0)])
def test_logits_that_are_not_finite_are_an_error_and_never_a_token(sampling: Sampling) -> None:
    model = tiny.model()
    table = model.embed.embedding
    table.set_value(table.get_value().at[9].set(jnp.nan))
    with pytest.raises(UserError, match=r"the logits after 0 new tokens of prompts\[1\] are NaN or Inf"):
        generate_ids(model, PROMPTS, max_new_tokens=6, sampling=sampling)
    assert generate_ids(model, PROMPTS[:1], max_new_tokens=1, sampling=sampling)[0] != []


def test_ids_without_a_row_are_an_error_in_a_prompt_and_nothing_in_a_list_of_stop_tokens() -> None:
    model = tiny.model()
    for token in (48, -1):
        with pytest.raises(UserError, match=rf"prompts\[1\] holds the token id {token}, but the embedding has 48 rows"):
            generate_ids(model, [[5], [6, token]], max_new_tokens=6)
    assert generate_ids(model, PROMPTS, max_new_tokens=6, stop=[-1, 48]) == generate_ids(
        model, PROMPTS, max_new_tokens=6
    )


def test_sampling_is_the_same_for_a_seed_and_differs_between_seeds() -> None:
    model, hot = tiny.model(), Sampling(temperature=2.0)
    one, again, other = (generate_ids(model, PROMPTS, max_new_tokens=8, sampling=hot, seed=seed) for seed in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(temperature=1.0), {0, 1, 2, 3}),
        (Sampling(temperature=1.0, top_k=2), {0, 1}),
        (Sampling(temperature=1.0, top_k=9), {0, 1, 2, 3}),
        (Sampling(temperature=1.0, top_k=2, top_p=0.55), {0}),  # 0.625 of what top_k leaves
        (Sampling(temperature=1.0, top_p=0.55), {0, 1}),  # 0.5 alone is less than 0.55
        (Sampling(temperature=1.0, top_p=0.4), {0}),
        (Sampling(temperature=0.05), {0}),
        (Sampling(), {0}),
    ],
)
def test_sampling_draws_only_what_its_limits_allow_and_all_of_it(sampling: Sampling, allowed: set[int]) -> None:
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]] * 2000))
    drawn = np.asarray(sampling.draw(logits, jax.random.key(0)))
    assert set(drawn.tolist()) == allowed
    if sampling == Sampling(temperature=1.0):
        np.testing.assert_allclose(np.bincount(drawn) / len(drawn), [0.5, 0.3, 0.15, 0.05], atol=0.04)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[]], "max_new_tokens": 2}, "every prompt needs at least one token"),
        ({"prompts": [[1] * 60], "max_new_tokens": 9}, "60 tokens and 9 new tokens exceed the model's 64 positions"),
        ({"prompts": [[1]], "max_new_tokens": 0}, "max_new_tokens=0 generates nothing; use 1 or more"),
        ({"prompts": [[1]], "max_new_tokens": 2.5}, "max_new_tokens=2.5 must be an integer"),
        ({"prompts": [[1]], "max_new_tokens": 2, "seed": None}, "seed=None must be an integer"),
        ({"prompts": [[1]], "max_new_tokens": 2, "seed": 2**64}, f"seed={2**64} has more than 64 bits"),
    ],
)
def test_what_cannot_be_generated_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_ids(tiny.model(), **arguments)


def test_a_model_without_a_cache_generates_no_text() -> None:
    with pytest.raises(UserError, match="a Linear does not generate text; use a decoder or an encoder-decoder"):
        generate_ids(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), PROMPTS, max_new_tokens=2)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": "0.7"},
        {"top_k": -1},
        {"top_k": 5.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": None},
    ],
)
def test_sampling_options_out_of_range_or_of_another_type_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)


@pytest.mark.parametrize("bad", [{"temperature": "0.7"}, {"temperature": None}, {"top_k": 2.5}, {"top_p": None}])
def test_sampling_options_that_are_no_numbers_are_refused(bad: dict) -> None:
    with pytest.raises(UserError, match=f"{next(iter(bad))}=.* must be a"):
        Sampling(**bad)
