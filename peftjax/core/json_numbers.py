"""Non-finite numbers in JSON, which has none: they are written as the strings "NaN", "Infinity" and "-Infinity"."""

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_NAMES = {repr(value): name for name, value in _NOT_FINITE.items()}  # by repr, since nan != nan


def to_json(value: Any, indent: int | None = None) -> str:
    """A value as JSON text, with non-finite numbers as strings."""
    return json.dumps(_named(value), indent=indent, allow_nan=False)


def with_numbers(values: Mapping[str, Any], names: Collection[str] | None = None) -> dict[str, Any]:
    """The values of a JSON object, with the strings that stand for non-finite numbers as floats; `names`: only in these fields."""
    return {
        name: _NOT_FINITE.get(value, value) if isinstance(value, str) and (names is None or name in names) else value
        for name, value in values.items()
    }


def _named(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _named(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_named(item) for item in value]
    return _NAMES.get(repr(float(value)), value) if isinstance(value, float) else value
