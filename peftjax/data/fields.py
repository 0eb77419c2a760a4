"""Fields of a record, and templates filled with them."""

import string
from collections.abc import Mapping
from typing import Any

from peftjax.core.errors import UserError
from peftjax.core.paths import suggest
from peftjax.data.config import DataConfig


def fill(template: str, record: Mapping[str, Any], data: DataConfig, name: str) -> str:
    """The template with the fields of a record inserted; messages call the record `name`.

    Raises:
      UserError: The template is malformed, a field is missing, or its value does not suit the template.
    """
    try:
        keys = [key for _, key, _, _ in string.Formatter().parse(template) if key is not None]
    except ValueError as error:
        raise UserError(f"template {template!r}: {error}. Write {{{{ or }}}} for a literal brace") from error
    values = {key: _value(key, record, data, name) for key in keys}
    try:
        return template.format_map(values)
    except ValueError as error:  # a format that does not suit the value, such as {label:d} for a text
        raise UserError(f"{name}: template {template!r}: {error}") from error


def _value(key: str, record: Mapping[str, Any], data: DataConfig, name: str) -> str | int | float:
    """The value for {key}: a field of the record; {prompt} and {completion} stand for the fields that the config names."""
    renamed = {"prompt": data.prompt_field, "completion": data.completion_field}
    setting = f"{key}_field" if key in renamed else "prompt_template or completion_template"
    field = renamed.get(key, key)
    value = field_of(record, field, setting, name)
    if not isinstance(value, str | int | float):
        raise UserError(f"{name}: field {field!r} must hold text or a number, not {type(value).__name__}")
    return value


def field_of(record: Mapping[str, Any], field: str, setting: str, name: str) -> Any:
    """The value of a field, which config.data.`setting` names.

    Raises:
      UserError: The record has no such field.
    """
    if field not in record:
        raise UserError(
            f"{name}: the record has no field {field!r} (set by config.data.{setting}).{suggest(field, record)} "
            f"Its fields: {', '.join(record) or 'none'}"
        )
    return record[field]
