"""What a method is: options that say where adapters go, and adapters that sit in slots.

A method is a frozen dataclass of its options with `attach(model, name, rngs)`, which puts an `Adapter` into each slot
it wants, and a table that translates its options to and from a Hugging Face adapter_config.json. What is trained
follows from `trains`: variables of exactly that type.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from peftjax.core import variables
from peftjax.core.paths import suggest
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.nn.dropout import Dropout
from peftjax.nn.slot import Adapter
from peftjax.quant.matmul import matmul


@dataclasses.dataclass(frozen=True)
class Method:
    """The options of one PEFT method.

    The translation to Hugging Face: `hf_fields`, {option: (its field in adapter_config.json, the value that peft takes
    where the field is missing)}; `hf_constants`, fields that are written with this value and read with no other that
    says something (but None or False); `hf_ignored`, fields that say where peft's own model keeps things, or repeat what
    others say; `hf_training`, {field that says how the adapter was trained: the value that peft takes where it is
    missing}: it changes nothing that is computed from the file, and another value is accepted with a warning.
    """

    method: ClassVar[str]  # its name in configs
    peft_type: ClassVar[str | None] = None  # its name in Hugging Face's adapter_config.json
    trains: ClassVar[type[nnx.Variable]] = PeftParam
    hf_fields: ClassVar[dict[str, tuple[str, Any]]] = {}
    hf_constants: ClassVar[dict[str, Any]] = {}
    hf_ignored: ClassVar[frozenset[str]] = frozenset()
    hf_training: ClassVar[dict[str, Any]] = {}

    def __new__(cls, **options: Any) -> Self:
        known = [field.name for field in dataclasses.fields(cls)]
        for option in options:
            if option not in known:
                raise ValueError(no_such_option(cls, option))
        return super().__new__(cls)

    @property
    def neutral(self) -> bool:
        """Whether the method, attached and not yet trained, changes nothing that the model computes."""
        return True

    def tokenized(self, encode: Callable[[str], list[int]]) -> Self:
        """The method with its texts, if it has any, as tokens."""
        del encode
        return self

    @property
    def data(self) -> int:
        """How many batches of data a training shows it before it is attached."""
        return 0

    @property
    def unquantized(self) -> bool:
        """Whether it begins with the kernels as they were before they were quantized."""
        return False

    def begin(self, model: Any, name: str, kernels: Callable[[str, int | None], Any], rngs: nnx.Rngs) -> None:
        """Start the adapters called `name` from `kernels`: of a module's path and a layer, [in, out]."""
        raise NotImplementedError

    def fit(self, model: Any, batches: Iterable[Mapping[str, Any]]) -> tuple[Self, dict[str, dict[str, Any]]]:
        """For a method that begins with data: the method that is attached in its place, and what its adapters then
        start from, {path of a site: {leaf: array}}."""
        raise NotImplementedError

    def attach(self, model: nnx.Module, name: str, rngs: nnx.Rngs) -> None:
        """Put adapters called `name` into the model's slots.

        Raises:
            ValueError: the options do not fit the model.
        """
        raise NotImplementedError

    def check(self, model: nnx.Module) -> None:
        """Refuse, with a ValueError, what an adapter file may ask for and a new adapter should not."""
        del model

    def optimizer(
        self, inner: optax.GradientTransformation, leaves: Mapping[str, nnx.Variable]
    ) -> optax.GradientTransformation:
        """`inner`, or what the method makes of it; leaves: the model's variables by path."""
        del leaves
        return inner

    def penalty(self, model: Any) -> jax.Array | None:
        """What the method adds to the mean loss of a token, float32 []; None: nothing."""
        del model
        return None

    def to_hf(self, model: nnx.Module, name: str) -> dict[str, Any]:
        """The method's own fields of adapter_config.json."""
        del model, name
        return {hf: _to_json(getattr(self, option)) for option, (hf, _) in self.hf_fields.items()} | self.hf_constants

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        """The method of an adapter_config.json; a field it cannot honour is a ValueError that names it."""
        known = {hf for hf, _ in cls.hf_fields.values()} | cls.hf_ignored | cls.hf_training.keys()
        for key, value in config.items():
            if key not in known and value not in (None, False, "", [], {}, cls.hf_constants.get(key)):
                raise ValueError(
                    f"adapter_config.json: {key}={value!r} is not supported for {cls.peft_type or cls.method}"
                )
        told = {key: config[key] for key, usual in cls.hf_training.items() if config.get(key) not in (None, usual)}
        if told:
            said = ", ".join(f"{key}={value!r}" for key, value in told.items())
            warnings.warn(f"adapter_config.json: {said} says how it was trained and is not kept", stacklevel=2)
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        values = {option: config.get(hf, default) for option, (hf, default) in cls.hf_fields.items()}
        return cls(**{option: defaults[option] if v is None else _from_json(v) for option, v in values.items()})


def no_such_option(cls: type[Method], option: str) -> str:
    """What to say of an option that a method does not have: the near ones, or our word for Hugging Face's."""
    known = [field.name for field in dataclasses.fields(cls)]
    ours = {hf: own for own, (hf, _) in cls.hf_fields.items()}
    meant = f" Hugging Face's {option} is called {ours[option]!r} here." if option in ours else suggest(option, known)
    return f"method.{option}: {cls.method} has no such field.{meant} It has: {', '.join(known)}"


def _to_json(value: Any) -> Any:
    """Tuples of pairs as objects, other tuples as lists, an empty one as null."""
    if not isinstance(value, tuple):
        return value
    pairs = value and all(isinstance(item, tuple) and len(item) == 2 for item in value)
    return dict(value) if pairs else list(value) or None


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(value.items())
    return tuple(value) if isinstance(value, list) else value


# --- Adapters ---


@dataclasses.dataclass(frozen=True)
class HfLeaf:
    """Where one tensor of an adapter file lives: `leaf[layer][window]` of an adapter, then transposed by `axes` and
    reshaped to `shape`."""

    leaf: str
    window: tuple[slice, ...] = ()
    axes: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None

    def write(self, array: Any) -> Any:
        """What the file holds, from the leaf's array of one layer."""
        part = array[self.window]
        part = part if self.axes is None else part.transpose(self.axes)
        return part if self.shape is None else part.reshape(self.shape)

    def read(self, tensor: Any, into: Any) -> None:
        """Write a tensor of the file into a layer's array; a ValueError where it has another shape."""
        window = into[self.window]
        expected = self.write(into).shape
        if tensor.shape != expected:
            raise ValueError(f"has shape {tensor.shape}, this model needs {expected}")
        axes = tuple(range(window.ndim)) if self.axes is None else self.axes
        turned = tensor.reshape([window.shape[axis] for axis in axes])
        window[...] = turned.transpose([axes.index(axis) for axis in range(window.ndim)]).astype(window.dtype)


def transposed(leaf: str) -> HfLeaf:
    """A matrix that the file holds the other way round."""
    return HfLeaf(leaf, axes=(1, 0))


class MethodAdapter(Adapter):
    """An adapter that can be counted, written to a Hugging Face file and, for weight methods, merged."""

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        """The tensors that an adapter file holds for one layer (None: the module is not stacked), by their suffix;
        empty for a layer that the method leaves alone."""
        raise NotImplementedError

    def hf_shared(self) -> dict[str, HfLeaf]:
        """The tensors that an adapter file holds once for all layers, by their whole key, of whole leaves."""
        return {}

    def exported(self) -> "MethodAdapter":
        """The adapter whose leaves the file holds: itself, or the result of what only training needs."""
        return self

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
    """A trained copy of its owner's parameters, in their place: modules_to_save, and biases or norms that are trained.

    hf: {suffix in the adapter file: leaf}.
    """

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


class WeightAdapter(MethodAdapter):
    """An adapter defined by what it makes of its owner's kernel: y = x changed(W) + b.

    A subclass says `changed`, and computes in a cheaper way where there is one. `layers` are those it is in; in the
    others of the stack `changed` must give back W itself. names: the tensors of its file for one layer.
    """

    names: ClassVar[Mapping[str, HfLeaf]]
    kernel: ClassVar[str] = "kernel"  # the owner's parameter that it changes
    layers: LayerMask

    def changed(self, kernel: jax.Array) -> jax.Array:
        """The kernel of one layer, float32 [in, out], as the adapter changes it."""
        raise NotImplementedError

    def __call__(
        self, owner: nnx.Module, compute: Callable[..., jax.Array], *inputs: Any, **parameters: Any
    ) -> jax.Array:
        kernel = parameter(owner, self.kernel, parameters)
        return compute(*inputs, **(parameters | {self.kernel: self._rounded(kernel)}))

    def _rounded(self, kernel: jax.Array) -> jax.Array:
        return self.changed(kernel.astype(jnp.float32)).astype(kernel.dtype)

    def merged(self, **parameters: jax.Array) -> dict[str, jax.Array]:
        return {self.kernel: over_layers(self, lambda one, kernel: one._rounded(kernel), parameters[self.kernel])}

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        return dict(self.names) if self.layers.chosen[layer or 0] else {}


class DeltaAdapter(WeightAdapter):
    """A weight adapter that adds: y = x W + dropout(x) delta + b."""

    dropout: Dropout

    def delta(self) -> jax.Array:
        """What is added to the kernel of one layer, float32 [in, out]; zero in a layer that it is not in."""
        raise NotImplementedError

    def changed(self, kernel: jax.Array) -> jax.Array:
        return kernel + self.delta()

    def __call__(
        self, owner: nnx.Module, compute: Callable[..., jax.Array], *inputs: Any, **parameters: Any
    ) -> jax.Array:
        (x,) = inputs
        return compute(x, **parameters) + matmul(self.dropout(x), self.delta().astype(x.dtype))


def parameter(owner: Any, leaf: str, given: Mapping[str, jax.Array]) -> jax.Array:
    """The parameter that `owner` computes with: the one it is given for this call, else its own."""
    return given[leaf] if leaf in given else getattr(owner, leaf).get_value()


def over_layers(adapter: nnx.Module, compute: Callable[..., Any], *arrays: Any) -> Any:
    """`compute(adapter, *arrays)`, for a stacked adapter of each layer of it and of the arrays, [L, ...], in turn: so that
    what it needs in between is there for one layer only."""
    graph, leaves = variables.flat(adapter)
    values = {path: leaf.get_value() for path, leaf in leaves.items()}
    stacked = {path: value for path, value in values.items() if variables.is_stacked(leaves[path])}
    shared = {path: value for path, value in values.items() if path not in stacked}
    if not stacked:
        return compute(adapter, *arrays)
    return jax.lax.map(lambda one: compute(variables.merge(graph, shared, one[0]), *one[1]), (stacked, arrays))


def positive(**options: float) -> None:
    """A ValueError for the first option that is not a number above 0 (for a whole number: at least 1)."""
    for option, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"method.{option} must be above 0, it is {value!r}")
