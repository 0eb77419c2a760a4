"""What a method is: a frozen dataclass of options, and the adapters that it puts into slots.

`attach(model, name, rngs)` puts an `Adapter` into each slot that the options choose. A table translates the options to
and from Hugging Face's adapter_config.json. `trains` is the type of the trainable variables.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self

import jax
import numpy as np
import optax
from flax import nnx

from peftjax.adapters.options import check_type, from_file
from peftjax.adapters.sites import Site
from peftjax.core.errors import UserError
from peftjax.core.paths import suggest
from peftjax.core.variables import PeftParam

# (path of a module, its layer or None if it is not stacked) -> its kernel, float32 [in, out]
Kernels = Callable[[str, int | None], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Method:
    """The options of one PEFT method.

    Attributes:
        method: The method's name in configs.
        peft_type: The method's name in Hugging Face's adapter_config.json.
        trains: The type of the trainable variables.
        hf_fields: {option: (field of adapter_config.json, the value that peft assumes where the field is missing)}. An empty
            tuple is written as this value.
        hf_constants: Fields that are written with this value. When reading, only this value, None and False are
            accepted.
        hf_ignored: Fields that are not read: they describe peft's own model or repeat other fields.
        hf_unsupported: Other fields of peft. Values other than None, False and empty ones are rejected.
        hf_training: Fields that describe how the adapter was trained, with the values that peft assumes where they are
            missing. They do not affect what is computed from the file; other values are accepted with a warning.
        traced_options: Options in which the members of a population may differ. They affect only the values of arrays, the
            constants of the optimizer, the length of an axis that can be padded with zeros, or which layers have an adapter.
            Members whose models nevertheless differ in structure are trained by separate programs.
        training_options: Options that affect training, but neither the parameters nor the outputs of a trained adapter.
    """

    method: ClassVar[str]
    peft_type: ClassVar[str | None] = None
    trains: ClassVar[type[nnx.Variable]] = PeftParam
    hf_fields: ClassVar[dict[str, tuple[str, Any]]] = {}
    hf_constants: ClassVar[dict[str, Any]] = {}
    hf_ignored: ClassVar[frozenset[str]] = frozenset()
    hf_unsupported: ClassVar[frozenset[str]] = frozenset()
    hf_training: ClassVar[dict[str, Any]] = {}
    traced_options: ClassVar[frozenset[str]] = frozenset({"alpha", "dropout"})
    training_options: ClassVar[frozenset[str]] = frozenset({"dropout", "rank_dropout", "module_dropout"})

    def __new__(cls, *values: Any, **options: Any) -> Self:
        annotations = {field.name: field.type for field in dataclasses.fields(cls)}
        if values:
            raise UserError(f"{cls.__name__}: give options by name: {', '.join(annotations)}")
        for option, value in options.items():
            if option not in annotations:
                raise UserError(no_such_option(cls, option))
            check_type(option, annotations[option], value)
        return super().__new__(cls)

    def _replace(self, **options: Any) -> None:
        """Store converted options, from `__post_init__` of the frozen dataclass."""
        for option, value in options.items():
            object.__setattr__(self, option, value)

    @property
    def trains_base(self) -> bool:
        """Whether the base itself is trained, so that the result is a whole model and not an adapter."""
        return self.trains is nnx.Param

    @property
    def neutral(self) -> bool:
        """Whether the method leaves the model's outputs unchanged before it is trained."""
        return True

    def tokenized(self, encode: Callable[[str], list[int]]) -> Self:
        """The method with its text options, if it has any, tokenized."""
        del encode
        return self

    def in_steps(self, steps: int) -> Self:
        """The method for a run of `steps` steps: sets its options that depend on the length of the run, if it has any."""
        del steps
        return self

    @property
    def data(self) -> int:
        """How many batches of training data initialize the adapters; 0 for most methods."""
        return 0

    @property
    def unquantized(self) -> bool:
        """Whether the adapters are initialized from the base's kernels before quantization."""
        return False

    def begin(self, model: nnx.Module, name: str, kernels: Kernels, rngs: nnx.Rngs) -> None:
        """Initialize the adapters called `name` from `kernels(path, layer)`, the unquantized kernels [in, out]."""
        raise NotImplementedError

    def fit(self, model: nnx.Module, batches: Iterable[Mapping[str, Any]]) -> tuple[Self, dict[str, dict[str, Any]]]:
        """Initialize from batches of data.

        Returns:
            The method to attach instead, and the initial arrays of its adapters, {path of a site: {leaf: array}}.
        """
        raise NotImplementedError

    def attach(self, model: nnx.Module, name: str, rngs: nnx.Rngs) -> None:
        """Put adapters called `name` into the model's slots.

        Raises:
            UserError: The options do not fit the model.
        """
        raise NotImplementedError

    def check(self, model: nnx.Module) -> None:
        """Reject options that are acceptable in an adapter file but not for a new adapter.

        Raises:
            UserError: The options do not suit a new adapter of this model.
        """
        del model

    def check_file(self, model: nnx.Module) -> None:
        """Reject options from an adapter file that this model, with its weights, cannot have.

        Raises:
            UserError: The adapter needs a changed base that cannot be computed.
        """
        del model

    def optimizer(
        self, inner: optax.GradientTransformation, leaves: Mapping[str, nnx.Variable]
    ) -> optax.GradientTransformation:
        """The optimizer to train with: `inner`, wrapped where the method needs it.

        Args:
            inner: The optimizer of the config.
            leaves: The adapter's variables by path, or the whole model's if it has only this adapter.
        """
        del leaves
        return inner

    def penalty(self, model: nnx.Module) -> jax.Array | None:
        """The term that the method adds to the mean loss per token, float32 []; None if there is none."""
        del model
        return None

    def to_hf(self, model: nnx.Module, name: str) -> dict[str, Any]:
        """The method's own fields of adapter_config.json."""
        del model, name
        own = {hf: _to_json(getattr(self, option), missing) for option, (hf, missing) in self.hf_fields.items()}
        return own | self.hf_constants

    @classmethod
    def hf_known(cls) -> frozenset[str]:
        """All fields that peft has for the method in adapter_config.json, except the fields of all methods."""
        read = {hf for hf, _ in cls.hf_fields.values()}
        return frozenset(read | cls.hf_constants.keys() | cls.hf_ignored | cls.hf_unsupported | cls.hf_training.keys())

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        """The method that an adapter_config.json describes.

        Raises:
            UserError: A field asks for something that is not supported.
        """
        known = {hf for hf, _ in cls.hf_fields.values()} | cls.hf_ignored | cls.hf_training.keys()
        for key, value in config.items():
            if key not in known and value not in (None, False, "", [], {}, cls.hf_constants.get(key)):
                raise UserError(
                    f"adapter_config.json: {key}={value!r} is not supported for {cls.peft_type or cls.method}"
                )
        dropped = [
            f"{key}={config[key]!r}" for key, usual in cls.hf_training.items() if config.get(key) not in (None, usual)
        ]
        if dropped:
            warnings.warn(
                f"adapter_config.json: {', '.join(dropped)} describes how the adapter was trained and is not kept",
                stacklevel=2,
            )
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        values = {option: config.get(hf, default) for option, (hf, default) in cls.hf_fields.items()}
        given = {option: from_file(option, value) for option, value in values.items()}
        return cls(**{option: defaults[option] if v is None else _from_json(v) for option, v in given.items()})

    def reconciled(
        self, model: nnx.Module, tensors: dict[str, np.ndarray], key_of: Callable[[str], str | None]
    ) -> tuple[Self, dict[str, np.ndarray]]:
        """The method and the tensors of its adapter file, changed where they do not fit each other or the model's stacks.

        `key_of` returns the key of the tensor "model.layers.0.mlp.up_proj.lora_A.weight", or None if the file lacks it.
        """
        del model, key_of
        return self, tensors

    def weight_update(self, site: Site, tensors: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """The update of a layer's weight, float32 in torch's orientation, from its tensors in an adapter file by key suffix.

        None if the adapter is more than an update of the weight. The layer is not stacked.
        """
        del site, tensors
        return None


def no_such_option(cls: type[Method], option: str) -> str:
    """The error message for an unknown option, with suggestions or our name for Hugging Face's field."""
    known = [field.name for field in dataclasses.fields(cls)]
    ours = {hf: own for own, (hf, _) in cls.hf_fields.items()}
    meant = f" Hugging Face's {option} is called {ours[option]!r} here." if option in ours else suggest(option, known)
    return f"method.{option}: {cls.method} has no such field.{meant} It has: {', '.join(known)}"


def _to_json(value: Any, empty: Any) -> Any:
    """Tuples of pairs as objects, other tuples as lists, an empty tuple as `empty`."""
    if not isinstance(value, tuple):
        return value
    pairs = all(isinstance(item, tuple) and len(item) == 2 for item in value)
    return (dict(value) if pairs else list(value)) or empty


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(value.items())
    return tuple(value) if isinstance(value, list) else value
