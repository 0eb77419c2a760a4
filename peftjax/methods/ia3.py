"""(IA)3: y = (x W + b) * l, or y = (x * l) W + b for the targets in `feedforward`; l is trained and initialized to 1.

Liu et al. 2022 (arXiv:2205.05638), section 3.3: l_k and l_v scale the keys and the values, and l_ff scales the hidden
activations of the feed-forward block, the input of its last projection. In Llama's names this is
targets=("k_proj", "v_proj", "down_proj") with feedforward=("down_proj",). The bias is scaled with the output, as in peft.
"""

import dataclasses
import re
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, LayerMask, MethodAdapter, over_layers
from peftjax.adapters.options import names_or_pattern
from peftjax.adapters.sites import Chosen, Site
from peftjax.adapters.targeted import Targeted, chosen_names
from peftjax.core.errors import UserError
from peftjax.core.paths import matching, suggest
from peftjax.core.variables import PeftParam
from peftjax.nn.slot import Base


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ia3(Targeted):
    """Options of (IA)3.

    Attributes:
        feedforward (str or tuple, default none): The targets whose input is scaled instead of their output: a regular
            expression for full names, or names. As in peft, a name matches every target that ends in it.
    """

    feedforward: str | tuple[str, ...] = ()

    method: ClassVar[str] = "ia3"
    peft_type: ClassVar[str] = "IA3"
    hf_fields: ClassVar = {key: Targeted.hf_fields[key] for key in ("targets", "exclude", "modules_to_save")} | {
        "feedforward": ("feedforward_modules", None)
    }
    hf_constants: ClassVar = {"init_ia3_weights": True, "fan_in_fan_out": False}
    hf_ignored: ClassVar = frozenset({"fan_in_fan_out"})
    hf_training: ClassVar = {"init_ia3_weights": True}

    def __post_init__(self) -> None:
        super().__post_init__()
        self._replace(feedforward=names_or_pattern(self.feedforward))

    def chosen(self, model: nnx.Module) -> Chosen:
        chosen = super().chosen(model)
        with matching("method.feedforward", self.feedforward):
            self._check_feedforward(chosen_names(chosen))
        return chosen

    def _check_feedforward(self, names: list[str]) -> None:
        """Raises a UserError if an entry of `feedforward` means none of the targets."""
        for entry in (self.feedforward,) if isinstance(self.feedforward, str) else self.feedforward:
            if not any(_means(self.feedforward if entry == self.feedforward else (entry,), name) for name in names):
                last = sorted({name.rsplit(".", 1)[-1] for name in names})
                raise UserError(
                    f"method.feedforward: {entry!r} matches no target.{suggest(entry, last)} Targets: {', '.join(last)}"
                )

    def adapter(self, site: Site, mask: np.ndarray, rngs: nnx.Rngs) -> "Ia3Linear":
        del rngs
        feedforward = np.array([_means(self.feedforward, name) for name in site.names])
        return Ia3Linear(site, mask & feedforward, mask & ~feedforward)

    def to_hf(self, model: nnx.Module, name: str) -> dict[str, Any]:
        config = super().to_hf(model, name)
        if isinstance(self.feedforward, str):
            return config
        targets, feedforward = config["target_modules"], list(self.feedforward)
        if not isinstance(targets, str) and not set(feedforward) <= set(targets):  # peft requires a subset of the names
            targets = chosen_names(self.chosen(model))
            feedforward = [target for target in targets if _means(self.feedforward, target)]
        return config | {"target_modules": targets, "feedforward_modules": feedforward}

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        if config.get("feedforward_modules") is None:
            raise UserError(
                "adapter_config.json: feedforward_modules is missing; peft then guesses it from the model type. Add the "
                "names of the targets whose input is scaled ([] if there are none)"
            )
        return super().from_hf(config)


def _means(feedforward: str | tuple[str, ...], name: str) -> bool:
    return re.fullmatch(feedforward, name) is not None if isinstance(feedforward, str) else name.endswith(feedforward)


class Ia3Linear(MethodAdapter):
    """((x * into) W + b) * out_of.

    Attributes:
        into: [*stack, in], or None if no layer of the stack scales its input.
        out_of: [*stack, out], or None if no layer of the stack scales its output.
        into_layers, out_of_layers: The layers that they apply to; in the others they stand for 1.
    """

    def __init__(self, site: Site, into: np.ndarray, out_of: np.ndarray) -> None:
        owner = site.module
        self.into, self.into_layers = _ones(site, into, owner.in_features, owner.axes[0])
        self.out_of, self.out_of_layers = _ones(site, out_of, owner.out_features, owner.axes[1])

    def apply(self, base: Base, x: jax.Array) -> jax.Array:
        return self.scale_output(base(self.scale_input(x)))

    def scale_input(self, x: jax.Array) -> jax.Array:
        return x if self.into is None else _scaled(x, self.into_layers.or_one(self.into.get_value()))

    def scale_output(self, y: jax.Array) -> jax.Array:
        return y if self.out_of is None else _scaled(y, self.out_of_layers.or_one(self.out_of.get_value()))

    def merged(self, **parameters: jax.Array) -> dict[str, jax.Array]:
        def kernel(one: "Ia3Linear", kernel: jax.Array) -> jax.Array:
            return one.scale_output(one.scale_input(kernel.astype(kernel.dtype).T).T)

        merged = {"kernel": over_layers(self, kernel, parameters["kernel"])}
        if "bias" in parameters:
            merged["bias"] = over_layers(self, lambda one, bias: one.scale_output(bias), parameters["bias"])
        return merged

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        if self.into is not None and layer in self.into_layers:
            return {"ia3_l": HfLeaf("into", shape=(1, self.into.shape[-1]))}
        if self.out_of is not None and layer in self.out_of_layers:
            return {"ia3_l": HfLeaf("out_of", shape=(self.out_of.shape[-1], 1))}
        return {}


def _ones(site: Site, layers: np.ndarray, size: int, axis: str) -> tuple[Any, Any]:
    """A trained scale of ones and the layers that it applies to; None for both if there are none."""
    if not layers.any():
        return nnx.data(None), nnx.data(None)
    value = PeftParam(jnp.ones((*site.stack, size), jnp.float32), axes=site.lead(axis))
    return nnx.data(value), nnx.data(LayerMask(layers))


def _scaled(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x * scale over the last axis, computed in float32 since near 1 bfloat16 has steps of 0.8 %; in the dtype of x."""
    return (x * jnp.broadcast_to(scale, x.shape)).astype(x.dtype)
