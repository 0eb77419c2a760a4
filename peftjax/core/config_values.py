"""The values of a configuration: completed by defaults, overridden on the command line, and checked.

Values are flat, {"optim.learning_rate": 1e-3}. Anything that the schema does not know or allow is a `UserError` that
names the field, its value and where it was set, with suggestions.
"""

import ast
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from peftjax.core import hf_names
from peftjax.core.config import Field, Interval, Schema, replaced_by
from peftjax.core.errors import UserError
from peftjax.core.paths import REGEX, suggest

Values = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ConfigSource:
    """Where values come from, for messages.

    Attributes:
        name: A file, or another origin.
        lines: The lines of the fields that have one.
    """

    name: str
    lines: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def of(self, field: str) -> str:
        """The origin of a field, with its line if there is one."""
        return f"{self.name}, line {self.lines[field]}" if field in self.lines else self.name


def complete(values: Mapping[str, Any], schema: Schema, source: ConfigSource) -> Values:
    """All known fields: the given values, checked, and the defaults of the rest. `source` is named in messages."""
    known = _known(values, schema, source.of("method.name"))
    for name in values:
        if name not in known:
            raise _unknown(name, known, source.of(name))
    return {
        name: _checked(name, values[name], field, source.of(name)) if name in values else field.default
        for name, field in known.items()
    }


def override(values: Values, overrides: Iterable[str], schema: Schema, origins: Mapping[str, str]) -> Values:
    """Complete values with overrides applied, in their order.

    Args:
        values: What `complete` returned.
        overrides: Strings "--config.optim.learning_rate=1e-3". The text is read as the field's type: true or false, an
            int, a float, a string as it stands, a tuple as comma-separated elements or a Python literal, "none" for
            None. Another method.name first replaces the section `method` by that method's defaults, and a field that is
            set in place of another one resets it.
        schema: The known fields.
        origins: Where overrides were given, for messages; for any other override, the message shows the override
            itself.
    """
    parsed: list[tuple[str, str, str]] = []
    for item in overrides:
        name, _, text = item.removeprefix("--config.").partition("=")
        parsed.append((name, text, origins.get(item, item)))
    for name, text, source in sorted(parsed, key=lambda override: override[0] != "method.name"):
        if name == "method.name" and text != values[name]:
            rest = {key: value for key, value in values.items() if not key.startswith("method.")}
            values = complete(rest | {name: text}, schema, ConfigSource(source))
        known = _known(values, schema, source)
        if name not in known:
            raise _unknown(name, known, source)
        values[name] = _checked(name, _parse(text, known[name]), known[name], source)
    for name in replaced_by({name: values[name] for name, _, _ in parsed}, schema.fields):
        values[name] = schema.fields[name].default
    return values


def as_tuples(value: Any) -> Any:
    """Lists as tuples, nested ones too."""
    return tuple(map(as_tuples, value)) if isinstance(value, list | tuple) else value


def _known(values: Mapping[str, Any], schema: Schema, source: str) -> dict[str, Field]:
    """The fields that a config with this method.name can have."""
    field = schema.fields["method.name"]
    method = _checked("method.name", values.get("method.name", field.default), field, source)
    try:
        options = schema.method_defaults(method)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    own = {f"method.{name}": Field(default, "", of_method=True) for name, default in options.items()}
    return {**schema.fields, **{name: each for name, each in own.items() if name not in schema.fields}}


def _parse(text: str, field: Field) -> Any:
    """The text of an override as the field's type, or as it stands where that fails: `_checked` then refuses it."""
    default = field.default
    if field.interval:
        return int(text) if text.strip().isdecimal() else text
    if isinstance(default, bool):
        return {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(default, int | float):
        try:
            return type(default)(text)
        except ValueError:
            return text
    literal = _literal(text)
    if isinstance(default, tuple):
        quoted = text.lstrip().startswith(("(", "[", "{", "'", '"'))  # 0,1 without quotes is ("0", "1") as strings
        if isinstance(literal, tuple | list | dict) and (quoted or field.of_method):
            return literal
        if field.of_method and REGEX & set(text):
            return text
        elements = [element.strip() for element in text.split(",") if element.strip()]
        return tuple(_literal(element) if field.of_method else element for element in elements)
    if default is None:
        return None if text.lower() in ("none", "") else literal if field.of_method else text
    return literal if field.of_method and isinstance(literal, tuple | list) else text


def _literal(text: str) -> Any:
    """The text as a Python literal if it is one, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _checked(name: str, value: Any, field: Field, source: str) -> Any:
    """The value if it is allowed; an int becomes a float where one is expected, a list a tuple."""
    value = as_tuples(value)
    kind = type(field.default)
    if field.of_method and isinstance(value, Mapping) and kind is tuple:
        value = tuple(value.items())
    if kind is float and type(value) is int:
        value = float(value)
    if not _fits(value, field):
        raise UserError(f"{source}: {name} must be {_expected(field)}, not {value!r} ({type(value).__name__})")
    if field.choices and value not in field.choices:
        allowed = ", ".join(map(repr, field.choices))
        raise UserError(f"{source}: {name}={value!r} must be one of {allowed}.{suggest(value, field.choices)}")
    if isinstance(value, int | float) and not (field.low <= value <= field.high and math.isfinite(value)):
        raise UserError(f"{source}: {name}={value} must be {_bounds(field)}")
    return value


def _fits(value: Any, field: Field) -> bool:
    default = field.default
    if field.interval:
        return type(value) is int or (isinstance(value, str) and Interval.parse(value) is not None)
    if default is None:
        return field.of_method or value is None or isinstance(value, str)
    if field.of_method and isinstance(default, str | tuple):
        return isinstance(value, str | tuple)
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(isinstance(element, str) for element in value)
    return isinstance(value, type(default)) and isinstance(value, bool) == isinstance(default, bool)


def _expected(field: Field) -> str:
    if field.interval:
        return "a number of steps, a percentage of the run such as '10%', or epochs such as '0.5 epochs'"
    if field.of_method and isinstance(field.default, str | tuple):
        return "a string or a tuple"
    names = {bool: "true or false", int: "an int", float: "a float", str: "a string"}
    names |= {tuple: 'a tuple of strings, such as ("a", "b")', type(None): "a string or None"}
    return names.get(type(field.default), type(field.default).__name__)


def _bounds(field: Field) -> str:
    if math.isinf(field.low) and math.isinf(field.high):
        return "finite"
    return f"at least {field.low}" + ("" if math.isinf(field.high) else f" and at most {field.high}")


def _unknown(name: str, known: Mapping[str, Field], source: str) -> UserError:
    section, _, leaf = name.rpartition(".")
    sections = list(dict.fromkeys(key.rpartition(".")[0] for key in known if "." in key))
    if name in sections:
        inner = [key for key in known if key.startswith(name + ".")]
        return UserError(f"{source}: {name} is a section; set one of its fields: {', '.join(inner)}")
    siblings = [key for key in known if key.rpartition(".")[0] == section] + ([] if section else sections)
    elsewhere = [key for key in known if key.rpartition(".")[2] == leaf]
    if elsewhere:
        hint = f" Did you mean {' or '.join(map(repr, elsewhere))}?"
    elif leaf in hf_names.OURS:
        hint = f" Hugging Face's {leaf} is called {hf_names.OURS[leaf]!r} here."
    elif leaf in hf_names.COMMON:
        hint = f" Did you mean {hf_names.COMMON[leaf]!r}?"
    elif section in sections or not section:
        hint = suggest(leaf, [key.rpartition(".")[2] for key in siblings]) or f" Known fields: {', '.join(siblings)}"
    else:
        hint = suggest(name, known) or f" Sections: {', '.join(sections)}"
    return UserError(f"{source}: unknown field {name}.{hint}")
