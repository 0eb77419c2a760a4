"""The options of VeRA, RandLoRA and VB-LoRA, whose layers share arrays. What every method promises: test_contract.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import tests.tiny as tiny
from peftjax.adapters import attach
from peftjax.adapters.adapter import over_layers
from peftjax.adapters.sites import adapters_named
from peftjax.core import variables
from peftjax.io.adapter_load import load_adapter
from peftjax.io.adapter_save import save_adapter
from peftjax.io.adapter_tensors import CONFIG, WEIGHTS
from peftjax.methods import RandLora, VbLora, Vera

pytestmark = pytest.mark.slow

E, F = 32, 40  # embed, mlp


def attached(method: Any, seed: int = 1) -> Any:
    return attach(tiny.model(), method, rngs=nnx.Rngs(seed))


def shared(model: Any, kind: type, *leaves: str) -> list[np.ndarray]:
    """The arrays called so; each must be in the model once."""
    found = {path.rsplit(".", 1)[-1]: leaf for path, leaf in variables.flat(model)[1].items() if type(leaf) is kind}
    paths = [path for path in variables.flat(model)[1] if path.rsplit(".", 1)[-1] in leaves]
    assert len(paths) == len(leaves)
    return [np.asarray(found[leaf].get_value()) for leaf in leaves]


def test_veras_projections_are_kaiming_uniform_and_in_the_model_once() -> None:
    a, b = shared(attached(Vera(rank=16)), variables.PeftConstant, "a", "b")
    assert (a.shape, b.shape) == ((F, 16), (16, F))
    assert a.std() == pytest.approx((2 / F) ** 0.5, rel=0.05)
    assert b.std() == pytest.approx((2 / 16) ** 0.5, rel=0.05)
    assert np.abs(a).max() <= (6 / F) ** 0.5


@pytest.mark.parametrize("kind", [Vera, RandLora])
def test_projections_are_those_of_their_seed(kind: Any) -> None:
    one, same = (shared(attached(kind(rank=4), seed), variables.PeftConstant, "a", "b") for seed in (1, 2))
    other = shared(attached(kind(rank=4, projection_prng_key=7)), variables.PeftConstant, "a", "b")
    for index in range(2):
        np.testing.assert_array_equal(one[index], same[index])
        assert np.abs(one[index] - other[index]).max() > 0.1


@pytest.mark.parametrize(("options", "share"), [({}, 1.0), ({"sparse": True}, 1 / 3), ({"very_sparse": True}, E**-0.5)])
def test_randloras_bases_have_unit_deviation_and_the_share_of_zeros_asked_for(
    options: dict[str, Any], share: float
) -> None:
    method = RandLora(rank=5, targets=("q_proj", "down_proj"), **options)
    a, b = shared(attached(method), variables.PeftConstant, "a", "b")
    assert (a.shape, b.shape) == ((5, E), (F, 7, 5))
    for base in (a, b):
        assert base.std(ddof=1) == pytest.approx(1, abs=1e-4)
        assert np.mean(base != 0) == pytest.approx(share, abs=0.12)
        assert len(np.unique(base)) == 3 or not options


def test_randloras_update_has_full_rank() -> None:
    model = tiny.randomize(attached(RandLora(rank=5, alpha=10, targets=("v_proj", "up_proj", "down_proj"))))
    for site, adapter in adapters_named(model, "default"):
        for delta in over_layers(adapter, lambda one: one.delta()):
            assert delta.shape == (site.module.in_features, site.module.out_features)
            assert np.linalg.matrix_rank(delta) == min(delta.shape)


def test_vb_loras_pieces_are_mixtures_of_the_largest_logits_vectors() -> None:
    model = attached(VbLora(rank=2, num_vectors=6, vector_length=8, topk=3, targets=("v_proj",)))
    (bank,) = shared(model, variables.PeftParam, "bank")
    adapter = model.blocks.attention.value.adapters.default
    logits = np.asarray(adapter.logits_a.get_value())[0, 1, 2]
    chosen = np.argsort(logits)[-3:]
    weights = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
    first = over_layers(adapter, lambda one: one.factors()[0])[0]  # [in, R]
    np.testing.assert_allclose(first[2 * 8 : 3 * 8, 1], weights @ bank[chosen], atol=1e-6)


@pytest.mark.parametrize("kind", [Vera, RandLora])
def test_a_file_without_its_projections_has_those_of_its_seed(kind: Any, tmp_path: Path) -> None:
    model = tiny.randomize(attached(kind(rank=4)))
    path = save_adapter(model, tmp_path / "adapter")
    config, tensors = json.loads((path / CONFIG).read_text()), load_file(path / WEIGHTS)
    (path / CONFIG).write_text(json.dumps(config | {"save_projection": False}))
    drawn = {key: value for key, value in tensors.items() if key.endswith(("_A", "_B"))}
    save_file({key: value for key, value in tensors.items() if key not in drawn}, path / WEIGHTS)
    again = load_file(save_adapter(load_adapter(tiny.model(), path), tmp_path / "again") / WEIGHTS)
    for key, value in drawn.items():
        assert again[key].shape == value.shape
        assert again[key].std() == pytest.approx(value.std(), rel=0.1)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (Vera, {"rank": 0}, "method.rank must be a positive integer, got 0"),
        (Vera, {"d_initial": 0.0}, "method.d_initial must be a number above 0, got 0.0"),
        (Vera, {"projection_prng_key": -1}, r"method.projection_prng_key must be an integer from 0 to 2\*\*32 - 1"),
        (RandLora, {"rank": 2.0}, "method.rank must be a positive integer, got 2.0"),
        (RandLora, {"alpha": 0}, "method.alpha must be a number above 0, got 0"),
        (VbLora, {"topk": 0}, "method.topk must be a positive integer, got 0"),
        (VbLora, {"topk": 9, "num_vectors": 8}, "method.topk=9 is more than method.num_vectors=8"),
        (VbLora, {"init_logits_std": 0.0}, "method.init_logits_std must be a number above 0"),
        (VbLora, {"rank": 17}, "method.rank=17 exceeds the smaller dimension .16. of .*k_proj; use at most 16"),
        (VbLora, {"vector_length": 16}, "method.vector_length=16 does not divide 40, a side of model.layers.0.mlp"),
    ],
)
def test_options_that_mean_nothing_are_refused(method: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attached(method(**options))
