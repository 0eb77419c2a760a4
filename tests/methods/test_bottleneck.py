"""Bottleneck adapters: where they read and write, how they begin, and what they refuse."""

from types import SimpleNamespace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tests.tiny as tiny
from peftjax import adapters
from peftjax.methods import Houlsby, ParallelAdapter, Pfeiffer
from peftjax.methods.bottleneck import Bottleneck, from_hub
from peftjax.models.base import Model
from peftjax.nn.residual import Residual

pytestmark = pytest.mark.slow

E, L = 32, 3  # embed, layers


def attached(method: Bottleneck, dtype: str = "float32") -> Any:
    return adapters.attach(tiny.model(dtype=dtype), method, rngs=nnx.Rngs(1))


def adapter(model: Any) -> Any:
    return model.blocks.feedforward_residual.adapters.adapter("default")


@pytest.mark.parametrize(
    ("method", "read"),
    [(Houlsby, lambda x, f: f), (Pfeiffer, lambda x, f: x + f), (ParallelAdapter, lambda x, f: x)],
)
def test_a_sublayer_gives_what_the_equation_says(method: Any, read: Any) -> None:
    model = adapters.attach(Sublayer(), method(reduction_factor=4, non_linearity="tanh", scale=3.0), rngs=nnx.Rngs(0))
    own = adapter(tiny.randomize(model, scale=1.0))
    x = jax.random.normal(jax.random.key(1), (5, 8))
    down, up = own.down.get_value(), own.up.get_value()
    low = jnp.tanh(read(x, jnp.sin(x)) @ down + own.down_bias.get_value()[None])
    expected = x + jnp.sin(x) + 3.0 * (low @ up + own.up_bias.get_value()[None])
    np.testing.assert_allclose(model.blocks.feedforward_residual(x, jnp.sin), expected, atol=1e-5)


class Sublayer(Model):
    """As much of a model as a bottleneck adapter needs: width 8, no stack."""

    config: ClassVar = SimpleNamespace(embed=8)
    hf_modules: ClassVar = {}

    def __init__(self) -> None:
        self.blocks = nnx.Module()
        self.blocks.feedforward_residual = Residual()


def test_houlsby_sits_in_both_sublayers_and_the_others_after_feed_forward() -> None:
    for method, places in ((Houlsby(), 2), (Pfeiffer(), 1), (ParallelAdapter(), 1), (Pfeiffer(attention=True), 2)):
        residuals = (attached(method).blocks.attention_residual, attached(method).blocks.feedforward_residual)
        assert [len(residual.adapters.names()) for residual in residuals] == [places - 1, 1]


def test_the_bottleneck_has_the_width_over_the_factor_and_at_least_one_unit() -> None:
    for factor, size in ((16.0, 2), (5, 6), (0.5, 64), (100, 1)):
        assert adapter(attached(Pfeiffer(reduction_factor=factor))).down.shape == (L, E, size)


def test_each_initialisation_has_its_distribution() -> None:
    def drawn(init: str) -> tuple[np.ndarray, np.ndarray]:
        own = adapter(attached(ParallelAdapter(init=init, reduction_factor=0.25)))  # 3 * 32 * 128 numbers
        assert not np.asarray(own.down_bias.get_value()).any()
        assert not np.asarray(own.up_bias.get_value()).any()
        return np.asarray(own.down.get_value()), np.asarray(own.up.get_value())

    for kernel in drawn("bert"):
        np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.03)
        assert np.abs(kernel).max() > 0.06
    for kernel in drawn("houlsby"):
        np.testing.assert_allclose(kernel.std(), 0.0088, rtol=0.03)  # what is left of 0.01 within two deviations
        assert 0.0195 < np.abs(kernel).max() <= 0.02
    down, up = drawn("mam_adapter")
    assert 0.99 / np.sqrt(E) < np.abs(down).max() <= 1 / np.sqrt(E)
    np.testing.assert_allclose(down.std(), 1 / np.sqrt(3 * E), rtol=0.03)
    assert not up.any()


def test_layers_left_out_compute_the_base_whatever_is_in_the_adapter() -> None:
    model = tiny.randomize(attached(Houlsby(leave_out=(0, 2))))
    expected = model(tiny.tokens())
    for residual in (model.blocks.attention_residual, model.blocks.feedforward_residual):
        up = residual.adapters.adapter("default").up
        up.set_value(up.get_value().at[jnp.array([0, 2])].set(jnp.nan))
    np.testing.assert_array_equal(model(tiny.tokens()), expected)


def test_in_bfloat16_it_computes_in_bfloat16_and_is_kept_in_float32() -> None:
    model = attached(Pfeiffer(norm_before=True, learned_scale="channel"), dtype="bfloat16")
    assert model(tiny.tokens()).dtype == jnp.bfloat16
    assert adapter(model).up.get_value().dtype == jnp.float32


def hub(**fields: Any) -> Bottleneck:
    return from_hub(
        {"mh_adapter": False, "output_adapter": True, "reduction_factor": 4, "non_linearity": "ReLU"} | fields
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, Houlsby(attention=False, non_linearity="relu", reduction_factor=4)),
        ({"mh_adapter": True, "scaling": 2}, Houlsby(non_linearity="relu", reduction_factor=4, scale=2.0)),
        ({"original_ln_before": True}, Pfeiffer(reduction_factor=4)),
        (
            {"original_ln_before": True, "original_ln_after": False, "residual_before_ln": False, "scaling": "channel"},
            Pfeiffer(reduction_factor=4, learned_scale="channel"),
        ),
        (
            {"is_parallel": True, "scaling": "learned", "adapter_residual_before_ln": True, "ln_after": True},
            ParallelAdapter(reduction_factor=4, init="bert", scale=1.0, learned_scale="scalar", norm_after=True),
        ),
        ({"leave_out": None, "adapter_residual_before_ln": True}, Houlsby(attention=False, non_linearity="relu", reduction_factor=4)),
        ({"phm_layer": False, "phm_dim": 4, "learn_phm": True, "init_weights_seed": 7, "stochastic_depth": 0.0},
         Houlsby(attention=False, non_linearity="relu", reduction_factor=4)),
    ],
)  # fmt: skip
def test_a_config_of_adapter_hub_is_read(fields: dict[str, Any], expected: Bottleneck) -> None:
    assert hub(**fields) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pfeiffer(leave_out="0"), "method.leave_out must be an integer or a tuple of integers, got '0'"),
        (lambda: Pfeiffer(scale=float("nan")), "method.scale must be a finite number, got nan"),
        (lambda: Pfeiffer(reduction_factor=0), "method.reduction_factor must be a number above 0, got 0"),
        (lambda: Pfeiffer(non_linearity="softplus"), "method.non_linearity must be one of relu, .*, got 'softplus'"),
        (lambda: Pfeiffer(init="zero"), "method.init must be one of bert, houlsby, mam_adapter, got 'zero'"),
        (lambda: Pfeiffer(learned_scale="yes"), "method.learned_scale must be one of none, scalar, channel, got 'yes'"),
        (lambda: Pfeiffer(feedforward=False), "method.attention=False and method.feedforward=False leave no sublayer to adapt"),
        (lambda: Pfeiffer(residual_before_norm=True), "method.residual_before_norm=True needs method.norm_after=True"),
        (lambda: ParallelAdapter(norm_after=True, residual_before_norm=True), "is not possible for parallel adapters"),
        (lambda: attached(Pfeiffer(leave_out=(1, 3))), "method.leave_out: layer 3 does not exist; the model has layers 0 to 2"),
        (lambda: attached(Pfeiffer(leave_out=(0, 1, 2))), r"method.leave_out=\(0, 1, 2\) leaves no layer with an adapter"),
        (lambda: adapters.merge(attached(Pfeiffer())), "BottleneckAdapter cannot be merged"),
        (lambda: hub(phm_layer=True), "phm_layer=True is not supported for houlsby"),
        (lambda: hub(inv_adapter="nice"), "inv_adapter='nice' is not supported"),
        (lambda: hub(cross_adapter=True), "cross_adapter=True is not supported"),
        (lambda: hub(use_gating=True), "use_gating=True is not supported"),
        (lambda: hub(stochastic_depth=0.1), "stochastic_depth=0.1 is not supported"),
        (lambda: hub(reduction_factor={"1": 8, "default": 16}), "reduction_factor={.*}, one for each layer, is not supported"),
        (lambda: hub(scaling="twice"), "scaling='twice' is not a number, 'learned' or 'channel'"),
        (lambda: hub(non_linearity=None), "non_linearity is missing in config"),
        (lambda: hub(residual_before_ln="post_add", original_ln_before=True), "residual_before_ln='post_add' is not supported"),
        (lambda: hub(original_ln_after=False), "original_ln_after=False, .* a block must give x"),
        (lambda: hub(original_ln_before=True, residual_before_ln=False), "a block must give x"),
        (lambda: hub(is_parallel=True, original_ln_after=False), "a block must give x"),
        (lambda: from_hub({"architecture": "union", "configs": []}), "architecture='union' of AdapterHub is not supported"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
