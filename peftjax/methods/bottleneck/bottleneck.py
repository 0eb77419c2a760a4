"""Bottleneck adapters: x + f(x) + B(u) for a sublayer f, B(u) = s (act(u W_down + b_down) W_up + b_up).

Houlsby et al. 2019 (arXiv:1902.00751), section 2.1: u = f(x), after attention and after feed-forward. Pfeiffer et al.
2020 (arXiv:2005.00247): u = x + f(x), only after feed-forward. He et al. 2021 (arXiv:2110.04366), table 1, scaled
parallel adapter: u = x, beside feed-forward. These are the definitions of AdapterHub's library `adapters` for pre-norm
models, where the norm is part of f. In post-norm models, as in the papers, x is the input of f itself, Pfeiffer's
adapter reads u = norm(x + f(x)), and the block continues with norm(x + f(x) + B(u)).
"""

import dataclasses
from typing import Any, ClassVar, Self, cast

from flax import nnx

from peftjax.adapters.sites import insert, sites
from peftjax.core.errors import UserError
from peftjax.methods.bottleneck.adapter import BottleneckAdapter
from peftjax.methods.bottleneck.options import LEARNED_SCALES, BottleneckOptions
from peftjax.models.base import Model
from peftjax.nn.adopt import AdoptedSublayer
from peftjax.nn.residual import Residual

# The fields of AdapterHub that define u and what follows the adapter, with the values that a missing one has.
FLOWS = {
    "is_parallel": False,
    "original_ln_before": False,
    "original_ln_after": True,
    "residual_before_ln": True,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bottleneck(BottleneckOptions):
    """Bottleneck adapters in residual sublayers."""

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
        reduction_factor (float, default 2.0): Width of the model over that of the bottleneck.
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
