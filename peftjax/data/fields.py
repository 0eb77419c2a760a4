"""Fields of a record, and templates over them."""

import string
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from peftjax.core.paths import suggest


def fill(template: str, record: Mapping[str, Any], data: ConfigDict, name: str) -> str:
    """The template with the record's fields in it."""
    try:
        keys = [key for _, key, _, _ in string.Formatter().parse(template) if key is not None]
    except ValueError as error:
        raise ValueError(f"the template {template!r}: {error}. A brace itself is written {{{{ or }}}}") from error
    values = {key: _template_value(key, record, data, name) for key in keys}
    try:
        return template.format_map(values)
    except ValueError as error:  # a format that does not suit the value, such as {label:d} for a text
        raise ValueError(f"{name}: the template {template!r}: {error}") from error


def _template_value(key: str, record: Mapping[str, Any], data: ConfigDict, name: str) -> str | int | float:
    """The value of {key}: a field of the record, "prompt" and "completion" standing for those that the config names."""
    setting = f"{key}_field" if key in ("prompt", "completion") else "prompt_template or completion_template"
    field = data[setting] if key in ("prompt", "completion") else key
    value = field_of(record, field, setting, name)
    if not isinstance(value, str | int | float):
        raise ValueError(f"{name}: the field {field!r} must hold text or a number, and holds {type(value).__name__}")
    return value


def field_of(record: Mapping[str, Any], field: str, setting: str, name: str) -> Any:
    """A field of a record; config.data.`setting` names it."""
    if field not in record:
        raise ValueError(
            f"{name}: the record has no field {field!r} (named by config.data.{setting}).{suggest(field, record)} "
            f"It has {', '.join(record) or 'no field at all'}"
        )
    return record[field]
