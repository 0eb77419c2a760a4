"""What a method is: options that say where adapters go, and adapters that sit in slots.

A method is a frozen dataclass of its options with `attach(model, name, rngs)`, which puts an `Adapter` into each slot
it wants, and with the translation of its options to and from a Hugging Face adapter_config.json. What is trained
follows from `trains`: variables of exactly that type.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.core.paths import first_match, matches, suggest, unmatched
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.nn.slot import Adapter, Slot


@dataclasses.dataclass(frozen=True)
class Method:
    """The options of one PEFT method."""

    method: ClassVar[str]  # its name in configs
    peft_type: ClassVar[str | None] = None  # its name in Hugging Face's adapter_config.json
    trains: ClassVar[type[nnx.Variable]] = PeftParam

    def attach(self, model: nnx.Module, name: str, rngs: nnx.Rngs) -> None:
        """Put adapters called `name` into the model's slots.

        Raises:
            ValueError: the options do not fit the model.
        """
        raise NotImplementedError

    def to_hf(self, model: nnx.Module, name: str) -> dict[str, Any]:
        """The method's own fields of adapter_config.json."""
        raise NotImplementedError

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Method":
        """The method of an adapter_config.json; a field it cannot honour is a ValueError that names it."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class HfLeaf:
    """Where one tensor of an adapter file lives: `leaf[layer][window]` of an adapter, transposed or not."""

    leaf: str
    window: tuple[slice, ...] = ()
    transposed: bool = False


class MethodAdapter(Adapter):
    """An adapter that can be counted, written to a Hugging Face file and, for weight methods, merged."""

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        """The tensors that an adapter file holds for one layer (None: the module is not stacked), by their suffix;
        empty for a layer that the method leaves alone."""
        raise NotImplementedError

    def merged(self, **parameters: jax.Array) -> dict[str, jax.Array]:
        """The owner's parameters that give, without the adapter, what they give with it.

        Raises:
            ValueError: the method changes more than weights.
        """
        raise ValueError(f"{type(self).__name__} cannot be merged: it does more than change weights")


class LayerMask(nnx.Module):
    """Puts trained values in the place of a base's own, in the layers of a stack that are `chosen`."""

    def __init__(self, chosen: tuple[bool, ...]) -> None:
        self.chosen = chosen  # one for each layer; one where there is no stack
        self.mask = nnx.data(None if all(chosen) else PeftConstant(jnp.array(chosen), axes=("layers",)))

    def __call__(self, trained: jax.Array, own: jax.Array) -> jax.Array:
        """`trained` in the chosen layers, `own` in the others: of one layer within the scan, or [L, ...] outside."""
        if self.mask is None:
            return trained
        mask = self.mask.get_value()
        return jnp.where(mask.reshape(mask.shape + (1,) * (own.ndim - mask.ndim)), trained, own)


class Override(MethodAdapter):
    """A trained copy of its owner's parameters, in their place: modules_to_save, and biases that are trained."""

    def __init__(
        self,
        values: Mapping[str, jax.Array],
        axes: Mapping[str, tuple],
        hf: Mapping[str, HfLeaf],
        chosen: tuple[bool, ...],
    ) -> None:
        self.leaves = tuple(values)
        self.hf = tuple(hf.items())
        self.layers = LayerMask(chosen)
        for leaf, value in values.items():
            setattr(self, leaf, PeftParam(value, axes=axes[leaf]))

    def __call__(
        self, owner: nnx.Module, compute: Callable[..., jax.Array], *inputs: Any, **parameters: Any
    ) -> jax.Array:
        own = {leaf: parameter(owner, leaf, parameters) for leaf in self.leaves}
        return compute(*inputs, **(parameters | self._replaced(own)))

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        return dict(self.hf) if self.layers.chosen[layer or 0] else {}

    def merged(self, **parameters: jax.Array) -> dict[str, jax.Array]:
        own = {leaf: parameters[leaf] for leaf in self.leaves}
        return {leaf: value.astype(own[leaf].dtype) for leaf, value in self._replaced(own).items()}

    def _replaced(self, own: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {leaf: self.layers(getattr(self, leaf).get_value(), value) for leaf, value in own.items()}


def parameter(owner: Any, leaf: str, given: Mapping[str, jax.Array]) -> jax.Array:
    """The parameter that `owner` computes with: the one it is given for this call, else its own."""
    return given[leaf] if leaf in given else getattr(owner, leaf).get_value()


@dataclasses.dataclass(frozen=True)
class Site:
    """A layer with a slot.

    path: ours; names: what Hugging Face calls it, one for each layer of a stack; stack: (L,), or () when not stacked.
    """

    path: str
    module: Any
    names: tuple[str, ...]
    stack: tuple[int, ...]

    @property
    def layers(self) -> tuple[int | None, ...]:
        """The indices to give to `MethodAdapter.hf_leaves`, in the order of `names`."""
        return tuple(range(self.stack[0])) if self.stack else (None,)

    @property
    def parameters(self) -> dict[str, nnx.Variable]:
        """The layer's own parameters by name."""
        return {key: value for key, value in vars(self.module).items() if isinstance(value, nnx.Param)}

    def lead(self, *axes: str | None) -> tuple[str | None, ...]:
        """Logical axes of a parameter that sits here, with the stack's before them."""
        return ("layers", *axes) if self.stack else axes


def sites(model: nnx.Module) -> list[Site]:
    """All layers of a model that have a slot, in a fixed order."""
    names = getattr(type(model), "hf_modules", {})
    depth: dict[str, int] = {}  # top-level part -> its number of layers
    for key, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if variable.axes and variable.axes[0] == "layers":
            depth[str(key[0])] = variable.shape[0]
    found = []
    for key, module in nnx.iter_modules(model):
        if isinstance(getattr(module, "adapters", None), Slot):
            path = ".".join(map(str, key))
            stack = (depth[str(key[0])],) if str(key[0]) in depth else ()
            name = names.get(path, path)
            expanded = tuple(name.format(layer) for layer in range(stack[0])) if stack else (name,)
            found.append(Site(path, module, expanded, stack))
    return sorted(found, key=lambda site: site.path)


def choose(
    candidates: Iterable[Site],
    targets: str | tuple[str, ...],
    *,
    exclude: str | tuple[str, ...] = (),
    layers: tuple[int, ...] = (),
    what: str = "targets",
) -> list[tuple[Site, np.ndarray]]:
    """The sites that `targets` means, each with a bool for every name of it (every layer of the stack).

    Raises:
        ValueError: an entry that matches nothing, a layer that is not there, or a choice that is empty.
    """
    candidates = list(candidates)
    names = [name for site in candidates for name in site.names]
    for option, pattern in ((what, targets), ("exclude", exclude)):
        if missing := [entry for entry in unmatched(names, pattern) if entry]:
            last = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise ValueError(
                f"method.{option}: {', '.join(map(repr, missing))} matches no layer of this model."
                f"{suggest(missing[0], last)} Its layers: {', '.join(last)}"
            )
    depth = max((site.stack[0] for site in candidates if site.stack), default=0)
    if beyond := [layer for layer in layers if not 0 <= layer < depth]:
        raise ValueError(
            f"method.layers_to_transform: layer {beyond[0]} is not there; the model has layers 0 to {depth - 1}"
        )
    chosen = []
    for site in candidates:
        mask = np.array([
            matches(name, targets)
            and not (exclude and matches(name, exclude))
            and not (layers and index not in layers)
            for index, name in zip(site.layers, site.names, strict=True)
        ])  # fmt: skip
        if mask.any():
            chosen.append((site, mask))
    if not chosen:
        raise ValueError(
            f"method.{what}={targets!r} with exclude={exclude!r} and layers {list(layers)} chooses nothing"
        )
    return chosen


def by_name(site: Site, table: tuple[tuple[str, Any], ...], default: Any) -> np.ndarray:
    """For every name of a site, the value of the first entry of `table` that means it, else `default`."""
    found = [first_match(name, table) for name in site.names]
    return np.array([default if value is None else value for value in found])


def check_table(option: str, table: tuple[tuple[str, Any], ...], chosen: list[tuple[Site, np.ndarray]]) -> None:
    """A ValueError for an entry of rank_pattern or alpha_pattern that means no chosen layer."""
    names = [name for site, mask in chosen for name, used in zip(site.names, mask, strict=True) if used]
    for key, value in table:
        if not any(first_match(name, ((key, value),)) is not None for name in names):
            last = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise ValueError(
                f"method.{option}: {key!r} matches no target.{suggest(key, last)} Targets: {', '.join(last)}"
            )


def copy_whole(model: nnx.Module, chosen: list[tuple[Site, np.ndarray]], name: str) -> None:
    """Put a trained copy of all parameters of each site into its slot (modules_to_save)."""
    for site, mask in chosen:
        stored = getattr(type(site.module), "hf_leaves", {})
        values = {leaf: variable.get_value() for leaf, variable in site.parameters.items()}
        axes = {leaf: variable.axes for leaf, variable in site.parameters.items()}
        if "kernel" not in values and "kernel" in stored:  # a head tied to the embedding
            values["kernel"], axes["kernel"] = tied_kernel(model), site.module.axes
        if not values:
            raise ValueError(f"method.modules_to_save: {site.names[0]} has no parameters of its own")
        hf = {suffix: HfLeaf(leaf, (), turned) for leaf, (suffix, turned) in stored.items() if leaf in values}
        widened = {leaf: jnp.array(value, jnp.float32) for leaf, value in values.items()}
        place(site, name, Override(widened, axes, hf, tuple(bool(x) for x in mask)))


def tied_kernel(model: Any) -> jax.Array:
    """The kernel [D, V] that a tied head borrows."""
    return model.embed.embedding.get_value().T


def place(site: Site, name: str, adapter: Adapter) -> None:
    """Put an adapter into a site's slot, once."""
    if name in site.module.adapters.names():
        raise ValueError(f"method: {site.names[0]} is asked for twice (as a target and in modules_to_save?)")
    site.module.adapters.add(name, adapter)
