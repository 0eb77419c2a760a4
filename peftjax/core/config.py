"""Declaring a configuration: fields with a default, a meaning and the values they can take, in frozen dataclasses.

A section is a frozen dataclass next to the code that reads it:

    @dataclasses.dataclass(frozen=True)
    class OptimConfig:
        learning_rate: float = field(1e-4, "Peak learning rate", low=0)

The root, which has all sections, is `peftjax.training.config.Config`. It calls `declare`, so that `defaults` can give a
config file a ConfigDict to change. `config_file` and `config_values` turn such a file and its overrides into values.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Self

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of the configuration.

    Attributes:
        default: The default, which also sets the type. The elements of a tuple are strings; a default of None means an
            optional string.
        help: The meaning, a noun phrase.
        choices: All allowed values; empty means any.
        low: The smallest allowed number.
        high: The largest allowed number.
        of_method: Whether it is an option of a PEFT method, which the method's own class checks further. There, a
            string and a tuple may stand for each other (one pattern, several names), a dict for a tuple of pairs, and
            anything for None.
        interval: Whether it is an interval: a number of steps, or text as `Interval.parse` reads it.
        instead_of: The field of the same section that it can replace; empty means none. A field at its default counts
            as not set. On the command line each of the two replaces the other.
    """

    default: Any
    help: str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    of_method: bool = False
    interval: bool = False
    instead_of: str = ""


@dataclasses.dataclass(frozen=True)
class Interval:
    """An interval in units other than steps.

    Attributes:
        amount: How many units.
        of_run: Whether the unit is a run; otherwise it is an epoch.
    """

    amount: float
    of_run: bool

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The interval in "10%" (of the run) or in "0.5 epochs"; None if it is neither, or not positive."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%|epochs?)\s*", text)
        if not match or not float(match[1]):
            return None
        of_run = match[2] == "%"
        return cls(float(match[1]) / 100 if of_run else float(match[1]), of_run)


@dataclasses.dataclass(frozen=True)
class Schema:
    """All fields of the configuration by dotted name, and the defaults of each method's options.

    Attributes:
        fields: {"optim.learning_rate": Field(...), ...}.
        method_defaults: A function from the name of a method to {option: default}; raises UserError for an unknown
            name.
    """

    fields: Mapping[str, Field]
    method_defaults: Callable[[str], Mapping[str, Any]]


def field(
    default: Any,
    meaning: str,
    *,
    choices: tuple[str, ...] = (),
    low: float = -math.inf,
    high: float = math.inf,
    interval: bool = False,
    instead_of: str = "",
) -> Any:
    """A dataclass field with the specification of a configuration field."""
    made = Field(default, meaning, choices, low, high, interval=interval, instead_of=instead_of)
    return dataclasses.field(default=default, metadata={"field": made})


def replaced_by(given: Mapping[str, Any], fields: Mapping[str, Field]) -> list[str]:
    """The fields that some given values replace and that are not given themselves, by dotted name."""
    pairs = [(name, f"{name.rpartition('.')[0]}.{each.instead_of}") for name, each in fields.items() if each.instead_of]
    given_instead = [other for name, other in pairs if given.get(name, fields[name].default) != fields[name].default]
    given_again = [name for name, other in pairs if other in given]
    return [name for name in (*given_instead, *given_again) if name not in given]


def section(cls: type) -> Any:
    """A dataclass field that holds a section, by default with the defaults of all its fields."""
    return dataclasses.field(default_factory=cls, metadata={"section": cls})


def fields_of(cls: type) -> dict[str, Field]:
    """The fields of a dataclass and of its sections, by dotted name."""
    found: dict[str, Field] = {}
    for each in dataclasses.fields(cls):
        if "field" in each.metadata:
            found[each.name] = each.metadata["field"]
        elif "section" in each.metadata:
            found |= {f"{each.name}.{name}": inner for name, inner in fields_of(each.metadata["section"]).items()}
        else:
            found |= {f"{each.name}.{name}": inner for name, inner in each.metadata["fields"].items()}
    return found


_declared: list[Schema] = []


def declare(schema: Schema) -> None:
    """Make `schema` the one that `defaults` uses."""
    _declared[:] = [schema]


def defaults() -> ConfigDict:
    """A ConfigDict with the default of every field, for a config file to change.

    It is not locked: misspelled fields are reported, with suggestions, when the file is loaded.
    """
    (schema,) = _declared
    return nested({name: each.default for name, each in schema.fields.items()})


def flat_fields(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """{"section.field": value} of a config, which has one level of sections."""
    values: dict[str, Any] = {}
    for name, value in (config.to_dict() if isinstance(config, ConfigDict) else config).items():
        if isinstance(value, ConfigDict | Mapping):
            values |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            values[str(name)] = value  # a Python file may give a key of any type; it is then an unknown field
    return values


def nested(values: Mapping[str, Any]) -> ConfigDict:
    """The inverse of `flat_fields`."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        head, _, leaf = name.rpartition(".")
        (tree.setdefault(head, {}) if head else tree)[leaf] = value
    return ConfigDict(tree, type_safe=False)


def help_text() -> str:
    """All fields with their defaults and meanings, one section after the other, for --help."""
    (schema,) = _declared
    lines, head = ["Config fields (--config.SECTION.FIELD=VALUE):"], ""
    for name, each in schema.fields.items():
        if (own := name.rpartition(".")[0]) != head:
            head = own
            lines.append("")
        choices = f" ({' | '.join(map(repr, each.choices))})" if each.choices else ""
        lines.append(f"  {name}={each.default!r}{choices}\n      {each.help}")
    return "\n".join(lines)
