"""What differs between the models of a population is held in their variables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from peftjax import adapters, methods
from peftjax.adapters.adapter import LayerMask
from peftjax.core import variables
from peftjax.nn.dropout import with_dropout_keys
from peftjax.training.alike import shared_paths, unite
from peftjax.training.varied import find_varied
from tests import tiny


def attached(method: methods.Method) -> nnx.Module:
    return adapters.attach(tiny.model(), method, rngs=nnx.Rngs(0))


def dropout_keys(model: nnx.Module) -> dict[str, np.ndarray]:
    """The dropout keys of a train step."""
    leaves = variables.flat(model)[1]
    paths = tuple(path for path, leaf in leaves.items() if isinstance(leaf, variables.DropoutKey))
    tree = with_dropout_keys({path: leaf.get_value() for path, leaf in leaves.items()}, paths, jax.random.key(3))
    return {path: np.asarray(tree[path]) for path in paths}


def test_a_model_draws_the_same_dropout_keys_beside_the_modules_of_another_one() -> None:
    several = [
        attached(methods.Lora(targets=targets, dropout=rate))
        for targets, rate in ((("v_proj",), 0.1), (("q_proj", "v_proj", "down_proj"), 0.1), (("q_proj",), 0.0))
    ]
    expected = [dropout_keys(model) for model in several]
    varied = find_varied(several, ranks_from_data=False)
    assert varied.numbered
    assert [path[-4:] for path in varied.rates] == [("query", "adapters", "default", "dropout")]
    for model in several:
        varied.hold(model)
    united = several[0]
    for other in several[1:]:
        united = unite(united, other)
        assert united is not None
    everywhere = dropout_keys(united)
    assert len(everywhere) == 3
    for model, keys in zip(several, expected, strict=True):
        leaves, own = (
            {path: leaf.get_value() for path, leaf in variables.flat(each)[1].items()} for each in (united, model)
        )
        tree = with_dropout_keys(variables.filled(own, leaves), tuple(everywhere), jax.random.key(3))
        for path, key in keys.items():
            np.testing.assert_array_equal(tree[path], key)


def test_models_with_the_same_modules_hold_nothing() -> None:
    pair = [attached(methods.Lora(targets="q_proj", dropout=0.1, rank=rank)) for rank in (2, 3)]
    before = variables.flat(pair[0])[1].keys()
    varied = find_varied(pair, ranks_from_data=False)
    varied.hold(pair[0])
    assert variables.flat(pair[0])[1].keys() == before


def test_models_that_choose_ranks_from_data_hold_all_that_depends_on_the_layers() -> None:
    pair = [attached(methods.Lora(targets="q_proj", dropout=0.1, dora=True, rank=rank)) for rank in (2, 3)]
    assert not find_varied(pair, ranks_from_data=False).layers
    varied = find_varied(pair, ranks_from_data=True)
    assert varied.numbered
    assert [path[-4:] for path in varied.layers] == [("query", "adapters", "default", "layers")]


@pytest.mark.parametrize("chosen", [(True,), (True, False, True)])
def test_a_mask_of_zeros_stands_for_no_layer(chosen: tuple[bool, ...]) -> None:
    mask = LayerMask(chosen)
    inside, outside = jnp.ones((len(chosen), 2)), jnp.zeros((len(chosen), 2))
    expected = mask(inside, outside)
    mask.vary()
    assert mask.mask is not None
    np.testing.assert_array_equal(mask(inside, outside), expected)
    assert int(mask.count) == sum(chosen)
    mask.mask.set_value(jnp.zeros_like(mask.mask.get_value()))
    np.testing.assert_array_equal(mask(inside, outside), outside)


def test_layers_share_the_projections_of_a_population() -> None:
    pair = [attached(methods.Vera(targets=targets, rank=2)) for targets in ("v_proj", ("q_proj", "down_proj"))]
    for model in pair:
        find_varied(pair, ranks_from_data=False).hold(model)
    united, again = unite(pair[0], pair[1]), unite(pair[1], pair[0])
    assert united is not None
    assert again is not None
    assert variables.flat(united)[1].keys() == variables.flat(again)[1].keys()
    assert sum(path.endswith(".default.a") for path in variables.flat(united)[1]) == 1
    names = shared_paths(united)
    assert len(names) == 6
    assert set(names.values()) < variables.flat(united)[1].keys()


def test_layers_share_projections_beside_trained_biases() -> None:
    method = methods.Vera(targets=("q_proj", "down_proj"), rank=2, bias="targets")
    model = adapters.attach(tiny.model(attention_bias=True), method, rngs=nnx.Rngs(0))
    names = shared_paths(model)
    assert sorted(path.rsplit("default.")[1] for path in names) == ["a", "b", "inner.a", "inner.b"]
    assert set(names.values()) < variables.flat(model)[1].keys()


def test_an_adapter_that_may_not_be_missing_separates_models() -> None:
    pair = [
        attached(methods.TrainableTokens(token_indices=(3,), targets=targets))
        for targets in ("embed_tokens", "lm_head")
    ]
    assert unite(pair[0], pair[1]) is None
