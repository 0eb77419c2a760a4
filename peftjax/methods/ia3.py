"""(IA)3: y = (x W + b) * l, or y = (x * l) W + b for the targets in `feedforward`; l is trained and initialized to 1.

Liu et al. 2022 (arXiv:2205.05638), section 3.3: l_k and l_v scale the keys and the values, and l_ff scales the hidden
activations of the feed-forward block, the input of its last projection. In Llama's names this is
targets=("k_proj", "v_proj", "down_proj") with feedforward=("down_proj",). The bias is scaled with the output, as in peft.
Every layer of every expert has its own l.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, LayerMask, MethodAdapter, over_layers
from peftjax.adapters.options import names_or_pattern
from peftjax.adapters.selection import Chosen, chosen_spellings, joined, no_such_target, target_entries
from peftjax.adapters.single_experts import SingleExperts, layer_mask, vectors
from peftjax.adapters.sites import SingleSite, Site
from peftjax.adapters.targeted import Targeted
from peftjax.core.errors import UserError
from peftjax.core.paths import matching
from peftjax.core.variables import PeftParam
from peftjax.nn.experts import ExpertLinear, Groups
from peftjax.nn.linear import Linear
from peftjax.nn.slot import Base
from peftjax.quant.matmul import Kernel


def is_feedforward(name: str, feedforward: str | tuple[str, ...]) -> bool:
    """Whether the option `feedforward` matches a layer, by the rule of peft's feedforward_modules."""
    return re.fullmatch(feedforward, name) is not None if isinstance(feedforward, str) else name.endswith(feedforward)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ia3(Targeted):
    """Options of (IA)3. Targets can be Linear layers and layers of experts.

    Attributes:
        feedforward (str or tuple, default none): The targets whose input is scaled instead of their output: a regular
            expression for full names, or names. As in peft, a name matches every target that ends in it.
    """

    feedforward: str | tuple[str, ...] = ()

    method: ClassVar[str] = "ia3"
    peft_type: ClassVar[str] = "IA3"
    fits: ClassVar = (Linear, ExpertLinear)
    splits_experts: ClassVar = True
    selections: ClassVar = {"feedforward": is_feedforward}
    hf_fields: ClassVar = {key: Targeted.hf_fields[key] for key in ("targets", "exclude", "modules_to_save")} | {
        "feedforward": ("feedforward_modules", None)
    }
    hf_constants: ClassVar = {"init_ia3_weights": True, "fan_in_fan_out": False}
    hf_ignored: ClassVar = frozenset({"fan_in_fan_out"})
    hf_training: ClassVar = {"init_ia3_weights": True}
    traced_options: ClassVar = Targeted.traced_options | {"feedforward"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self._replace(feedforward=names_or_pattern("feedforward", self.feedforward))

    def chosen(self, model: nnx.Module) -> Chosen:
        chosen = super().chosen(model)
        names, given = chosen_spellings(chosen), self.feedforward
        rules = {given: given} if isinstance(given, str) else {entry: (entry,) for entry in given}
        with matching("method.feedforward", given):
            missing = [entry for entry, rule in rules.items() if not any(is_feedforward(name, rule) for name in names)]
        if missing:
            raise no_such_target("feedforward", missing[0], names)
        return chosen

    def adapters(self, chosen: Chosen, rngs: nnx.Rngs) -> Iterator[tuple[Site, "Ia3Linear | Ia3Experts"]]:
        del rngs
        into, out_of = (joined(part) for part in self._split(chosen))
        for (site, inputs), (_, outputs) in zip(into, out_of, strict=True):
            kind = Ia3Experts if isinstance(site.module, ExpertLinear) else Ia3Linear
            yield site, kind(site, inputs, outputs)

    def _split(self, chosen: Chosen) -> tuple[Chosen, Chosen]:
        """The sites, once with the layers whose input is scaled, and once with those whose output is."""
        into, out_of = [], []
        for site, mask in chosen:
            is_input = np.array([
                any(is_feedforward(name, self.feedforward) for name in names) for names in site.spellings
            ])  # fmt: skip
            into.append((site, mask & is_input))
            out_of.append((site, mask & ~is_input))
        return into, out_of

    def to_hf(self, model: nnx.Module, name: str) -> dict[str, Any]:
        config, chosen = super().to_hf(model, name), self.chosen(model)
        targets, feedforward = config["target_modules"], self.feedforward
        if isinstance(feedforward, str):
            known = not any(isinstance(site, SingleSite) for site, _ in chosen)  # peft may spell experts differently
        else:  # peft requires a subset of the names
            known = isinstance(targets, str) or set(feedforward) <= set(targets)
        if known:
            return config | {"feedforward_modules": feedforward if isinstance(feedforward, str) else list(feedforward)}
        into, out_of = map(target_entries, self._split(chosen))
        return config | {"target_modules": [*out_of, *into], "feedforward_modules": into}

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        if config.get("feedforward_modules") is None:
            raise UserError(
                "adapter_config.json: feedforward_modules is missing; peft then guesses it from the model type. Add the "
                "names of the targets whose input is scaled ([] if there are none)"
            )
        return super().from_hf(config)


class Ia3Linear(MethodAdapter):
    """((x * into) W + b) * out_of.

    Attributes:
        into: [*stack, in], or None if no layer of the stack scales its input.
        out_of: [*stack, out], or None if no layer of the stack scales its output.
        into_layers, out_of_layers: The layers that they apply to; in the others they count as 1.
    """

    zero_is_identity: ClassVar = True

    def __init__(self, site: Site, into: np.ndarray, out_of: np.ndarray) -> None:
        owner = site.module
        self.into, self.into_layers = _ones(site, into, owner.in_features, owner.axes[0])
        self.out_of, self.out_of_layers = _ones(site, out_of, owner.out_features, owner.axes[1])

    def apply(self, base: Base, x: jax.Array) -> jax.Array:
        return self.scale_output(base(self.scale_input(x)))

    def scale_input(self, x: jax.Array, owner: jax.Array | None = None) -> jax.Array:
        """Scale the input x [..., in]; of experts [n, rows, in], where block i belongs to expert owner[i]."""
        return _scaled(x, self.into, self.into_layers, owner)

    def scale_output(self, y: jax.Array, owner: jax.Array | None = None) -> jax.Array:
        """Scale the output y [..., out]; of experts [n, rows, out], where block i belongs to expert owner[i]."""
        return _scaled(y, self.out_of, self.out_of_layers, owner)

    def scale_kernel(self, kernel: Kernel, owner: jax.Array | None = None) -> jax.Array:
        """The kernel [in, out], or the experts' kernels [E, in, out], with the scales applied."""
        turned = kernel.astype(kernel.dtype).swapaxes(-1, -2)
        return self.scale_output(self.scale_input(turned, owner).swapaxes(-1, -2), owner)

    def merged(self, **parameters: jax.Array) -> dict[str, jax.Array]:
        merged = {"kernel": over_layers(self, lambda one, kernel: one.scale_kernel(kernel), parameters["kernel"])}
        if "bias" in parameters:
            merged["bias"] = over_layers(self, lambda one, bias: one.scale_output(bias), parameters["bias"])
        return merged

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        if self.into is not None and layer in self.into_layers:
            return {"ia3_l": HfLeaf("into", shape=(1, -1))}
        if self.out_of is not None and layer in self.out_of_layers:
            return {"ia3_l": HfLeaf("out_of", shape=(-1, 1))}
        return {}


class Ia3Experts(Ia3Linear, SingleExperts):
    """((x * into_e) W_e) * out_of_e in the rows x of each expert e.

    Attributes:
        into: [*stack, E, 1, in], or None if no layer scales its input. The parts of a kernel have one input.
        out_of: [*stack, E, parts, out / parts], or None if no layer scales its output.
        into_layers, out_of_layers: The layers of experts that they apply to; in the others they count as 1.
    """

    def __init__(self, site: Site, into: np.ndarray, out_of: np.ndarray) -> None:
        owner, self.parts = site.module, site.parts
        if into.any() and len(self.parts) > 1:
            layer, expert, part = np.argwhere(into)[0]
            raise UserError(
                f"method.feedforward names {site.single_experts[layer][expert][part]}, whose input cannot be scaled alone: "
                f"{' and '.join(self.parts)} of an expert have one input; remove them from feedforward or from the targets"
            )
        self.into, self.into_layers = _ones(site, into, owner.in_features, owner.axes[0])
        self.out_of, self.out_of_layers = _ones(site, out_of, owner.out_features // len(self.parts), owner.axes[1])

    def apply(self, base: Base, x: jax.Array, groups: Groups) -> jax.Array:  # type: ignore[override]
        return self.scale_output(base(self.scale_input(x, groups.owner), groups), groups.owner)

    def scale_kernel(self, kernel: Kernel, owner: jax.Array | None = None) -> jax.Array:
        return super().scale_kernel(kernel, jnp.arange(kernel.shape[0]) if owner is None else owner)

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        leaves: dict[str, HfLeaf] = {}
        if self.into is not None:
            leaves |= self.leaves_in(self.into_layers, layer, {"ia3_l": HfLeaf("into", shape=(1, -1))})
        if self.out_of is not None:
            leaves |= self.leaves_in(self.out_of_layers, layer, {"ia3_l": HfLeaf("out_of", shape=(-1, 1))})
        return leaves


def _ones(site: Site, layers: np.ndarray, size: int, axis: str) -> tuple[Any, Any]:
    """A trained scale of ones and the layers that it applies to; None for both if there are none."""
    if not layers.any():
        return nnx.data(None), nnx.data(None)
    return nnx.data(vectors(site, size, axis, 1.0)), nnx.data(layer_mask(site, layers))


def _scaled(x: jax.Array, scale: PeftParam | None, layers: LayerMask, owner: jax.Array | None) -> jax.Array:
    """x * scale over the last axis, computed in float32 since near 1 bfloat16 has steps of 0.8 %; in the dtype of x."""
    if scale is None:
        return x
    factor = layers.or_one(scale.get_value())
    if owner is not None:  # [E, parts, size / parts] -> [n, 1, size]
        factor = factor.reshape(len(factor), -1)[owner, None]
    return (x * jnp.broadcast_to(factor, x.shape)).astype(x.dtype)
