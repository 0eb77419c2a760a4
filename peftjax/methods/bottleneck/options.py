"""The options of bottleneck adapters."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp

from peftjax.adapters.method import Method
from peftjax.adapters.options import integers, one_of, positive, probability
from peftjax.core.errors import UserError

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckOptions(Method):
    """Options of bottleneck adapters. `Houlsby`, `Pfeiffer` and `ParallelAdapter` differ in u and in defaults.

    Attributes:
        attention (bool, default False): Adapt the attention sublayers. In an adopted network all named sublayers have an adapter.
        feedforward (bool, default True): Adapt the feed-forward sublayers.
        reduction_factor (float, default 16.0): Width of the model over that of the bottleneck.
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
