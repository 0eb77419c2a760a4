"""(IA)3: y = (x W + b) * l, or y = (x * l) W + b for the targets in `feedforward`; l is trained and 1 at the start.

Liu et al. 2022 (arXiv:2205.05638), section 3.3: l_k and l_v scale the keys and the values, l_ff the activations in the
middle of the feed-forward block, which are the input of its last projection. In Llama's names this is
targets=("k_proj", "v_proj", "down_proj") with feedforward=("down_proj",). The bias is scaled with the output, as in
peft.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, LayerMask, MethodAdapter, over_layers
from peftjax.adapters.sites import Chosen, Site
from peftjax.adapters.targeted import Targeted, chosen_names, names_or_pattern
from peftjax.core.paths import suggest
from peftjax.core.variables import PeftParam


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ia3(Targeted):
    """Options of (IA)3, beside those of `Targeted`.

    feedforward: the targets whose input is scaled and not their output: a regular expression for the whole name, or
    names; as peft has it, those of the targets whose name ends so.
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
        object.__setattr__(self, "feedforward", names_or_pattern(self.feedforward))

    def chosen(self, model: nnx.Module) -> Chosen:
        chosen = super().chosen(model)
        names = chosen_names(chosen)
        for entry in (self.feedforward,) if isinstance(self.feedforward, str) else self.feedforward:
            if not any(_means(self.feedforward if entry == self.feedforward else (entry,), name) for name in names):
                last = sorted({name.rsplit(".", 1)[-1] for name in names})
                raise ValueError(
                    f"method.feedforward: {entry!r} matches no target.{suggest(entry, last)} Targets: {', '.join(last)}"
                )
        return chosen

    def adapter(self, site: Site, mask: np.ndarray, rngs: nnx.Rngs) -> "Ia3Linear":
        del rngs
        feedforward = np.array([_means(self.feedforward, name) for name in site.names])
        return Ia3Linear(site, mask & feedforward, mask & ~feedforward)

    def to_hf(self, model: nnx.Module, name: str) -> dict[str, Any]:
        config = super().to_hf(model, name)
        if isinstance(self.feedforward, str):
            return config
        targets, feedforward = config["target_modules"], list(self.feedforward)
        if not isinstance(targets, str) and not set(feedforward) <= set(targets):  # peft asks for a subset of the names
            targets = chosen_names(self.chosen(model))
            feedforward = [target for target in targets if _means(self.feedforward, target)]
        return config | {"target_modules": targets, "feedforward_modules": feedforward}

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Ia3":
        if config.get("feedforward_modules") is None:
            raise ValueError(
                "adapter_config.json: feedforward_modules is missing; peft then guesses it from the kind of model. Add "
                "the names of the targets whose input is scaled ([] where there is none)"
            )
        return super().from_hf(config)


def _means(feedforward: str | tuple[str, ...], name: str) -> bool:
    return re.fullmatch(feedforward, name) is not None if isinstance(feedforward, str) else name.endswith(feedforward)


class Ia3Linear(MethodAdapter):
    """((x * into) W + b) * out_of. into: [*stack, in] or None; out_of: [*stack, out] or None.

    In layers of the stack where one of them is not in force it stands for 1.
    """

    def __init__(self, site: Site, into: np.ndarray, out_of: np.ndarray) -> None:
        owner = site.module
        self.into, self.into_layers = _ones(site, into, owner.in_features, owner.axes[0])
        self.out_of, self.out_of_layers = _ones(site, out_of, owner.out_features, owner.axes[1])

    def __call__(
        self, owner: nnx.Module, compute: Callable[..., jax.Array], *inputs: Any, **parameters: Any
    ) -> jax.Array:
        (x,) = inputs
        return self._after(compute(self._before(x), **parameters))

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        if self.into is not None and self.into_layers.chosen[layer or 0]:
            return {"ia3_l": HfLeaf("into", shape=(1, self.into.shape[-1]))}
        if self.out_of is not None and self.out_of_layers.chosen[layer or 0]:
            return {"ia3_l": HfLeaf("out_of", shape=(self.out_of.shape[-1], 1))}
        return {}

    def merged(self, **parameters: jax.Array) -> dict[str, jax.Array]:
        def kernel(one: "Ia3Linear", kernel: jax.Array) -> jax.Array:
            return one._after(one._before(kernel.astype(kernel.dtype).T).T)

        merged = {"kernel": over_layers(self, kernel, parameters["kernel"])}
        if "bias" in parameters:
            merged["bias"] = over_layers(self, lambda one, bias: one._after(bias), parameters["bias"])
        return merged

    def _before(self, x: jax.Array) -> jax.Array:
        return x if self.into is None else _scaled(x, self.into.get_value(), self.into_layers)

    def _after(self, y: jax.Array) -> jax.Array:
        return y if self.out_of is None else _scaled(y, self.out_of.get_value(), self.out_of_layers)


def _ones(site: Site, layers: np.ndarray, size: int, axis: str) -> tuple[Any, Any]:
    if not layers.any():
        return nnx.data(None), nnx.data(None)
    value = PeftParam(jnp.ones((*site.stack, size), jnp.float32), axes=site.lead(axis))
    return nnx.data(value), nnx.data(LayerMask(tuple(bool(layer) for layer in layers)))


def _scaled(x: jax.Array, scale: jax.Array, layers: LayerMask) -> jax.Array:
    """x * scale over the last axis, in float32 and rounded to the dtype of x: near 1 bfloat16 has steps of 0.8 %."""
    scale = layers(scale, jnp.ones_like(scale))
    return (x * jnp.broadcast_to(scale, x.shape)).astype(x.dtype)
