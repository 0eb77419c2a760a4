"""Records from files that are read whole: CSV, also with tabs, Parquet and JSON."""

import csv
import io
import json
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from peftjax.core.errors import UserError


class Csv:
    """The rows of a CSV file with a header, kept in memory.

    The values of a column are int or float if all of them are numbers as Python prints them, else text. So "2.50" or "007"
    makes a column text, and `str` of a value is always the text in the file.

    Args:
        data: The file's content, UTF-8.
        label: The file's name in the names of records.
        separator: What separates columns, a comma or a tab.
    """

    def __init__(self, data: bytes, label: str, separator: str = ","):
        csv.field_size_limit(sys.maxsize)  # a text may be longer than the default of 128 KiB
        text = io.StringIO(data.decode("utf-8-sig"), newline="")
        reader = csv.reader(text, delimiter=separator, strict=True)
        self._label, self._lines = label, list[int]()
        rows, line = list[list[str]](), 1
        try:
            self._header: list[str] = next(reader, [])
            if twice := [name for name in self._header if self._header.count(name) > 1]:
                raise UserError(f"{label}:1: the header has {twice[0]!r} twice; rename one of these columns")
            line = reader.line_num + 1
            for row in reader:
                if row and len(row) != len(self._header):
                    raise UserError(
                        f"{label}:{line}: {len(row)} columns, but the header has {len(self._header)}"
                        f"{_advice(self._header, separator)}"
                    )
                if row:
                    rows.append(row)
                    self._lines.append(line)
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{label}:{line}: not valid CSV: {error}") from error
        self._columns = [_numbers(column) for column in zip(*rows, strict=True)]

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in zip(self._header, self._columns, strict=True)}

    def name(self, index: int) -> str:
        return f"{self._label}:{self._lines[index]}"


def _advice(header: Sequence[str], separator: str) -> str:
    """The end of a message: how to repair a file in which a row and the header have different lengths."""
    names = {"\t": "tabs", ";": "semicolons", ",": "commas"}
    found = next((mark for mark in names if len(header) == 1 and mark in header[0]), "")
    if not found:
        return f"; put a value that contains {names[separator]} or quotes in double quotes"
    fix = {"\t": "give it a name that ends in .tsv", ",": "give it a name that ends in .csv"}
    return f"; its columns seem to be separated by {names[found]}: {fix.get(found, f'separate them by {names[separator]}')}"


def _numbers(column: Sequence[str]) -> Sequence[str | int | float]:
    """The values of a column as numbers, if all of them are."""
    numbers = list[int | float]()
    for text in column:
        if not re.fullmatch(r"-?\d+(\.\d+)?(e[-+]?\d+)?", text, re.ASCII) or len(text) > 32:
            return column
        numbers.append(int(text) if text.lstrip("-").isdigit() else float(text))
        if str(numbers[-1]) != text:
            return column
    return numbers


class Parquet:
    """The rows of a Parquet file, kept in memory as Arrow columns. Times in nanoseconds are cut to microseconds."""

    def __init__(self, path: pathlib.Path, label: str):
        import pyarrow.parquet

        self._table, self._label = pyarrow.parquet.read_table(path), label
        self._columns = dict(zip(self._table.column_names, self._table.columns, strict=True))
        for name, column in self._columns.items():  # Python's datetime has microseconds
            if pyarrow.types.is_timestamp(column.type) and column.type.unit == "ns":
                self._columns[name] = column.cast(pyarrow.timestamp("us", column.type.tz), safe=False)

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = dict[str, Any]()
        for name, column in self._columns.items():
            try:
                record[name] = column[index].as_py()
            except (ValueError, OverflowError) as error:  # a time that Python cannot represent
                raise UserError(f"{self.name(index)}: field {name!r} cannot be read: {error}; remove it") from error
        return record

    def name(self, index: int) -> str:
        return f"{self._label}:{index + 1}"


class Listed:
    """Records in memory, numbered from 1.

    Args:
        records: The records.
        label: The file's name in the names of records.
    """

    def __init__(self, records: list[Any], label: str):
        self._records, self._label = records, label

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        if not isinstance(record, dict):
            raise UserError(f"{self.name(index)}: expected a JSON object {{...}}, found {type(record).__name__}")
        return record

    def name(self, index: int) -> str:
        return f"{self._label}:{index + 1}"


def json_problem(error: Exception) -> str:
    """Why JSON that is well formed cannot be read: Python limits the depth of values and the digits of integers."""
    if isinstance(error, RecursionError):
        return "the values are nested too deeply"
    if "integer string conversion" in str(error):
        return f"an integer has more than {sys.get_int_max_str_digits()} digits; write it as text"
    return str(error)


def json_records(data: bytes, label: str) -> list[Any] | None:
    """The records of a JSON file: a list of objects, {"data": [...]}, or one object; None if the file is JSON Lines.

    Raises:
        UserError: The file is neither.
    """
    try:
        value = json.loads(data)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None
        raise UserError(f"{label}:{error.lineno}: not valid JSON: {error.msg}, at column {error.colno}") from error
    if isinstance(value, dict):
        value = value["data"] if isinstance(value.get("data"), list) else [value]
    if not isinstance(value, list):
        raise UserError(f"{label}: expected a list of JSON objects, found {type(value).__name__}")
    return value
