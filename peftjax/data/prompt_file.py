"""Prompts to answer, a file of them that is read when they are needed or texts, and the file of their answers.

FILE.jsonl    one JSON object per line (also .jsonl.gz and .jsonl.zst) with the text of a prompt, {"prompt": "..."}, a
              conversation, {"messages": [...]}, or the fields that a prompt template inserts
FILE.txt      one prompt per line
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from peftjax.core.errors import UserError
from peftjax.core.files import naming
from peftjax.core.home import expand
from peftjax.data.json_lines import JsonLines
from peftjax.data.source_strings import not_found
from peftjax.data.sources import Source, mapped, open_source

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")


class Texts:
    """Texts as records {"prompt": text}; messages call each of them `label`."""

    def __init__(self, texts: Sequence[str], label: str):
        self._texts, self._label = texts, label

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"prompt": self._texts[index]}

    def name(self, index: int) -> str:
        del index
        return self._label


class TextLines(JsonLines):
    """The lines of a text file as records {"prompt": line}. Blank lines are skipped."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return {"prompt": self.line(index).decode("utf-8-sig").rstrip("\r")}
        except UnicodeDecodeError as error:
            raise UserError(f"{self.name(index)}: not valid UTF-8: {error}; convert the file to UTF-8") from error


def open_prompts(path: str) -> Source:
    """Open a file of prompts.

    Raises:
        UserError: There is no such file, its name has another ending, or it has no prompts. A line that cannot be read is
            reported when it is read.
    """
    if not path.lower().endswith(SUFFIXES):
        raise UserError(f"--prompts={path}: the name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if not path.lower().endswith(".txt"):
        return open_source(path)
    file = expand(path)
    if not file.is_file():
        raise not_found(path, file, "file")
    lines = TextLines(mapped(file), file.name)
    if not len(lines):
        raise UserError(f"--prompts={path}: the file has no prompts")
    return lines


def open_answers(path: str) -> TextIO:
    """Open a new file for answers.

    Raises:
        UserError: The file has contents, such as the answers of an earlier command.
    """
    file = Path(path)
    if file.is_file() and file.stat().st_size:
        raise UserError(f"--output={path} exists and would be replaced; delete it, or choose another file")
    return file.open("w", encoding="utf-8", newline="\n")


def write_answers(file: TextIO, records: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> None:
    """Add the records with a field generated_text to a file, as JSON Lines. They are kept if the command is interrupted."""
    with naming(Path(file.name)):
        for record, answer in zip(records, answers, strict=True):
            print(json.dumps({**record, "generated_text": answer}, ensure_ascii=False), file=file)
        file.flush()
