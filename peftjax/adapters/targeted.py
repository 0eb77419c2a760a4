"""Methods that sit in layers chosen by name, and layers that are trained in full."""

import dataclasses
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Self

import numpy as np
from flax import nnx

from peftjax.adapters.adapter import MethodAdapter
from peftjax.adapters.method import Method
from peftjax.adapters.options import integers, names_or_pattern, probability, split_names
from peftjax.adapters.saved_modules import is_saved, nested_entries, outermost, train_whole
from peftjax.adapters.selection import Chosen, choose, chosen_names, ending_of, last_names, target_entries
from peftjax.adapters.sites import SingleSite, Site, head_sites, insert, single_sites, sites
from peftjax.core.errors import UserError
from peftjax.core.paths import matches, matching
from peftjax.models.base import Model
from peftjax.nn.experts import ExpertLinear
from peftjax.nn.linear import Conv1D, Linear
from peftjax.nn.routing import Router

DROPOUTS = ("dropout", "rank_dropout", "module_dropout")

Rule = Callable[[str, str | tuple[str, ...]], bool]  # whether an option of names or a regular expression matches a name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Targeted(Method):
    """Options that choose layers. Module names are Hugging Face's (`q_proj`, `model.layers.0.mlp.up_proj`).

    Attributes:
        targets (str or tuple, default "all-linear"): The layers that get an adapter: "all-linear" (every Linear
            except the head and routers, and with lora, ia3 and vera also experts), a tuple of names or name endings,
            comma-separated names, or a regular expression for full names.
        exclude (str or tuple, default none): Names or a regular expression to leave out.
        layers_to_transform (tuple of int, default all): The only layers of the stack that get adapters. As in peft, layers
            that `targets` gives by their whole name, such as lm_head, get adapters too.
        modules_to_save (tuple, default none): Modules to train in full, such as lm_head or mlp, instead of adapting their
            layers. As in peft, an entry matches every name that ends in it, even within a word ("norm" also matches
            input_layernorm). A classification head is always trained in full.
    """

    targets: str | tuple[str, ...] = "all-linear"
    exclude: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    modules_to_save: tuple[str, ...] = ()

    fits: ClassVar[tuple[type[nnx.Module], ...]] = (Linear,)  # kinds of layers that can be targets
    splits_experts: ClassVar[bool] = False  # whether each layer of each expert is a target of its own
    every: ClassVar[str] = "all-linear"  # the word for all targets, `in_every`
    adapts_parameters: ClassVar[bool] = False  # whether peft also adapts parameters with the method, target_parameters
    tables: ClassVar[tuple[str, ...]] = ()  # options that are tables by module name, such as rank_pattern
    selections: ClassVar[Mapping[str, Rule]] = {}  # options that select some of the targets
    traced_options: ClassVar[frozenset[str]] = Method.traced_options | {"targets", "exclude", "layers_to_transform"}
    hf_fields: ClassVar[dict[str, tuple[str, Any]]] = {
        "targets": ("target_modules", None),
        "exclude": ("exclude_modules", None),
        "layers_to_transform": ("layers_to_transform", None),
        "modules_to_save": ("modules_to_save", None),
    }
    hf_ignored: ClassVar[frozenset[str]] = frozenset({"layers_pattern", "fan_in_fan_out"})

    def __post_init__(self) -> None:
        self._replace(
            targets=names_or_pattern("targets", self.targets),
            exclude=names_or_pattern("exclude", self.exclude),
            layers_to_transform=integers("layers_to_transform", self.layers_to_transform),
            modules_to_save=split_names("modules_to_save", self.modules_to_save),
        )
        probability(**{name: value for name, value in vars(self).items() if name in DROPOUTS})
        if self.layers_to_transform and isinstance(self.targets, str) and self.targets != self.every:
            raise UserError(
                f"method.layers_to_transform={self.layers_to_transform} needs targets that are names; "
                f"targets={self.targets!r} is a regular expression, which can name the layers itself"
            )

    def adapter(self, site: Site, mask: np.ndarray, rngs: nnx.Rngs) -> MethodAdapter:
        """A new adapter for a site; mask: bool [layers], the layers of its stack that get it."""
        raise NotImplementedError

    def adapters(self, chosen: Chosen, rngs: nnx.Rngs) -> Iterator[tuple[Site, MethodAdapter]]:
        """The new adapters of all sites; overridden where they share arrays."""
        for site, mask in chosen:
            yield site, self.adapter(site, mask, rngs)

    def attach(self, model: nnx.Module, name: str, rngs: nnx.Rngs) -> None:
        for site, adapter in self.adapters(self.chosen(model), rngs):
            insert(site, name, adapter)
        train_whole(self.saved(model), name)

    def chosen(self, model: nnx.Module) -> Chosen:
        """The sites that get an adapter."""
        layers, every = self.candidates(model), self.targets == self.every
        if every:
            layers = [site for site in layers if self.in_every(site, model)]
        else:
            self._check_experts(model)
        chosen = choose(layers, self.targets, every=every, exclude=self.exclude, layers=self.layers_to_transform)
        saved = {site.path: mask for site, mask in self.saved(model)}
        chosen = [(site, mask & ~saved[site.path] if site.path in saved else mask) for site, mask in chosen]
        chosen = [(site, mask) for site, mask in chosen if mask.any()]
        if not chosen:
            raise UserError(
                f"method.targets={self.targets!r} leaves no layer to adapt: all of them are in modules_to_save or belong "
                "to a classification head"
            )
        return chosen

    @property
    def adapts_tokens(self) -> bool:
        """Whether options other than `targets` and `modules_to_save` train rows of the embedding or tie the head to it."""
        return False

    def without_effect(self, model: nnx.Module, has_tensors: Callable[[str], bool]) -> dict[str, Any]:
        """The options from an adapter file that have no effect in a model, with the values that leave them out.

        `has_tensors` returns whether the file has tensors of a module.
        """
        del model, has_tensors
        return {}

    def candidates(self, model: nnx.Module) -> list[Site]:
        """The sites that can be targets."""
        found = [site for site in sites(model) if isinstance(site.module, self.fits)]
        if not self.splits_experts:
            return found
        split = (single_sites(site) if isinstance(site.module, ExpertLinear) else [site] for site in found)
        return [site for each in split for site in each]

    def in_every(self, site: Site, model: nnx.Module) -> bool:
        """Whether the word `every` includes a site."""
        outputs = model.output_layers if isinstance(model, Model) else ()
        linear = isinstance(site.module, Linear | ExpertLinear) and not isinstance(site.module, Router)
        return linear and site.path not in outputs

    def _check_experts(self, model: nnx.Module) -> None:
        """Refuse targets that name experts, if the method cannot adapt them."""
        fitting = {site.path for site in self.candidates(model)}
        with matching("method.targets", self.targets, self.exclude):
            named = [
                (site, name)
                for site in sites(model)
                if isinstance(site.module, ExpertLinear) and site.path not in fitting
                for name in site.names
                if matches(name, self.targets) and not (self.exclude and matches(name, self.exclude))
            ]
        if named:
            site, name = named[0]
            parameter = f"in this model they are always one parameter, and peft applies {self.method} to modules only"
            raise UserError(
                f"method.targets={self.targets!r} names experts ({name}), which {self.method} cannot adapt"
                f"{f': {parameter}' if self.splits_experts else ''}; use "
                f"{'lora, ia3 or vera' if site.parts else 'lora'}, or name other layers"
            )

    def saved(self, model: nnx.Module) -> Chosen:
        """The sites that are trained in full: modules_to_save and a classification head."""
        layers = sites(model)
        for entry, (outside, outer) in nested_entries(layers, self.modules_to_save).items():
            if not outside:
                raise UserError(
                    f"method.modules_to_save: {entry!r} is inside {outer!r}, which is trained in full; remove {entry!r}"
                )
        has_values = {
            name: bool(site.parameters) or isinstance(site.module, Linear)  # a tied head has the embedding's
            for site in layers
            for name in site.names
        }
        names: tuple[str, ...] = ()
        for entry in self.modules_to_save:
            found = [name for name in has_values if is_saved(name, entry)]
            names += tuple([name for name in found if has_values[name]] or found or [entry])
        names += tuple(name for site in head_sites(model) for name in site.names)
        return choose(layers, names, what="modules_to_save") if names else []

    def to_hf(self, model: nnx.Module, name: str) -> dict[str, Any]:
        config, chosen = super().to_hf(model, name), self.chosen(model)
        left_out = [option for option in ("exclude", "layers_to_transform") if getattr(self, option)]
        part = isinstance(model, Model) and model.hf_part  # the other parts have layers with the same names
        singles = [site for site, _ in chosen if isinstance(site, SingleSite)]
        known = self.targets == self.every or all(matches(ending_of(site), self.targets) for site in singles)
        if singles and (part or left_out or not known):  # peft does not know the names of all experts
            config["target_modules"] = target_entries(chosen)
            config |= {self.hf_fields[option][0]: None for option in left_out if option in self.hf_fields}
        elif part or any(option not in self.hf_fields for option in left_out):
            config["target_modules"] = chosen_names(chosen)  # peft has no field that leaves a layer out
        elif self.targets == self.every:
            config["target_modules"] = last_names(name for site, _ in chosen for name in site.names)
        elif isinstance(self.targets, str) and self._matches_others(model, self.targets):
            config["target_modules"] = chosen_names(chosen)  # peft would fail at the other modules
        if (saved := outermost(model, self.modules_to_save)) != self.modules_to_save:  # peft could not load nested ones
            config["modules_to_save"] = list(saved)
        if "fan_in_fan_out" in config:  # peft's name for kernels that are stored as [in, out]
            config["fan_in_fan_out"] = any(isinstance(site.module, Conv1D) for site, _ in chosen)
        return config

    def _matches_others(self, model: nnx.Module, pattern: str) -> bool:
        """Whether a regular expression matches modules that cannot be targets: `.*mlp.*` matches the container `mlp`.

        Not all of them are known here, such as activations, so it is tried with another child of each container.
        """
        names = {name for site in sites(model) for name in site.names}
        containers = {name[: dot.start()] for name in names for dot in re.finditer(r"\.", name)}
        others = names.difference(*(site.names for site in self.candidates(model)))
        children = (f"{container}.other" for container in containers)
        with matching("method.targets", pattern):
            return any(matches(name, pattern) for name in itertools.chain(others, containers, children))

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        if config.get("target_modules") is None:
            raise UserError(f"adapter_config.json: target_modules is missing; {cls.peft_type} needs it")
        layers, targets = config.get("layers_to_transform"), config["target_modules"]
        if layers not in (None, []) and isinstance(targets, str) and targets != cls.every:
            warnings.warn(
                f"adapter_config.json: layers_to_transform={layers!r} is ignored, as in peft, because target_modules is a regular "
                "expression",
                stacklevel=2,
            )
            config = config | {"layers_to_transform": None}
        return super().from_hf(config)
