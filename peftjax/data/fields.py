"""Fields of a record, and templates filled with them."""

import math
import re
import string
from collections.abc import Mapping
from typing import Any

from peftjax.core.errors import UserError
from peftjax.core.paths import suggest
from peftjax.data.config import DataConfig

MAX_WIDTH = 10_000  # characters, in the format of a field

# The fields of each data.format, as datasets usually name them.
FIELDS = {
    "chat": {"messages"},
    "sharegpt": {"conversations"},
    "alpaca": {"instruction", "output"},
    "completion": {"prompt", "completion"},
    "text": {"text"},
}


def fill(template: str, record: Mapping[str, Any], data: DataConfig, name: str) -> str:
    """The template with the fields of a record inserted; messages call the record `name`.

    Raises:
        UserError: The template is malformed, a field is missing, or its value does not suit the template.
    """
    fields_in(template)  # raises an error for a malformed template
    try:
        return _Filled(record, data, template, name).vformat(template, (), {})
    except UserError:
        raise
    except (ValueError, OverflowError) as error:  # a format that does not suit the value, such as {label:d} for a text
        raise UserError(f"{name}: template {template!r}: {error}") from error


def fields_in(template: str) -> dict[str, str]:
    """What a template inserts, and the field of the record that it is in: {"answers[text][0]": "answers"}.

    Raises:
        UserError: The template is malformed.
    """
    try:
        paths = [path for _, path, _, _ in string.Formatter().parse(template) if path is not None]
    except ValueError as error:
        raise UserError(f"template {template!r}: {error}. Write {{{{ or }}}} for a literal brace") from error
    return {path: _steps(path)[0] for path in paths}


class _Filled(string.Formatter):
    """Looks up {field}, {field[entry]} and {field.entry} in a record.

    {prompt} and {completion} stand for the fields that the config names.
    """

    def __init__(self, record: Mapping[str, Any], data: DataConfig, template: str, name: str):
        self._record, self._data, self._template, self._name = record, data, template, name

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[str | int | float, str]:
        del args, kwargs
        renamed = {"prompt": self._data.prompt_field, "completion": self._data.completion_field}
        first, steps = _steps(field_name)
        if field_name in self._record:  # a name with a dot
            first, steps = field_name, []
        if not first or (first.isdigit() and first not in self._record):
            raise UserError(f"template {self._template!r}: {{{field_name}}} does not name a field of a record")
        setting = f"{first}_field" if first in renamed else _setting(self._template, self._data)
        value = field_of(self._record, renamed.get(first, first), setting, self._name)
        for step in steps:
            value = self._entry(value, step, field_name)
        return _text_or_number(value, renamed.get(field_name, field_name), self._name), first

    def format_field(self, value: Any, format_spec: str) -> str:
        """Format a value. Widths and precisions are limited: {prompt:>999999999} would exhaust the memory."""
        if wide := [number for number in re.findall(r"\d+", format_spec) if len(number) > 6 or int(number) > MAX_WIDTH]:
            raise UserError(
                f"template {self._template!r}: the format {format_spec!r} asks for {wide[0]} characters; use at most {MAX_WIDTH:,}"
            )
        return super().format_field(value, format_spec)

    def _entry(self, value: Any, step: str, path: str) -> Any:
        if isinstance(value, Mapping) and step in value:
            return value[step]
        if isinstance(value, list | tuple) and re.fullmatch(r"-?\d+", step) and -len(value) <= int(step) < len(value):
            return value[int(step)]
        there = ", ".join(value) if isinstance(value, Mapping) else f"a {type(value).__name__}"
        size = f" of {len(value)}" if isinstance(value, list | tuple) else ""
        raise UserError(
            f"{self._name}: template {self._template!r}: {{{path}}} has no entry {step!r}; found {there}{size}"
        )


def _setting(template: str, data: DataConfig) -> str:
    """The fields of the config that may hold a template, as in "prompt_template or completion_template"."""
    names = ("prompt_template", "completion_template", "pair_template")
    return " or ".join(name for name in names if getattr(data, name) == template) or " or ".join(names[:2])


def _steps(path: str) -> tuple[str, list[str]]:
    """The parts of a field's path: "answers[text][0]" gives "answers" and ["text", "0"]."""
    first = re.match(r"[^.\[]*", path)
    assert first
    return first[0], [
        dotted or bracketed for dotted, bracketed in re.findall(r"\.([^.\[]+)|\[([^\]]+)\]", path[first.end() :])
    ]


def text_field(record: Mapping[str, Any], field: str, setting: str, name: str) -> str:
    """The text or number in a field, which data.`setting` names, as text.

    Raises:
        UserError: The record has no such field, or it holds something else.
    """
    return str(_text_or_number(field_of(record, field, setting, name), field, name))


def _text_or_number(value: Any, field: str, name: str) -> str | int | float:
    """The value, checked. pandas writes a missing text as NaN."""
    if not isinstance(value, str | int | float):
        chat = isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)
        hint = '; for lists of messages set data.format="chat"' if chat else ""
        raise UserError(f"{name}: field {field!r} must hold text or a number, not {type(value).__name__}{hint}")
    if isinstance(value, float) and math.isnan(value):
        raise UserError(
            f"{name}: field {field!r} must hold text or a number, not NaN, which stands for a missing value"
        )
    return value


def field_of(record: Mapping[str, Any], field: str, setting: str, name: str) -> Any:
    """The value of a field, which data.`setting` names.

    Raises:
        UserError: The record has no such field.
    """
    if field not in record:
        raise UserError(
            f"{name}: the record has no field {field!r} (set by data.{setting}).{suggest(field, record)} "
            f"Its fields: {', '.join(record) or 'none'}{_format_hint(record, setting)}"
        )
    return record[field]


def _format_hint(record: Mapping[str, Any], setting: str) -> str:
    """The end of a message: the format that the fields of a record suggest; empty if there is none, or for another task."""
    if setting in ("label_field", "words_field", "image_field"):
        return ""
    found = next((name for name, fields in FIELDS.items() if fields <= record.keys()), None)
    return f'. For language modeling, data.format="{found}" reads such records' if found else ""
