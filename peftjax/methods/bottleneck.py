"""Bottleneck adapters: x + f(x) + B(u) for a sublayer f, B(u) = s (act(u W_down + b_down) W_up + b_up).

Houlsby et al. 2019 (arXiv:1902.00751), section 2.1: u = f(x), after attention and after feed-forward. Pfeiffer et al.
2020 (arXiv:2005.00247): u = x + f(x), only after feed-forward. He et al. 2021 (arXiv:2110.04366), table 1, scaled
parallel adapter: u = x, beside feed-forward. These are the definitions of AdapterHub's library `adapters` for pre-norm
models, where the norm is part of f. In post-norm models, as in the papers, x is the input of f itself, Pfeiffer's
adapter reads u = norm(x + f(x)), and the block continues with norm(x + f(x) + B(u)).
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, LayerMask, MethodAdapter, transposed
from peftjax.adapters.method import Method
from peftjax.adapters.options import integers, one_of, positive, probability
from peftjax.adapters.sites import Site, insert, sites
from peftjax.core.errors import UserError
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.models.base import Model
from peftjax.nn.adopt import AdoptedSublayer
from peftjax.nn.dropout import Dropout
from peftjax.nn.norm import layer_norm
from peftjax.nn.residual import Residual
from peftjax.nn.slot import Base
from peftjax.quant.matmul import matmul

NON_LINEARITIES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "leakyrelu": jax.nn.leaky_relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
}
INITS = ("bert", "houlsby", "mam_adapter")
LEARNED_SCALES = {"none": "", "scalar": "learned", "channel": "channel"}  # AdapterHub's words
NORM_EPS = 1e-5

# The fields of AdapterHub that define u and what follows the adapter, with the values that a missing one has.
FLOWS = {"is_parallel": False, "original_ln_before": False, "original_ln_after": True, "residual_before_ln": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bottleneck(Method):
    """Options of bottleneck adapters. `Houlsby`, `Pfeiffer` and `ParallelAdapter` differ in u and in defaults.

    Attributes:
        attention (bool, default False): Adapt the attention sublayers. In an adopted network all named sublayers have an adapter.
        feedforward (bool, default True): Adapt the feed-forward sublayers.
        reduction_factor (float, default 16.0): Width of the model divided by the bottleneck's.
        non_linearity (str, default "relu"): Activation: relu, leakyrelu, gelu, gelu_new, quick_gelu, silu, swish, tanh or sigmoid.
        scale (float, default 1.0): Scale s, or its initial value if it is trained.
        learned_scale (str, default "none"): Train s: "none", "scalar", or "channel" for one scale per feature.
        dropout (float, default 0.0): Dropout rate of B(u).
        norm_before (bool, default False): Apply a LayerNorm before W_down.
        norm_after (bool, default False): Apply a LayerNorm to B(u).
        residual_before_norm (bool, default False): With norm_after, apply it to f(x) + B(u) instead.
        leave_out (tuple of int, default none): Layers without adapters.
        init (str, default "bert"): Initial kernels: "bert" (normal, standard deviation 0.02), "houlsby" (0.01, truncated at two
            standard deviations) or "mam_adapter" (W_down uniform, W_up zero, so that a new adapter changes nothing).
    """

    attention: bool = False
    feedforward: bool = True
    reduction_factor: float = 16.0
    non_linearity: str = "relu"
    scale: float = 1.0
    learned_scale: str = "none"
    dropout: float = 0.0
    norm_before: bool = False
    norm_after: bool = False
    residual_before_norm: bool = False
    leave_out: tuple[int, ...] = ()
    init: str = "bert"

    traced_options: ClassVar = Method.traced_options | {
        "attention", "feedforward", "leave_out", "reduction_factor", "scale", "init",
    }  # fmt: skip
    reads: ClassVar[str]  # u: the sublayer's "input" or "output", or their "sum"
    hf_fields: ClassVar = {
        "attention": ("mh_adapter", None),
        "feedforward": ("output_adapter", None),
        "reduction_factor": ("reduction_factor", None),
        "non_linearity": ("non_linearity", None),
        "dropout": ("dropout", 0.0),
        "norm_before": ("ln_before", False),
        "norm_after": ("ln_after", False),
        "residual_before_norm": ("adapter_residual_before_ln", False),
        "leave_out": ("leave_out", ()),
        "init": ("init_weights", "bert"),
    }
    hf_ignored: ClassVar = frozenset({
        "init_weights_seed", "inv_adapter_reduction_factor", "phm_dim", "factorized_phm_W", "shared_W_phm",
        "shared_phm_rule", "factorized_phm_rule", "phm_c_init", "phm_init_range", "learn_phm",
        "hypercomplex_nonlinearity", "phm_rank", "phm_bias",
    })  # fmt: skip

    def __post_init__(self) -> None:
        self._replace(leave_out=integers("leave_out", self.leave_out))
        if not math.isfinite(self.scale):
            raise UserError(f"method.scale must be a finite number, got {self.scale}")
        positive(reduction_factor=self.reduction_factor)
        probability(dropout=self.dropout)
        one_of(NON_LINEARITIES, non_linearity=self.non_linearity)
        one_of(LEARNED_SCALES, learned_scale=self.learned_scale)
        one_of(INITS, init=self.init)
        if not self.attention and not self.feedforward:
            raise UserError(
                "method.attention=False and method.feedforward=False leave no sublayer to adapt; set one to True"
            )
        if self.residual_before_norm and (not self.norm_after or self.reads == "input"):
            raise UserError(
                "method.residual_before_norm=True needs method.norm_after=True and is not possible for parallel adapters; "
                "set it to False"
            )

    @property
    def neutral(self) -> bool:
        return self.init == "mam_adapter" and not self.residual_before_norm

    def attach(self, model: nnx.Module, name: str, rngs: nnx.Rngs) -> None:
        wanted = {"attention_residual": self.attention, "feedforward_residual": self.feedforward}
        residuals = [site for site in sites(model) if isinstance(site.module, Residual)]
        if not residuals:
            raise UserError(
                f"method.name={self.method!r} needs residual sublayers with a slot, and this model has none; in a network "
                "of your own, name them: adopt(model, sublayers={path: width})"
            )
        if self.leave_out and len({site.path.split(".")[0] for site in residuals if site.stack}) > 1:
            raise UserError(
                f"method.leave_out={self.leave_out} refers to the layers of a single stack, but this model has several; leave it empty"
            )
        for site in residuals:
            adopted = isinstance(site.module, AdoptedSublayer)
            if adopted or wanted[site.path.rsplit(".", 1)[-1]]:
                width = site.module.width if adopted else cast(Model, model).config.embed
                insert(site, name, BottleneckAdapter(self, site, width, self._chosen(len(site.names)), rngs))

    def _chosen(self, layers: int) -> tuple[bool, ...]:
        if beyond := [layer for layer in self.leave_out if not 0 <= layer < layers]:
            raise UserError(
                f"method.leave_out: layer {beyond[0]} does not exist; the model has layers 0 to {layers - 1}"
            )
        chosen = tuple(layer not in self.leave_out for layer in range(layers))
        if not any(chosen):
            raise UserError(f"method.leave_out={self.leave_out} leaves no layer with an adapter; leave fewer out")
        return chosen

    def to_hf(self, model: nnx.Module, name: str) -> dict[str, Any]:
        """The `config` of AdapterHub's adapter_config.json."""
        return super().to_hf(model, name) | {
            "is_parallel": self.reads == "input",
            "original_ln_before": self.reads == "sum",
            "original_ln_after": True,
            "residual_before_ln": True,
            "leave_out": list(self.leave_out),
            "scaling": LEARNED_SCALES[self.learned_scale] or float(self.scale),
        }

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        """The method of a `config` of AdapterHub's adapter_config.json, which describes an adapter of this class."""
        rest = {key: value for key, value in config.items() if key not in ("scaling", *FLOWS)}
        if isinstance(factor := rest.get("reduction_factor"), dict):
            raise UserError(f"adapter_config.json: reduction_factor={factor!r}, one for each layer, is not supported")
        for field in ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity"):
            if rest.get(field) is None:
                raise UserError(f"adapter_config.json: {field} is missing in config; bottleneck adapters need it")
        rest["non_linearity"] = rest["non_linearity"].lower()
        if not rest.get("ln_after") or cls.reads == "input":
            rest["adapter_residual_before_ln"] = False  # it has no effect then
        method = super().from_hf(rest)
        scaling = config.get("scaling", 1.0)
        if isinstance(scaling, int | float):
            return dataclasses.replace(method, scale=float(scaling))
        words = {word: option for option, word in LEARNED_SCALES.items() if word}
        if scaling not in words:
            raise UserError(f"adapter_config.json: scaling={scaling!r} is not a number, 'learned' or 'channel'")
        return dataclasses.replace(method, scale=1.0, learned_scale=words[scaling])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Houlsby(Bottleneck):
    """Houlsby: x + f(x) + B(f(x)) for each sublayer f of a block, with B(u) = s act(u W_down) W_up trained.

    Houlsby et al. 2019 (arXiv:1902.00751), section 2.1; AdapterHub's `DoubleSeqBnConfig`.

    Attributes:
        attention (bool, default True): Adapt the attention sublayers. In an adopted network all named sublayers
            have an adapter.
        non_linearity (str, default "swish"): Activation: relu, leakyrelu, gelu, gelu_new, quick_gelu, silu, swish, tanh
            or sigmoid.
    """

    attention: bool = True
    non_linearity: str = "swish"

    method: ClassVar[str] = "houlsby"
    reads: ClassVar[str] = "output"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pfeiffer(Bottleneck):
    """Pfeiffer: x + f(x) + B(x + f(x)) for the feed-forward sublayers f, with B(u) = s act(u W_down) W_up trained.

    Pfeiffer et al. 2020 (arXiv:2005.00247); AdapterHub's `SeqBnConfig`.
    """

    method: ClassVar[str] = "pfeiffer"
    reads: ClassVar[str] = "sum"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelAdapter(Bottleneck):
    """Parallel: x + f(x) + B(x) for the feed-forward sublayers f, with B(u) = s act(u W_down) W_up trained.

    He et al. 2021 (arXiv:2110.04366), table 1; AdapterHub's `ParBnConfig`.

    Attributes:
        reduction_factor (float, default 2.0): Width of the model divided by the bottleneck's.
        scale (float, default 4.0): Scale s, or its initial value if it is trained.
        init (str, default "mam_adapter"): Initial kernels: "bert" (normal, standard deviation 0.02), "houlsby" (0.01,
            truncated at two standard deviations) or "mam_adapter" (W_down uniform, W_up zero, so that a new adapter
            changes nothing).
    """

    reduction_factor: float = 2.0
    scale: float = 4.0
    init: str = "mam_adapter"

    method: ClassVar[str] = "parallel"
    reads: ClassVar[str] = "input"


def from_hub(config: dict[str, Any]) -> Bottleneck:
    """The method that the `config` of AdapterHub's adapter_config.json describes.

    Raises:
        UserError: It does not describe a bottleneck adapter, or asks for something that is not supported.
    """
    if config.get("architecture") is not None:
        raise UserError(
            f"adapter_config.json: architecture={config['architecture']!r} of AdapterHub is not supported; only "
            "bottleneck adapters are"
        )
    flow = {key: config.get(key, default) for key, default in FLOWS.items()}
    parallel, before, after, around = flow.values()
    if parallel and after:
        return ParallelAdapter.from_hf(config)
    if after and not before and not parallel:
        return Houlsby.from_hf(config)
    norm_of_sum = config.get("ln_after") and config.get("adapter_residual_before_ln")
    if before and not parallel and ((after, around) == (True, True) or (not after and not around and not norm_of_sum)):
        return Pfeiffer.from_hf(config)
    said = ", ".join(f"{key}={value!r}" for key, value in flow.items())
    raise UserError(
        f"adapter_config.json: {said} is not supported: a block must give x + f(x) plus the output of the adapter"
    )


class BottleneckAdapter(MethodAdapter):
    """f(x) + B(u), with B(u) = dropout(scale (act(u down + down_bias) up + up_bias)).

    Attributes:
        down: [*stack, D, R].
        down_bias: [*stack, R].
        up: [*stack, R, D].
        up_bias: [*stack, D].
        scale: [*stack, 1 or D].
        before_scale, before_shift: The LayerNorm of u, [*stack, D] each, or None.
        after_scale, after_shift: The LayerNorm of B(u) or of f(x) + B(u), [*stack, D] each, or None.
    """

    zero_is_identity: ClassVar = True

    def __init__(self, method: Bottleneck, site: Site, width: int, chosen: Iterable[bool], rngs: nnx.Rngs) -> None:
        size = max(int(width // method.reduction_factor), 1)
        self.reads, self.non_linearity = method.reads, method.non_linearity
        self.residual_before_norm = method.residual_before_norm
        self.layers = LayerMask(chosen)
        self.dropout = Dropout(method.dropout, site.stack)

        def vector(size: int, value: float, axis: str | None, kind: type[nnx.Variable] = PeftParam) -> nnx.Variable:
            return kind(jnp.full((*site.stack, size), value, jnp.float32), axes=site.lead(axis))

        def norm(wanted: bool) -> Any:
            return [nnx.data(vector(width, value, "embed") if wanted else None) for value in (1.0, 0.0)]

        down, up = _initial((*site.stack, width, size), method.init, rngs)
        self.down, self.down_bias = PeftParam(down, axes=site.lead("embed", None)), vector(size, 0.0, None)
        self.up, self.up_bias = PeftParam(up, axes=site.lead(None, "embed")), vector(width, 0.0, "embed")
        scales, axis = (width, "embed") if method.learned_scale == "channel" else (1, None)
        self.scale = vector(scales, method.scale, axis, PeftConstant if method.learned_scale == "none" else PeftParam)
        self.before_scale, self.before_shift = norm(method.norm_before)
        self.after_scale, self.after_shift = norm(method.norm_after)

    def apply(self, base: Base, x: jax.Array) -> jax.Array:
        y = base(x)
        update = self.update(x if self.reads == "input" else y if self.reads == "output" else base.layer.join(x, y))
        if self.after_scale is None:
            changed = y + update
        elif self.residual_before_norm:
            changed = _layer_norm(y + update, self.after_scale, self.after_shift)
        else:
            changed = y + _layer_norm(update, self.after_scale, self.after_shift)
        return self.layers(changed, y)

    def update(self, u: jax.Array) -> jax.Array:
        """dropout(B(u)): [..., D] -> [..., D]."""
        if self.before_scale is not None:
            u = _layer_norm(u, self.before_scale, self.before_shift)
        low = NON_LINEARITIES[self.non_linearity](_affine(u, self.down, self.down_bias))  # [..., R]
        y = _affine(low, self.up, self.up_bias)
        return self.dropout((y * jnp.broadcast_to(self.scale.get_value(), y.shape)).astype(y.dtype))

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        if layer not in self.layers:
            return {}
        norm = {"adapter_down.0.weight": HfLeaf("before_scale"), "adapter_down.0.bias": HfLeaf("before_shift")}
        first = int(self.before_scale is not None)  # index in adapter_down, a sequence of modules
        leaves = (norm if first else {}) | {
            f"adapter_down.{first}.weight": transposed("down"),
            f"adapter_down.{first}.bias": HfLeaf("down_bias"),
            "adapter_up.weight": transposed("up"),
            "adapter_up.bias": HfLeaf("up_bias"),
        }
        if isinstance(self.scale, PeftParam):
            leaves["scaling"] = HfLeaf("scale")
        if self.after_scale is not None:
            leaves["adapter_norm_after.weight"] = HfLeaf("after_scale")
            leaves["adapter_norm_after.bias"] = HfLeaf("after_shift")
        return leaves


def _initial(shape: tuple[int, ...], init: str, rngs: nnx.Rngs) -> tuple[jax.Array, jax.Array]:
    """Initial W_down [*stack, D, R], which is `shape`, and W_up [*stack, R, D], float32."""
    *stack, width, size = shape
    turned, first, second = (*stack, size, width), rngs.params(), rngs.params()
    if init == "mam_adapter":
        bound = 1 / np.sqrt(width)
        return jax.random.uniform(first, shape, jnp.float32, -bound, bound), jnp.zeros(turned, jnp.float32)
    if init == "houlsby":
        draw = partial(jax.random.truncated_normal, lower=-2.0, upper=2.0)
        return 0.01 * draw(first, shape=shape), 0.01 * draw(second, shape=turned)
    return 0.02 * jax.random.normal(first, shape), 0.02 * jax.random.normal(second, turned)


def _affine(x: jax.Array, kernel: nnx.Variable, bias: nnx.Variable) -> jax.Array:
    y = matmul(x, kernel.get_value())
    return y + jnp.broadcast_to(bias.get_value().astype(y.dtype), y.shape)


def _layer_norm(x: jax.Array, scale: nnx.Variable, shift: nnx.Variable) -> jax.Array:
    return layer_norm(x, scale.get_value(), shift.get_value(), NORM_EPS)
