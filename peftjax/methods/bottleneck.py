"""Bottleneck adapters: x + f(x) + B(u) for a sublayer f, B(u) = s (act(u W_down + b_down) W_up + b_up).

Houlsby et al. 2019 (arXiv:1902.00751), section 2.1: u = f(x), after attention and after feed-forward. Pfeiffer et al.
2020 (arXiv:2005.00247): u = x + f(x), after feed-forward alone. He et al. 2021 (arXiv:2110.04366), table 1, scaled
parallel adapter: u = x, beside feed-forward. This is how AdapterHub's library `adapters` has the three in pre-norm
models, where the norm is a part of f. In post-norm models, which the papers had, x is the input of f itself, Pfeiffer's
adapter reads u = norm(x + f(x)), and the block goes on with norm(x + f(x) + B(u)).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, LayerMask, MethodAdapter, transposed
from peftjax.adapters.method import Method, positive
from peftjax.adapters.sites import Site, place, sites
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.nn.adopt import AdoptedSublayer
from peftjax.nn.dropout import Dropout
from peftjax.nn.stack import Residual
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
LEARNED_SCALES = {"none": "", "scalar": "learned", "channel": "channel"}  # in the file's words
NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bottleneck(Method):
    """Options of bottleneck adapters; `Houlsby`, `Pfeiffer` and `ParallelAdapter` differ in what u is and in defaults.

    attention, feedforward: which sublayers have an adapter (in an adopted network all that were named).
    reduction_factor: the model's width over the bottleneck's.
    non_linearity: a key of `NON_LINEARITIES`. scale: s, or where it begins if learned_scale is "scalar" or "channel"
    (one for each feature). dropout: of B(u). norm_before: a LayerNorm before W_down. norm_after: a LayerNorm of B(u),
    or with residual_before_norm of f(x) + B(u). leave_out: the layers without adapters.
    init: of the kernels; "bert" (normal, standard deviation 0.02), "houlsby" (0.01, cut off at two standard
    deviations) or "mam_adapter" (W_down uniform, W_up zero, so that nothing changes at the start).
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

    reads: ClassVar[str]  # what u is: the sublayer's "input" or "output", or their "sum"
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

    @property
    def neutral(self) -> bool:
        return self.init == "mam_adapter" and not self.residual_before_norm

    def __post_init__(self) -> None:
        object.__setattr__(self, "leave_out", tuple(self.leave_out))
        positive(reduction_factor=self.reduction_factor)
        choices: dict[str, Any] = {"non_linearity": NON_LINEARITIES, "learned_scale": LEARNED_SCALES, "init": INITS}
        for option, known in choices.items():
            if (value := getattr(self, option)) not in known:
                raise ValueError(f"method.{option} must be one of {', '.join(known)}, it is {value!r}")
        if not self.attention and not self.feedforward:
            raise ValueError("method.attention=False and method.feedforward=False leave no place; set one to True")
        if self.residual_before_norm and (not self.norm_after or self.reads == "input"):
            raise ValueError(
                "method.residual_before_norm=True goes with method.norm_after=True, and not with a parallel adapter; "
                "set it to False"
            )

    def attach(self, model: Any, name: str, rngs: nnx.Rngs) -> None:
        wanted = {"attention_residual": self.attention, "feedforward_residual": self.feedforward}
        residuals = [site for site in sites(model) if isinstance(site.module, Residual)]
        if not residuals:
            raise ValueError(
                f"method.name={self.method!r} needs residual sublayers with a slot, and this model has none; in a network "
                "of your own name them: adopt(model, sublayers={path: width})"
            )
        if self.leave_out and len({site.path.split(".")[0] for site in residuals if site.stack}) > 1:
            raise ValueError(
                f"method.leave_out={self.leave_out} counts the layers of one stack, and this model has several; leave it empty"
            )
        for site in residuals:
            adopted = isinstance(site.module, AdoptedSublayer)
            if adopted or wanted[site.path.rsplit(".", 1)[-1]]:
                width = site.module.width if adopted else model.config.embed
                place(site, name, BottleneckAdapter(self, site, width, self._chosen(len(site.names)), rngs))

    def _chosen(self, layers: int) -> tuple[bool, ...]:
        if beyond := [layer for layer in self.leave_out if not 0 <= layer < layers]:
            raise ValueError(
                f"method.leave_out: layer {beyond[0]} is not there; the model has layers 0 to {layers - 1}"
            )
        chosen = tuple(layer not in self.leave_out for layer in range(layers))
        if not any(chosen):
            raise ValueError(f"method.leave_out={self.leave_out} leaves no layer with an adapter; leave fewer out")
        return chosen

    def to_hf(self, model: nnx.Module, name: str) -> dict[str, Any]:
        """The `config` within AdapterHub's adapter_config.json."""
        return super().to_hf(model, name) | {
            "is_parallel": self.reads == "input",
            "original_ln_before": self.reads == "sum",
            "original_ln_after": True,
            "residual_before_ln": True,
            "leave_out": list(self.leave_out),
            "scaling": LEARNED_SCALES[self.learned_scale] or float(self.scale),
        }

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Bottleneck":
        """Of the `config` within AdapterHub's adapter_config.json; `cls` is the kind that it describes."""
        rest = {key: value for key, value in config.items() if key not in ("scaling", *FLOWS)}
        if isinstance(factor := rest.get("reduction_factor"), dict):
            raise ValueError(f"adapter_config.json: reduction_factor={factor!r}, one for each layer, is not supported")
        for field in ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity"):
            if rest.get(field) is None:
                raise ValueError(f"adapter_config.json: {field} is missing in config; bottleneck adapters need it")
        rest["non_linearity"] = rest["non_linearity"].lower()
        if not rest.get("ln_after") or cls.reads == "input":
            rest["adapter_residual_before_ln"] = False  # it says nothing then
        method = super().from_hf(rest)
        scaling = config.get("scaling", 1.0)
        if isinstance(scaling, int | float):
            return dataclasses.replace(method, scale=float(scaling))
        words = {word: option for option, word in LEARNED_SCALES.items() if word}
        if scaling not in words:
            raise ValueError(f"adapter_config.json: scaling={scaling!r} is not a number, 'learned' or 'channel'")
        return dataclasses.replace(method, scale=1.0, learned_scale=words[scaling])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Houlsby(Bottleneck):
    """Adapters that read f(x), in both sublayers of a block; `DoubleSeqBnConfig` of AdapterHub. Options: `Bottleneck`'s."""

    attention: bool = True
    non_linearity: str = "swish"

    method: ClassVar[str] = "houlsby"
    reads: ClassVar[str] = "output"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pfeiffer(Bottleneck):
    """Adapters that read x + f(x), after feed-forward; `SeqBnConfig` of AdapterHub. Options: `Bottleneck`'s."""

    method: ClassVar[str] = "pfeiffer"
    reads: ClassVar[str] = "sum"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelAdapter(Bottleneck):
    """Adapters that read x, beside feed-forward; `ParBnConfig` of AdapterHub. Options: `Bottleneck`'s."""

    reduction_factor: float = 2.0
    scale: float = 4.0
    init: str = "mam_adapter"

    method: ClassVar[str] = "parallel"
    reads: ClassVar[str] = "input"


# The fields of AdapterHub that say what u is and what comes after, with the values that a missing one has.
FLOWS = {
    "is_parallel": False,
    "original_ln_before": False,
    "original_ln_after": True,
    "residual_before_ln": True,
}


def from_hub(config: dict[str, Any]) -> Bottleneck:
    """The method that the `config` of AdapterHub's adapter_config.json describes.

    Raises:
        ValueError: it is not a bottleneck adapter, or it asks for what is not supported.
    """
    if config.get("architecture") is not None:
        raise ValueError(
            f"adapter_config.json: architecture={config['architecture']!r} of AdapterHub is not supported, bottleneck "
            "adapters are"
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
    raise ValueError(
        f"adapter_config.json: {said} is not supported: a block must give x + f(x) and what the adapter adds to it"
    )


class BottleneckAdapter(MethodAdapter):
    """f(x) + B(u) in the slot of x + f(x). down: [*stack, D, R], up: [*stack, R, D], their biases [*stack, R] and
    [*stack, D]; scale: [*stack, 1 or D]; norms: scale and shift [*stack, D] each."""

    def __init__(self, method: Bottleneck, site: Site, width: int, chosen: tuple[bool, ...], rngs: nnx.Rngs) -> None:
        size = max(int(width // method.reduction_factor), 1)
        self.reads, self.non_linearity = method.reads, method.non_linearity
        self.residual_before_norm = method.residual_before_norm
        self.layers = LayerMask(chosen)
        self.dropout = Dropout(method.dropout, site.stack)

        def vector(size: int, value: float, axis: str | None) -> nnx.Variable:
            return PeftParam(jnp.full((*site.stack, size), value, jnp.float32), axes=site.lead(axis))

        down, up = _initial((*site.stack, width, size), method.init, rngs)
        self.down, self.down_bias = PeftParam(down, axes=site.lead("embed", None)), vector(size, 0.0, None)
        self.up, self.up_bias = PeftParam(up, axes=site.lead(None, "embed")), vector(width, 0.0, "embed")
        channel = method.learned_scale == "channel"
        scale = vector(width if channel else 1, method.scale, "embed" if channel else None)
        self.scale = PeftConstant(scale.get_value(), axes=scale.axes) if method.learned_scale == "none" else scale

        def norm(wanted: bool) -> Any:
            return [nnx.data(vector(width, value, "embed") if wanted else None) for value in (1.0, 0.0)]

        self.before_scale, self.before_shift = norm(method.norm_before)
        self.after_scale, self.after_shift = norm(method.norm_after)

    def __call__(self, owner: Any, compute: Callable[..., jax.Array], *inputs: Any, **parameters: Any) -> jax.Array:
        (x,) = inputs
        y = compute(x, **parameters)
        update = self.update(x if self.reads == "input" else y if self.reads == "output" else owner.join(x, y))
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
        if not self.layers.chosen[layer or 0]:
            return {}
        norm = {"adapter_down.0.weight": HfLeaf("before_scale"), "adapter_down.0.bias": HfLeaf("before_shift")}
        first = int(self.before_scale is not None)  # of adapter_down, a sequence of modules
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
    """W_down of this shape, [*stack, D, R], and W_up, [*stack, R, D], in float32."""
    *stack, width, size = shape
    turned = (*stack, size, width)
    first, second = rngs.params(), rngs.params()
    if init == "mam_adapter":
        bound = 1 / np.sqrt(width)
        return jax.random.uniform(first, shape, jnp.float32, -bound, bound), jnp.zeros(turned, jnp.float32)
    if init == "houlsby":
        down, up = (
            jax.random.truncated_normal(key, -2.0, 2.0, each) for key, each in ((first, shape), (second, turned))
        )
        return 0.01 * down, 0.01 * up
    return 0.02 * jax.random.normal(first, shape), 0.02 * jax.random.normal(second, turned)


def _affine(x: jax.Array, kernel: nnx.Variable, bias: nnx.Variable) -> jax.Array:
    y = matmul(x, kernel.get_value())
    return y + jnp.broadcast_to(bias.get_value().astype(y.dtype), y.shape)


def _layer_norm(x: jax.Array, scale: nnx.Variable, shift: nnx.Variable) -> jax.Array:
    """(x - mean) / sqrt(variance + eps) * scale + shift over the last axis, in float32, in the dtype of x."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + NORM_EPS)
    weight, bias = (jnp.broadcast_to(leaf.get_value(), x.shape) for leaf in (scale, shift))
    return (normed * weight + bias).astype(x.dtype)
