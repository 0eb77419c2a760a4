"""data.map: a user's function that turns each record into another one before its fields are used."""

import copy
import functools
import importlib
import pathlib
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

from peftjax.core.errors import UserError
from peftjax.core.home import expand
from peftjax.core.paths import suggest
from peftjax.core.python_file import run_python_file
from peftjax.data.sources import Source

Record = dict[str, Any]


class Mapped:
    """A source whose records are passed through a function on access.

    Args:
        source: The source.
        spec: The function, as `load_function` takes it.
    """

    def __init__(self, source: Source, spec: str):
        self._source, self._spec, self._function = source, spec, load_function(spec)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        record = copy.deepcopy(self._source[index])  # the function may change it, and the source may keep it
        try:
            made = self._function(record)
        except Exception as error:  # the user needs the record, the place and the reason
            raise UserError(f"{self.name(index)}: data.map={self._spec} failed{_reason(error)}") from error
        if not isinstance(made, dict):
            raise UserError(
                f"{self.name(index)}: data.map={self._spec} returned {_short(repr(made))} ({type(made).__name__}); it must return a "
                'dict, such as {"prompt": ..., "completion": ...} or {"messages": [...]}'
            )
        return made

    def name(self, index: int) -> str:
        return self._source.name(index)


def load_function(spec: str) -> Callable[[Record], Any]:
    """The function that "MODULE:FUNCTION" or "FILE.py:FUNCTION" names. Modules are also found in the current directory.

    A file that has changed is run again. A module is imported once per process, as usual in Python.

    Raises:
        UserError: There is no such module, file or function (the message has suggestions), or importing it fails.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise UserError(
            f"data.map={spec!r} must be MODULE:FUNCTION or FILE.py:FUNCTION, for example my_data.py:to_chat"
        )
    try:
        module = _from_file(place, spec) if place.endswith(".py") else _imported(place, spec)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the file may fail in any way
        raise UserError(f"data.map={spec}: importing {place} failed{_reason(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"data.map={spec}: {place} has no function {name!r}.{suggest(name, functions)}")
    return function


def _from_file(place: str, spec: str) -> ModuleType:
    path = expand(place)
    if not path.is_file():
        near = suggest(path.name, [other.name for other in path.parent.glob("*.py")])
        raise UserError(f"data.map={spec}: no such file: {place}.{near}")
    return _run_file(path.absolute(), path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _run_file(path: pathlib.Path, changed: int) -> ModuleType:
    del changed  # a part of the key
    return run_python_file(path, f"peftjax_map_{path.stem}")


def _imported(place: str, spec: str) -> ModuleType:
    here = str(pathlib.Path.cwd())
    if here not in sys.path:  # a console command does not search the current directory
        sys.path.append(here)
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise  # it exists, and imports another module that does not
        files = pathlib.Path.cwd().glob("*.py")
        raise UserError(
            f"data.map={spec}: no module named {error.name!r}.{suggest(place, [file.stem for file in files])} Use "
            "FILE.py:FUNCTION for a file in another directory"
        ) from None


def _reason(error: BaseException) -> str:
    """Where an error was raised, and what it says: " at my_data.py, line 3: KeyError: 'text'"."""
    if isinstance(error, SyntaxError):
        return f" at {pathlib.Path(error.filename or '').name}, line {error.lineno}: SyntaxError: {error.msg}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f" at {pathlib.Path(frame.filename).name}, line {frame.lineno}: {type(error).__name__}: {_short(text)}"


def _short(text: str) -> str:
    """At most 100 characters of a text."""
    return text if len(text) <= 100 else f"{text[:97]}..."
