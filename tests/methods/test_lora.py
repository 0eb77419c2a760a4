"""LoRA's options: what each does to the model, and what each refuses. What every method promises: test_contract.py."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tests.tiny as tiny
from peftjax import adapters
from peftjax.adapters import active_view, attach, count_trainable, detach, merge, unmerge, use
from peftjax.adapters.adapter import over_layers
from peftjax.adapters.registry import active
from peftjax.core import variables
from peftjax.core.errors import UserError
from peftjax.io.adapter_load import load_adapter
from peftjax.io.adapter_save import save_adapter
from peftjax.methods import Lora
from peftjax.nn.adopt import adopt
from peftjax.nn.dropout import Dropout, with_dropout_keys

E, F, V, KV, L = 32, 40, 48, 16, 3  # embed, mlp, vocab, kv heads * head dim, layers
ALL = L * ((E + E) + 2 * (E + KV) + (E + E) + 3 * (E + F))  # in + out of every Linear but the head
QV = {"targets": ("q_proj", "v_proj")}


def attached(name: str = "default", model: Any = None, seed: int = 1, **options: Any) -> Any:
    return attach(tiny.model() if model is None else model, Lora(**options), name, rngs=nnx.Rngs(seed))


def logits(model: Any) -> np.ndarray:
    return np.asarray(model(tiny.tokens()))


def query(model: Any, name: str = "default") -> Any:
    return model.blocks.attention.query.adapters.adapter(name)


def gradients(model: Any) -> dict[str, np.ndarray]:
    """Of the mean square of the logits, for what is trained."""
    graph, trainable, frozen = variables.split_by_kind(model)
    loss = lambda tree: jnp.square(variables.join(graph, tree, frozen)(tiny.tokens())).mean()  # noqa: E731
    found = jax.jit(jax.grad(loss))(trainable)
    return {path: np.asarray(leaf) for path, leaf in found.items() if isinstance(leaf, jax.Array)}


# --- What is trained ---


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rank": 4}, 4 * ALL),
        ({"rank": 4, "targets": "q_proj, v_proj"}, 4 * L * (E + E + E + KV)),
        ({"rank": 4, "targets": r".*\.[02]\.mlp\.(up|down)_proj"}, 4 * 2 * 2 * (E + F)),
        ({"rank": 4, "exclude": ("self_attn.q_proj", "layers.1.mlp.up_proj")}, 4 * (ALL - L * (E + E) - (E + F))),
        ({"rank": 4, **QV, "rank_pattern": {"v_proj": 7}}, L * (4 * (E + E) + 7 * (E + KV))),
        ({"rank": 4, **QV, "rank_pattern": {"layers.1.self_attn.q_proj": 9}}, (4 + 9 + 4) * (E + E) + 4 * L * (E + KV)),
        ({"rank": 4, **QV, "rank_pattern": {r"layers\.[01]\..*": 2}}, (2 + 2 + 4) * (E + E + E + KV)),
        ({"rank": 4, **QV, "rank_pattern": {"v_proj": 2, "layers.1.self_attn.v_proj": 3}}, L * (4 * 2 * E + 2 * (E + KV))),
        ({"rank": 4, **QV, "layers_to_transform": (2,)}, 4 * (E + E + E + KV)),
        ({"rank": 4, "layers_to_transform": (0, 2), "rank_pattern": {"layers.0.mlp.up_proj": 1}},
         4 * ALL * 2 // L - 3 * (E + F)),
        ({"rank": 4, "targets": ("embed_tokens", "lm_head")}, 4 * (V + E) * 2),
        ({"rank": 4, **QV, "modules_to_save": ("lm_head", "embed_tokens")}, 4 * L * (3 * E + KV) + 2 * E * V),
        ({"rank": 4, **QV, "modules_to_save": ("layers.1.mlp.up_proj",)}, 4 * L * (3 * E + KV) + E * F),
        ({"rank": 4, "targets": ("q_proj", "up_proj"), "modules_to_save": ("layers.1.mlp",)},
         4 * L * (E + E) + 4 * (L - 1) * (E + F) + 3 * E * F),
        ({"rank": 4, **QV, "modules_to_save": ("model.norm",)}, 4 * L * (3 * E + KV) + E),
        ({"rank": 4, **QV, "modules_to_save": ("norm",)}, 4 * L * (3 * E + KV) + (2 * L + 1) * E),
        ({"rank": 4, "targets": ("q_proj", "lm_head"), "modules_to_save": ("lm_head",)}, 4 * L * (E + E) + E * V),
    ],
)  # fmt: skip
def test_the_number_of_trained_parameters_is_the_formulas(options: dict[str, Any], expected: int) -> None:
    assert adapters.count_trainable(attached(**options)) == expected


@pytest.mark.parametrize(
    ("options", "biases"),
    [
        ({"bias": "all"}, L * (E + KV + KV + E)),
        ({"bias": "all", "layers_to_transform": (1,)}, L * (E + KV + KV + E)),
        ({"bias": "lora_only"}, L * (E + KV)),
        ({"bias": "lora_only", "layers_to_transform": (1,)}, E + KV),
        ({"bias": "lora_only", "modules_to_save": ("k_proj",)}, L * (E + KV)),
        ({"bias": "all", "modules_to_save": ("layers.1.self_attn.o_proj",)}, L * (E + KV + KV + E) - E),
        ({"bias": "all", "modules_to_save": ("layers.1.self_attn",)}, (L - 1) * (E + KV + KV + E)),
    ],
)
def test_the_number_of_trained_biases_is_the_formulas(options: dict[str, Any], biases: int) -> None:
    model = tiny.model(attention_bias=True)
    without = adapters.count_trainable(attached("without", model, **QV, **options | {"bias": "none"}), "without")
    assert adapters.count_trainable(attached("with_them", model, **QV, **options), "with_them") == without + biases


def test_a_starts_uniform_and_different_in_every_layer_and_b_zero() -> None:
    lora = query(attached(rank=8))
    a = np.asarray(lora.a.get_value())
    assert np.abs(a).max() <= E**-0.5
    assert a.std() == pytest.approx(E**-0.5 / 3**0.5, rel=0.1)
    assert np.abs(a[0] - a[1]).min() > 0
    assert not np.any(lora.b.get_value())


def test_an_embeddings_a_starts_zero_and_its_b_normal() -> None:
    lora = attached(targets=("embed_tokens",)).embed.adapters.default
    assert not np.any(lora.a.get_value())
    assert np.std(lora.b.get_value()) == pytest.approx(1, rel=0.2)


# --- What it computes ---


@pytest.mark.parametrize(("rslora", "scale"), [(False, 12 / 4), (True, 12 / 4**0.5)])
def test_the_update_is_alpha_over_rank_or_its_root_times_a_b(rslora: bool, scale: float) -> None:
    model = tiny.randomize(attached(rank=4, alpha=12, targets=("q_proj",), rslora=rslora))
    lora = query(model)
    a, b = np.asarray(lora.a.get_value()), np.asarray(lora.b.get_value())
    expected = tiny.model()
    kernel = expected.blocks.attention.query.kernel
    kernel.set_value(kernel.get_value() + scale * np.matmul(a, b))
    np.testing.assert_allclose(logits(model), logits(expected), atol=1e-5)


def test_ranks_and_alphas_by_pattern_scale_each_layer_by_itself() -> None:
    options = {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {r"layers\.[12]\..*": 6}}
    lora = query(attached(rank=4, alpha=8, targets=("q_proj",), rslora=True, **options))
    expected = [[8 / 2**0.5] * 2 + [0] * 2, [6 / 2] * 4, [6 / 2] * 4]
    np.testing.assert_allclose(lora.scale.get_value(), expected, rtol=1e-6)


def test_of_two_patterns_the_first_counts() -> None:
    specific, general = ("layers.1.self_attn.q_proj", 4), ("q_proj", 2)
    assert query(attached(targets=("q_proj",), rank_pattern=(specific, general))).ranks == (2, 4, 2)
    assert query(attached(targets=("q_proj",), rank_pattern=(general, specific))).ranks == (2, 2, 2)


def test_what_pads_a_smaller_rank_gets_no_gradient_and_does_nothing() -> None:
    model = tiny.randomize(attached(rank=4, targets=("q_proj",), rank_pattern={"layers.1.self_attn.q_proj": 1}))
    found = gradients(model)
    for path, used in (("a", lambda g: g[1, :, :1]), ("b", lambda g: g[1, :1])):
        gradient = found[f"blocks.attention.query.adapters.default.{path}"]
        assert np.any(used(gradient))
        assert np.count_nonzero(gradient[1]) == np.count_nonzero(used(gradient))
        assert np.all(np.any(gradient[[0, 2]], axis=(1, 2)))
    before = logits(model)
    lora = query(model)
    lora.b.set_value(lora.b.get_value().at[1, 1:].set(7.0))
    np.testing.assert_array_equal(logits(model), before)


def test_layers_that_are_left_out_keep_the_bases_biases_and_modules() -> None:
    options = {"bias": "lora_only", "layers_to_transform": (1,), "modules_to_save": ("layers.2.mlp.up_proj",)}
    model = attached(model=tiny.model(attention_bias=True), targets=("q_proj",), **options)
    before = logits(model)
    found = gradients(model)
    bias = found["blocks.attention.query.adapters.default.bias"]
    kernel = found["blocks.feedforward.up.adapters.default.kernel"]
    assert [bool(np.any(layer)) for layer in bias] == [False, True, False]
    assert [bool(np.any(layer)) for layer in kernel] == [False, False, True]

    lora, saved = query(model), model.blocks.feedforward.up.adapters.default
    lora.bias.set_value(lora.bias.get_value().at[jnp.array([0, 2])].set(7.0))
    saved.kernel.set_value(saved.kernel.get_value().at[:2].set(7.0))
    np.testing.assert_array_equal(logits(model), before)
    merge(model)
    np.testing.assert_allclose(logits(model), before, atol=1e-5)


def test_a_tied_head_that_is_trained_whole_leaves_the_embedding_alone() -> None:
    model = attached(
        model=tiny.model(tie_word_embeddings=True, num_hidden_layers=1), **QV, modules_to_save=("lm_head",)
    )
    with jax.disable_jit():  # one operation at a time: two compiled programs round differently
        base = logits(use(model, None))
        np.testing.assert_array_equal(logits(use(model, "default")), base)
        head = model.head.adapters.default
        head.kernel.set_value(2 * head.kernel.get_value())
        np.testing.assert_allclose(logits(model), 2 * base, rtol=1e-5)


@pytest.mark.slow_cases
@pytest.mark.parametrize("targets", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")])
def test_merging_one_of_a_tied_pair_unties_it_and_unmerging_ties_it_again(targets: tuple[str, ...]) -> None:
    model = tiny.randomize(attached(model=tiny.model(tie_word_embeddings=True), targets=targets))
    before, expected = tiny.bits(model), logits(model)
    merge(model)
    assert not model.tied
    assert not model.config.tied
    np.testing.assert_allclose(logits(model), expected, atol=1e-5)
    unmerge(model)
    assert model.tied
    assert model.config.tied
    assert tiny.bits(model) == before
    np.testing.assert_array_equal(logits(model), expected)


def test_a_merged_model_compiles_to_what_the_base_costs() -> None:
    def cost(model: Any) -> dict[str, float]:
        graph, leaves = variables.flat(active_view(model))
        values = {path: leaf.get_value() for path, leaf in leaves.items()}
        forward = jax.jit(lambda values: variables.join(graph, values)(tiny.tokens()))
        return forward.lower(values).compile().cost_analysis()

    model = tiny.randomize(attached(rank=2))
    more, base = cost(model), cost(use(model, None))
    assert more["flops"] > base["flops"]
    assert cost(merge(model)) == base


# --- Dropout ---


def one_layer(model: Any, layer: int, x: jax.Array, key: jax.Array | None = None) -> np.ndarray:
    """What the LoRA on one layer's queries adds for x, with A = B = identity and scale 1: x after dropout."""
    identity = jnp.broadcast_to(jnp.eye(E), (L, E, E))
    adapter = "blocks.attention.query.adapters.default"
    variables.update(model, {f"{adapter}.a": identity, f"{adapter}.b": identity, f"{adapter}.scale": jnp.ones((L, E))})
    lora = query(model)
    if key is not None:
        name = "dropout.key"
        lora.dropout.key.set_value(with_dropout_keys({name: lora.dropout.key.get_value()}, (name,), key)[name])
    graph, state = nnx.split(lora)
    sliced = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[layer], state))
    return np.asarray(sliced(None, lambda x: jnp.zeros_like(x), x))


def with_dropout(rate: float = 0.25) -> Any:
    model = attached(rank=E, alpha=E, dropout=rate, targets=("q_proj",))
    model.train()
    return model


def test_dropout_zeroes_its_share_and_keeps_the_mean() -> None:
    x = 1 + jax.random.uniform(jax.random.key(0), (500, E))
    out = one_layer(with_dropout(0.25), 0, x, jax.random.key(1))
    assert np.mean(out == 0) == pytest.approx(0.25, abs=0.02)
    np.testing.assert_allclose(out[out != 0], np.asarray(x / 0.75)[out != 0], rtol=1e-6)
    assert out.mean() == pytest.approx(float(x.mean()), rel=0.02)


def test_dropout_differs_by_layer_and_by_key_and_repeats_with_the_same() -> None:
    model, x = with_dropout(), jnp.ones((8, E))
    first = one_layer(model, 0, x, jax.random.key(1))
    np.testing.assert_array_equal(one_layer(model, 0, x, jax.random.key(1)), first)
    assert np.any(one_layer(model, 1, x, jax.random.key(1)) != first)
    assert np.any(one_layer(model, 0, x, jax.random.key(2)) != first)


def test_dropout_is_off_unless_in_training() -> None:
    model, x = with_dropout(), jnp.ones((8, E))
    model.eval()
    np.testing.assert_array_equal(one_layer(model, 0, x, jax.random.key(1)), x)
    fresh = attached(rank=E, alpha=E, dropout=0.25, targets=("q_proj",))
    np.testing.assert_array_equal(one_layer(fresh, 0, x, jax.random.key(1)), x)


def test_dropout_differs_between_modules_and_only_touches_the_adapter() -> None:
    model = attached(rank=2, dropout=0.5, **QV)
    before = logits(model)
    model.train()
    np.testing.assert_array_equal(logits(model), before)  # B is zero: what dropout does to its input is not seen
    tree = {path: leaf.get_value() for path, leaf in variables.flat(model)[1].items()}
    keys = tuple(path for path in tree if path.endswith("dropout.key"))
    assert len(keys) == 2
    fresh = with_dropout_keys(tree, keys, jax.random.key(0))
    drawn = np.concatenate([np.asarray(fresh[path]) for path in keys])
    assert len(np.unique(drawn, axis=0)) == 2 * L


# --- Under names ---


def test_adapters_of_different_shapes_take_turns_under_names() -> None:
    base = logits(tiny.model())
    model = tiny.randomize(attached("small", rank=2, targets=("q_proj",)))
    small = logits(model)
    attached("large", model, rank=8, modules_to_save=("lm_head",))
    assert active(model) == ("large",)
    np.testing.assert_array_equal(logits(model), base)
    np.testing.assert_array_equal(logits(use(model, "small")), small)
    np.testing.assert_array_equal(logits(use(model, None)), base)
    assert active(model) == ()
    assert np.abs(small - base).max() > 1e-3
    assert list(adapters.attached(model)) == ["small", "large"]


def test_detaching_one_leaves_the_other_as_it_is() -> None:
    model = tiny.randomize(attached("kept", rank=2, targets=("q_proj",)))
    kept = logits(model)
    attached("gone", model, rank=4)
    use(model, "kept")
    detach(model, "gone")
    assert list(adapters.attached(model)) == ["kept"]
    assert active(model) == ("kept",)
    np.testing.assert_array_equal(logits(model), kept)
    assert not [path for path in variables.flat(model)[1] if ".gone." in path]


def test_detaching_what_is_merged_restores_the_base() -> None:
    before = tiny.bits(tiny.model())
    model = merge(tiny.randomize(attached()))
    assert tiny.bits(model) != before
    assert tiny.bits(detach(model)) == before


@pytest.mark.slow
def test_a_layer_trained_in_full_may_have_a_lora_in_other_layers(tmp_path: Path) -> None:
    options = {"rank": 2, "targets": ("q_proj", "up_proj"), "modules_to_save": ("layers.1.mlp",)}
    model = attached(**options)
    np.testing.assert_array_equal(logits(model), logits(tiny.model()))
    tiny.randomize(model)
    expected, base = logits(model), tiny.bits(use(model, None))
    found = gradients(use(model, "default"))
    assert {path.rsplit(".", 2)[-2] for path in found if ".up." in path} == {"inner", "outer"}
    assert all(np.abs(gradient).max() > 0 for gradient in found.values())
    path = save_adapter(model, tmp_path / "adapter")
    np.testing.assert_array_equal(logits(load_adapter(tiny.model(), path)), expected)
    np.testing.assert_allclose(logits(merge(model)), expected, atol=1e-5)
    assert tiny.bits(detach(model)) == base


def test_two_merged_adapters_add_up_and_are_undone_from_the_last() -> None:
    model = attached("two", attached("one", **QV), targets=("up_proj", "q_proj"))
    tiny.randomize(model)
    before, one = tiny.bits(model), logits(use(model, "one"))
    merge(merge(model, "one"), "two")
    expected = np.asarray(tiny.model().blocks.attention.query.kernel.get_value())
    expected = expected + sum(over_layers(query(model, name), lambda one: one.delta()) for name in ("one", "two"))
    np.testing.assert_allclose(model.blocks.attention.query.kernel.get_value(), expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"adapter 'one' is not the one merged last; .*newest first: \['two', 'one'\]"):
        unmerge(model, "one")
    unmerge(unmerge(model, "two"), "one")
    assert tiny.bits(model) == before
    np.testing.assert_array_equal(logits(model), one)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "options", [{"targets": ("embed_tokens", "lm_head")}, {"targets": ("q_proj",), "modules_to_save": ("lm_head",)}]
)
def test_a_tied_head_follows_the_embedding_if_asked_to_and_merges(options: dict[str, Any]) -> None:
    model = attached("default", tiny.model(tie_word_embeddings=True), rank=2, ensure_weight_tying=True, **options)
    assert count_trainable(model) == (2 * (V + E) if "modules_to_save" not in options else V * E + 2 * L * (E + E))
    tiny.randomize(model)
    assert all(np.abs(grad).max() > 0 for grad in gradients(model).values())
    expected = logits(model)
    table = np.asarray(merge(model).embed.embedding.get_value())
    np.testing.assert_allclose(model.head.kernel.get_value().T, table, atol=1e-6)
    np.testing.assert_allclose(logits(use(model, None)), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["1a", ".a", "-a", "a/b", "a%2Eb", "", "a b"])
def test_a_name_of_other_characters_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="use letters, digits, underscores, dashes and dots, starting with"):
        attached(name)


def test_a_name_may_have_dashes_and_dots(tmp_path: Path) -> None:
    name = "qwen2.5-sql.v1"
    model = tiny.randomize(attached(name, rank=2, targets=("q_proj",)))
    expected, trained = logits(model), count_trainable(model, name)
    path = save_adapter(model, tmp_path / "adapter", name)
    graph, state, rest = variables.split_by_kind(model)
    np.testing.assert_array_equal(logits(variables.join(graph, state, rest)), expected)
    variables.update(model, state)
    np.testing.assert_array_equal(logits(use(use(model, None), name)), expected)
    load_adapter(model, path, "other-1.0")
    assert list(adapters.attached(model)) == [name, "other-1.0"]
    np.testing.assert_array_equal(logits(use(detach(model, name), "other-1.0")), expected)
    assert count_trainable(model, "other-1.0") == trained > 0


@pytest.mark.parametrize("name", ["active", "adapter", "add", "names", "train", "__call__"])
def test_a_name_that_the_slot_uses_itself_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"adapter name '{name}' is reserved"):
        attached(name)


def test_a_name_that_is_taken_is_refused() -> None:
    model = attached("mine", rank=2)
    with pytest.raises(ValueError, match="adapter 'mine' is already attached; detach it first or choose another name"):
        attached("mine", model, rank=4)
    assert query(model, "mine").ranks == (2, 2, 2)


@pytest.mark.parametrize("change", [use, detach, merge, unmerge, adapters.count_trainable])
def test_a_name_that_is_not_there_is_an_error_with_the_near_ones(change: Any) -> None:
    with pytest.raises(ValueError, match=r"no adapter 'minne' is attached. Did you mean 'mine'\? Attached: \['mine'\]"):
        change(attached("mine", rank=2), "minne")


def test_merging_twice_and_unmerging_what_is_not_merged_are_errors() -> None:
    model = attached(rank=2)
    with pytest.raises(ValueError, match="adapter 'default' is not the one merged last"):
        unmerge(model)
    merge(model)
    with pytest.raises(ValueError, match="adapter 'default' is already merged"):
        merge(model)


# --- Mistakes ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("q_proj", "v_porj")}, r"method.targets: 'v_porj' matches no layer of this model. Did you mean 'v_proj'"),
        ({"targets": ("a_b", "c_d")}, r"method.targets: 'a_b', 'c_d' matches no layer of this model. Its layers: down_proj"),
        ({"targets": r"q_proj|v_proj"}, r"method.targets: 'q_proj\|v_proj' matches no layer of this model"),
        ({"targets": ("self_attn",)}, r"method.targets: 'self_attn' matches no layer of this model"),
        ({"exclude": ("q_pro",)}, r"method.exclude: 'q_pro' matches no layer of this model. Did you mean 'q_proj'"),
        ({"targets": ("q_proj",), "exclude": r".*q_proj"}, r"targets=\('q_proj',\) with exclude='.*q_proj' .* selects nothing"),
        ({"targets": ("embed_tokens",), "layers_to_transform": (0,)}, r"layers \[0\] selects nothing"),
        ({"exclude": ".*"}, r"method.targets='all-linear' with exclude='.\*' and layers \[\] selects nothing"),
        ({"targets": ("q_proj",), "exclude": "(q"}, r"method.exclude: '\(q' is not a regular expression"),
        ({"modules_to_save": ("",)}, "all of them are in modules_to_save"),
        ({"rank": 17}, r"method.rank=17 exceeds the smaller dimension .16. of model.layers.0.self_attn.k_proj; use at most 16"),
        ({"targets": ("v_proj",), "rank_pattern": {"v_proj": 17}}, r"method.rank=17 exceeds the smaller dimension .* of .*v_proj;"),
        ({"layers_to_transform": (0, 3)}, r"layers_to_transform: layer 3 does not exist; the model has layers 0 to 2"),
        ({"layers_to_transform": (-1,)}, r"layers_to_transform: layer -1 does not exist"),
        ({"rank_pattern": {"q_porj": 2}}, r"method.rank_pattern: 'q_porj' matches no target. Did you mean 'q_proj'"),
        ({**QV, "alpha_pattern": {"up_proj": 2}}, r"method.alpha_pattern: 'up_proj' matches no target. .*Targets: q_proj, v_proj"),
        ({"bias": "all"}, r"method.bias='all': no layer that it applies to has a bias; set it to 'none'"),
        ({"bias": "lora_only"}, r"method.bias='lora_only': no layer that it applies to has a bias"),
        ({"modules_to_save": ("lm_hed",)}, r"method.modules_to_save: 'lm_hed' matches no layer of this model. Did you mean 'lm_head'"),
        ({"modules_to_save": ("attention_adapters",)}, r"model.layers.0.attention_adapters has no parameters of its own"),
        (
            {"modules_to_save": ("mlp", "down_proj")},
            r"method.modules_to_save: 'down_proj' is inside 'mlp', which is trained in full; remove 'down_proj'",
        ),
        ({"targets": ("lm_head",), "modules_to_save": ("lm_head",)}, r"all of them are in modules_to_save"),
        ({"dropout": 1.0}, r"dropout must be at least 0 and below 1, got 1.0"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_the_model_are_named_and_leave_it_alone(options: dict[str, Any], message: str) -> None:
    model = attached("before", rank=2, targets=("q_proj",))
    graph, before = nnx.split(model)[0], variables.flat(model)[1]
    with pytest.raises(ValueError, match=message):
        attached(model=model, **options)
    assert nnx.split(model)[0] == graph
    after = variables.flat(model)[1]
    assert {path: leaf.get_value() is before[path].get_value() for path, leaf in after.items()} == dict.fromkeys(
        before, True
    )


def test_layers_that_are_not_numbered_cannot_be_chosen_by_number() -> None:
    model = adopt(nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0))))
    with pytest.raises(UserError, match="layer 0 does not exist; the layers of this model are not numbered"):
        attached(model=model, rank=2, layers_to_transform=(0,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "method.rank must be a positive integer, got 0"),
        ({"alpha": 0}, "method.alpha must be a number above 0, got 0"),
        ({"alpha_pattern": {"q_proj": "8"}}, "method.alpha must be a number above 0, got '8'"),
        ({"targets": None}, "method.targets must be a name, a tuple of names or a regular expression, got None"),
        ({"exclude": ("q_proj", 3)}, r"method.exclude must be a name, .*, got \('q_proj', 3\)"),
        ({"modules_to_save": None}, "method.modules_to_save must be a name or a tuple of names, got None"),
        ({"layers_to_transform": "0,1"}, "method.layers_to_transform must be an integer or a tuple of integers, got '0,1'"),
        ({"rank_pattern": "q_proj"}, "method.rank_pattern must be a table {name: value}, got 'q_proj'"),
        ({"alpha_pattern": ("q_proj",)}, r"method.alpha_pattern must be a table {name: value}, got \('q_proj',\)"),
        ({"token_indices": 1.5}, "method.token_indices must be an integer or a tuple of integers, got 1.5"),
        ({"token_indices": {"lm_head": ("a",)}}, r"method.token_indices must be an integer .*, got \('a',\)"),
        ({"dropout": "0.1"}, "method.dropout must be a number, got '0.1'"),
        ({"dora": "False"}, "method.dora must be True or False, got 'False'"),
        ({"init": None}, "method.init must be a string, got None"),
        ({"dtype": "float23"}, "method.dtype must be one of float32, bfloat16, float16, got 'float23'"),
        ({"r": 8}, "method.r: lora has no such field. Hugging Face's r is called 'rank' here. It has: targets, "),
        ({"rnak": 8}, "method.rnak: lora has no such field. Did you mean 'rank'"),
        ({"rank": 2.5}, "method.rank must be a positive integer, got 2.5"),
        ({"rank_pattern": {"q_proj": 0}}, "method.rank must be a positive integer, got 0"),
        ({"bias": "some"}, "method.bias must be one of none, all, lora_only, got 'some'"),
        ({"targets": r".*q_proj", "layers_to_transform": (0,)}, "needs targets that are names; .*is a regular expression"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lora(**options)


def test_options_without_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"^Lora: give options by name: targets, exclude, .*, rank, "):
        Lora(8)  # type: ignore[misc]


def test_an_adapter_file_may_drop_out_everything_and_its_gradient_stays_finite() -> None:
    method = Lora.from_hf({"r": 2, "lora_alpha": 0, "lora_dropout": 1.0, "target_modules": ["q_proj"]})
    assert (method.alpha, method.dropout) == (0.0, 1.0)
    dropout = Dropout(method.dropout)
    dropout.train()
    value, gradient = jax.value_and_grad(lambda x: dropout(x).sum())(jnp.ones(3))
    assert (value, gradient.tolist()) == (0.0, [0.0] * 3)
    for value in (2.0, -0.5, math.inf):
        with pytest.raises(UserError, match="must be"):
            Lora.from_hf({"lora_dropout": value, "target_modules": ["q_proj"]})
    with pytest.raises(UserError, match="alpha must be a number above 0, got -inf"):
        Lora.from_hf({"lora_alpha": -math.inf, "target_modules": ["q_proj"]})
