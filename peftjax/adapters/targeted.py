"""Methods that sit in layers chosen by name: the options that choose them, and layers that are trained whole."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, MethodAdapter, Override
from peftjax.adapters.method import Method
from peftjax.adapters.sites import Chosen, Site, choose, head_sites, place, sites, tied_kernel
from peftjax.nn.linear import Conv1D, Linear

REGEX = set("*+?()[]{}|^$\\")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Targeted(Method):
    """Options that say where the adapters go; module names are Hugging Face's (`q_proj`, `model.layers.0.mlp.up_proj`).

    targets: "all-linear" (every Linear but the head), a tuple of names or name endings, or a string: a regular
    expression for the whole name, or names separated by commas.
    exclude: names or a regular expression to leave out. layers_to_transform: only these layers.
    modules_to_save: layers to train whole and not by the method, such as lm_head: those whose name ends so, as peft has
    it, be it within a word ("norm" means input_layernorm too). A classification head is always one of them.
    """

    targets: str | tuple[str, ...] = "all-linear"
    exclude: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    modules_to_save: tuple[str, ...] = ()

    fits: ClassVar[tuple[type[nnx.Module], ...]] = (Linear,)  # kinds of layers that can be targets
    every: ClassVar[str] = "all-linear"  # the word for all targets, `in_every`
    hf_fields: ClassVar[dict[str, tuple[str, Any]]] = {
        "targets": ("target_modules", None),
        "exclude": ("exclude_modules", None),
        "layers_to_transform": ("layers_to_transform", None),
        "modules_to_save": ("modules_to_save", None),
    }
    hf_ignored: ClassVar[frozenset[str]] = frozenset({"layers_pattern", "fan_in_fan_out"})

    def __post_init__(self) -> None:
        for field in ("targets", "exclude"):
            object.__setattr__(self, field, names_or_pattern(getattr(self, field)))
        layers, saved = self.layers_to_transform, self.modules_to_save
        object.__setattr__(self, "layers_to_transform", (layers,) if isinstance(layers, int) else tuple(layers))
        object.__setattr__(self, "modules_to_save", split_names(saved) if isinstance(saved, str) else tuple(saved))
        if self.layers_to_transform and isinstance(self.targets, str) and self.targets != self.every:
            raise ValueError(
                "method.layers_to_transform goes with names, not with a regular expression for whole names"
            )

    def adapter(self, site: Site, mask: np.ndarray, rngs: nnx.Rngs) -> MethodAdapter:
        """A new adapter for a site; mask: the layers of its stack that it is in."""
        raise NotImplementedError

    def attach(self, model: nnx.Module, name: str, rngs: nnx.Rngs) -> None:
        for site, mask in self.chosen(model):
            place(site, name, self.adapter(site, mask, rngs))
        train_whole(model, self.saved(model), name)

    def chosen(self, model: nnx.Module) -> Chosen:
        """The sites that get an adapter."""
        layers = [site for site in sites(model) if isinstance(site.module, self.fits)]
        targets = self.targets
        if targets == self.every:
            layers, targets = [site for site in layers if self.in_every(site, model)], ".*"
        chosen = choose(layers, targets, exclude=self.exclude, layers=self.layers_to_transform)
        saved = {site.path: mask for site, mask in self.saved(model)}
        chosen = [(site, mask & ~saved[site.path] if site.path in saved else mask) for site, mask in chosen]
        chosen = [(site, mask) for site, mask in chosen if mask.any()]
        if not chosen:
            raise ValueError(
                f"method.targets={self.targets!r}: every one of them is in modules_to_save or a classification head"
            )
        return chosen

    def in_every(self, site: Site, model: nnx.Module) -> bool:
        """Whether the word `every` means a site."""
        return isinstance(site.module, Linear) and site.path not in getattr(type(model), "output_layers", ())

    def saved(self, model: nnx.Module) -> Chosen:
        """The sites of modules_to_save, and those of a classification head."""
        names = [name for site in sites(model) for name in site.names]
        ending = {entry: [name for name in names if name.endswith(entry)] for entry in self.modules_to_save}
        meant = tuple(name for entry, found in ending.items() for name in found or [entry])
        meant += tuple(name for site in head_sites(model) for name in site.names)
        return choose(sites(model), meant, what="modules_to_save") if meant else []

    def to_hf(self, model: nnx.Module, name: str) -> dict[str, Any]:
        config = super().to_hf(model, name)
        options = ("exclude", "layers_to_transform")
        if any(getattr(self, option) and option not in self.hf_fields for option in options):
            config["target_modules"] = chosen_names(self.chosen(model))  # for peft has no field that leaves one out
        elif self.targets == self.every:
            config["target_modules"] = sorted(
                {hf.rsplit(".", 1)[-1] for site, _ in self.chosen(model) for hf in site.names}
            )
        if "fan_in_fan_out" in config:  # peft's word for kernels that are stored as [in, out]
            config["fan_in_fan_out"] = any(isinstance(site.module, Conv1D) for site, _ in self.chosen(model))
        return config

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Any:
        if config.get("target_modules") is None:
            raise ValueError(f"adapter_config.json: target_modules is missing; {cls.peft_type} needs it")
        return super().from_hf(config)


def chosen_names(chosen: Chosen) -> list[str]:
    """The whole names of all layers chosen."""
    return [hf for site, mask in chosen for hf, used in zip(site.names, mask, strict=True) if used]


def train_whole(model: nnx.Module, chosen: Chosen, name: str) -> None:
    """Put a trained copy of all parameters of each site into its slot (modules_to_save)."""
    for site, mask in chosen:
        stored = getattr(type(site.module), "hf_leaves", {})
        values = {leaf: variable.get_value() for leaf, variable in site.parameters.items()}
        axes = {leaf: variable.axes for leaf, variable in site.parameters.items()}
        if "kernel" not in values and "kernel" in stored:  # a head tied to the embedding
            values["kernel"], axes["kernel"] = tied_kernel(model), site.module.axes
        if not values:
            raise ValueError(f"method.modules_to_save: {site.names[0]} has no parameters of its own")
        hf = {suffix: HfLeaf(leaf, axes=order) for leaf, (suffix, order) in stored.items() if leaf in values}
        widened = {leaf: jnp.array(value.astype(jnp.float32)) for leaf, value in values.items()}
        place(site, name, Override(widened, axes, hf, tuple(bool(x) for x in mask)))


def names_or_pattern(value: Any) -> str | tuple[str, ...]:
    """A regular expression or a word like "all-linear" as it is; names, also between commas, as a tuple."""
    if value is None:
        raise ValueError(
            "method.targets and method.exclude are names, a tuple of names or a regular expression, not None"
        )
    if not isinstance(value, str):
        return tuple(value)
    if value.startswith("all-") or REGEX & set(value):
        return value
    return split_names(value)


def split_names(names: str) -> tuple[str, ...]:
    """The names of a string that has them between commas."""
    return tuple(name.strip() for name in names.split(",") if name.strip())
