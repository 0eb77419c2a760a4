"""JSON files of models and adapters, which other programs may have written."""

import json
from pathlib import Path
from typing import Any

from peftjax.core.errors import UserError
from peftjax.io.hf_files import check_regular
from peftjax.io.json_types import check_types


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object and check the types of the fields that `json_types` lists.

    Raises:
        UserError: The file is not valid JSON, holds another kind of value, or a field has another type.
    """
    value = load_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    check_types(value, str(path), path.name)
    return value


def read_json_if_any(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is no such file."""
    return read_json(path) if path.is_file() else {}


def load_json(path: Path) -> Any:
    """Read a JSON file that holds any kind of value.

    Raises:
        UserError: It is no regular file, or not valid JSON.
    """
    check_regular(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors write a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    return parse_json(text, str(path))


def parse_json(text: str, where: str) -> Any:
    """Parse JSON from a file.

    Raises:
        UserError: It is not valid, is nested too deeply, or has a lone surrogate, which is not a character.
    """
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} has a lone surrogate ({error.object[error.start]!r}), which is not a character; replace it"
        ) from None
    except RecursionError:
        raise UserError(f"{where} is not valid JSON: its values are nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}") from error
    return value
