"""One batch whose rows use different adapters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tests.tiny as tiny
from peftjax import adapters
from peftjax.adapters import rows, use
from peftjax.adapters.registry import active
from peftjax.core.errors import UserError
from peftjax.decoding import generate_ids
from peftjax.methods import Hra, Ia3, Lora, PromptTuning, Vera

LORA = Lora(rank=2, targets=("q_proj", "embed_tokens"))
EXPERTS = Lora(rank=2, targets=("mlp.gate", "gate_up_proj", "down_proj"))
DORA = Lora(rank=2, targets=("gate_up_proj", "down_proj"), dora=True)
IA3 = Ia3(targets=("gate_up_proj", "w2"), feedforward=("w2",))
VERA = Vera(rank=2, targets=("w1", "experts.down_proj"))
ON_EXPERTS = {"experts": EXPERTS, "experts-dora": DORA, "experts-ia3": IA3, "experts-vera": VERA}
METHODS = {"lora": LORA, "prompt": PromptTuning(tokens=3), "hra": Hra(rank=3)} | ON_EXPERTS
MOE = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def attached(method: adapters.Method) -> Any:
    """A model with the adapters "one" and "two", neither as it was made."""
    model = tiny.model(**(MOE if method in ON_EXPERTS.values() else {}))
    for seed, name in enumerate(("one", "two")):
        adapters.attach(model, method, name, rngs=nnx.Rngs(seed))
    return tiny.randomize(model)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("lora", ["two", None, "one", "two"]),
        ("lora", ["one", "one"]),
        *(pytest.param(name, ["two", None, "one", "two"], marks=pytest.mark.slow) for name in ON_EXPERTS),
        ("prompt", ["two", "one", "two"]),
    ],
)
def test_each_row_is_what_its_adapter_alone_computes(method: str, names: list[str | None]) -> None:
    model = attached(METHODS[method])
    tokens = jnp.resize(tiny.tokens(), (len(names), 9))
    mixed = rows(model, names)(tokens)
    for row, name in enumerate(names):
        np.testing.assert_allclose(mixed[row], use(model, name)(tokens[row : row + 1])[0], atol=1e-5)


def test_the_dropout_of_the_adapters_may_differ() -> None:
    model = tiny.model()
    for name, dropout in {"one": 0.0, "two": 0.1, "three": 0.2}.items():
        adapters.attach(model, Lora(rank=2, dropout=dropout), name, rngs=nnx.Rngs(0))
    tokens = jnp.resize(tiny.tokens(), (3, 9))
    mixed = rows(tiny.randomize(model), ["three", "one", "two"])(tokens)
    np.testing.assert_allclose(mixed[0], use(model, "three")(tokens[:1])[0], atol=1e-5)


@pytest.mark.slow
def test_generation_answers_each_prompt_with_its_own_adapter() -> None:
    model = attached(LORA)
    prompts, names = [[5, 9, 2], [5, 9, 2], [1, 30, 8, 21]], ["one", None, "two"]
    together = generate_ids(rows(model, names), prompts, max_new_tokens=5)
    alone = [
        generate_ids(use(model, name), [prompt], max_new_tokens=5)[0]
        for name, prompt in zip(names, prompts, strict=True)
    ]
    assert together == alone
    assert together[0] != together[1]


def test_other_rows_take_other_adapters_without_a_new_compilation() -> None:
    model = rows(attached(LORA), ["one", "two", None])
    graph, state = nnx.split(model)
    compiled = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
    tokens = jnp.resize(tiny.tokens(), (3, 9))
    first = compiled(state, tokens)
    model.index.set_value(jnp.array([1, 1, 0], jnp.int32))
    second = compiled(nnx.split(model)[1], tokens)
    np.testing.assert_array_equal(second[1], first[1])
    assert np.abs(second[0] - first[0]).max() > 1e-3
    assert compiled._cache_size() == 1


def test_the_model_is_left_as_it_was() -> None:
    model = use(attached(LORA), "two")
    before, names = tiny.bits(model), list(adapters.attached(model))
    rows(model, ["one", None])
    assert tiny.bits(model) == before
    assert list(adapters.attached(model)) == names
    assert active(model) == ("two",)


@pytest.mark.parametrize(
    ("method", "names", "message"),
    [
        ("lora", ["one", "tow"], "no adapter 'tow' is attached. Did you mean 'two'"),
        ("lora", [None], "names no adapter"),
        ("lora", ["one", 1], "the adapter of a row must be a name or None, got 1"),
        ("lora", ["one", ""], "no adapter '' is attached"),
        ("lora", "one", "names must be a list with one adapter for each row, got 'one'"),
        ("lora", None, "names must be a list with one adapter for each row, got None"),
        ("lora", ["one", 0], "the adapter of a row must be a name or None, got 0"),
        ("prompt", ["one", None], "prompt always has an effect"),
        ("hra", ["one", None], "hra always has an effect"),
        ("lora", ["one", "other"], "the adapters 'one' and 'other' differ"),
    ],
)
def test_what_cannot_be_in_one_batch_is_refused(method: str, names: Any, message: str) -> None:
    model = attached(METHODS[method])
    adapters.attach(model, Lora(rank=3), "other", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        rows(model, names)
    assert active(model) == ("other",)


def test_a_batch_of_another_size_is_refused() -> None:
    mixed = rows(attached(LORA), ["one", "two"])
    with pytest.raises(UserError, match=r"the batch has 3 rows, but rows\(\) was given adapters for 2"):
        mixed(jnp.ones((3, 4), int))
