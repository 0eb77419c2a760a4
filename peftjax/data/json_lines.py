"""JSON Lines as a source of records."""

import array
import codecs
import json
import mmap
import re
import warnings
from typing import Any

from peftjax.core.errors import UserError
from peftjax.data.tables import json_problem


class JsonLines:
    """JSON objects, one per line. Blank lines are skipped.

    Args:
        data: The lines: bytes, or a memory-mapped file.
        label: The file's name in the names of records.
    """

    def __init__(self, data: bytes | mmap.mmap, label: str):
        self._data, self._label, self._warned = data, label, False
        self._starts, self._lines = array.array("q"), array.array("q")
        if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UserError(
                f"{label}: the file is UTF-16; convert it to UTF-8, for example with `iconv -f utf-16 -t utf-8`"
            )
        start, line = 0, 1
        while start < len(data):
            end = data.find(b"\n", start) + 1 or len(data)
            if not data[start:end].isspace():
                self._starts.append(start)
                self._lines.append(line)
            start, line = end, line + 1

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        text = self.line(index)
        try:
            record = json.loads(text)
            repaired = without_lone_surrogates(record) if _SURROGATE.search(text) else record
        except json.JSONDecodeError as error:
            raise UserError(f"{self.name(index)}: not valid JSON: {error.msg}, at column {error.colno}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{self.name(index)}: not valid UTF-8: {error}; convert the file to UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.name(index)}: the JSON cannot be read: {json_problem(error)}") from error
        if not isinstance(record, dict):
            raise UserError(f"{self.name(index)}: expected a JSON object {{...}}, found {type(record).__name__}")
        if repaired is not record and repaired != record and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.name(index)}: a lone surrogate (\\ud800 to \\udfff) is not a character; it is replaced by U+FFFD, here and "
                "in later records",
                stacklevel=2,
            )
        return repaired

    def line(self, index: int) -> bytes:
        """The line of a record, without its end."""
        start = self._starts[index]
        end = self._data.find(b"\n", start)
        return self._data[start:] if end < 0 else self._data[start:end]

    def name(self, index: int) -> str:
        return f"{self._label}:{self._lines[index]}"


# In JSON, escaped (two of them in a row may be one character) or as the bytes that json.loads decodes to one.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")


def without_lone_surrogates(value: Any) -> Any:
    """The value with U+FFFD for every lone surrogate, which is not a character, in its texts and keys."""
    if isinstance(value, str):
        return re.sub("[\ud800-\udfff]", "\ufffd", value)
    if isinstance(value, dict):
        return {without_lone_surrogates(key): without_lone_surrogates(entry) for key, entry in value.items()}
    return [without_lone_surrogates(entry) for entry in value] if isinstance(value, list) else value
