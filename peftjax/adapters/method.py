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
import optax
from flax import nnx

from peftjax.core.paths import suggest
from peftjax.core.variables import PeftParam


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


def positive(**options: float) -> None:
    """A ValueError for the first option that is not a number above 0 (for a whole number: at least 1)."""
    for option, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"method.{option} must be above 0, it is {value!r}")
