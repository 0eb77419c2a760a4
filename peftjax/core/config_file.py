"""Reading a config file: Python with a function `get_config()`, or the same sections and fields in YAML or JSON.

A file may also define search spaces, the fields that `peftjax sweep` varies and their values: a Python file with a function
`get_sweep()`, a YAML or JSON file with an entry `sweep`.
"""

import json
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from peftjax.core import config_yaml
from peftjax.core.config import flat_fields
from peftjax.core.config_values import ConfigSource
from peftjax.core.errors import UserError
from peftjax.core.paths import suggest
from peftjax.core.python_file import run_python_file

SUFFIXES = (".py", ".yaml", ".yml", ".json")
SWEEP = "sweep"  # the entry of a YAML or JSON file that defines search spaces


def read(given: str | Path) -> tuple[dict[str, Any], ConfigSource]:
    """The values of a config file, {"section.field": value}, and where they come from.

    Args:
        given: A path. For a Python file also "FILE.py:TEXT": the text is the argument of its `get_config`.

    Raises:
        UserError: The file is missing, malformed or fails; the message has the line if it is known.
    """
    path, arguments = _checked(given)
    if path.suffix != ".py":
        sections, lines = _sections(path)
        own = {name: value for name, value in sections.items() if name != SWEEP}
        return flat_fields(own), ConfigSource(str(path), lines)
    config = _call(path, "get_config", *arguments)
    if config is None:
        raise UserError(f"{path}: a config file needs a function get_config() that returns a ConfigDict")
    if not isinstance(config, ConfigDict | Mapping):
        raise UserError(f"{path}: get_config() must return a ConfigDict, but returned {config!r}")
    return flat_fields(config), ConfigSource(str(path))


def read_sweep(given: str | Path) -> list[tuple[Mapping[str, Any], ConfigSource]]:
    """The search spaces that a config file, given as in `read`, defines.

    Returns:
        {"section.field": values} of each space, and where its values come from. Nothing if the file defines no space.

    Raises:
        UserError: The file is missing, malformed or fails, or its search space is not a mapping or a list of mappings.
    """
    path, _ = _checked(given)
    lines: Mapping[str, int] = {}
    if path.suffix == ".py":
        sweep = _call(path, "get_sweep")
        expected = "get_sweep() must return a dict of fields and their values, or a list of such dicts, but returned"
    else:
        sections, lines = _sections(path)
        sweep = sections.get(SWEEP)
        expected = f"{SWEEP} must be a mapping of fields to their values, or a list of such mappings, not"
    several = isinstance(sweep, list | tuple)
    spaces = sweep if several else [] if sweep is None else [sweep]
    if not all(isinstance(space, Mapping) for space in spaces):
        raise UserError(f"{ConfigSource(str(path), lines).of(SWEEP)}: {expected} {sweep!r}")
    found = []
    for index, space in enumerate(spaces):
        place = f"{SWEEP}.{index}." if several else f"{SWEEP}."
        own = {name.removeprefix(place): line for name, line in lines.items() if name.startswith(place)}
        if space:
            found.append((space, ConfigSource(str(path), own)))
    return found


def _checked(given: str | Path) -> tuple[Path, list[str]]:
    """The path of an existing file, and the argument of `get_config` if there is one."""
    file, colon, argument = str(given).rpartition(".py:")
    path, arguments = (Path(file + ".py"), [argument]) if colon else (Path(given), [])
    if not path.is_file():
        near = suggest(path.name, [other.name for other in path.parent.glob("*") if other.suffix in SUFFIXES])
        raise UserError(f"--config={path}: no such file.{near}")
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"--config={path}: a config is a Python, YAML or JSON file, so its name ends in .py, .yaml or .json"
        )
    return path, arguments


def _sections(path: Path) -> tuple[Mapping[str, Any], Mapping[str, int]]:
    """The sections of a YAML or JSON file, and the lines of the fields if they are known."""
    return (_json(path), {}) if path.suffix == ".json" else config_yaml.read_yaml(path)


def _json(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, Mapping):
        raise UserError(f"{path}: a config must be an object with sections, not {json.dumps(config)[:40]}")
    return config


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} is given twice")
    return dict(pairs)


def _call(path: Path, name: str, *arguments: str) -> Any:
    """What a function of a Python file returns; None if the file does not have the function."""
    try:
        function = vars(run_python_file(path, f"peftjax_config_{path.stem}")).get(name)
        return function(*arguments) if callable(function) else None
    except (Exception, SystemExit) as error:  # the file may fail in any way; the user needs the place and the reason
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{_place(path, error)}: {kind}{' '.join(str(error).split())}") from error


def _place(path: Path, error: BaseException) -> str:
    """The file and, if the error has one in it, the line."""
    if isinstance(error, SyntaxError) and error.filename == str(path.absolute()):
        return f"{path}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame.lineno for frame in frames if frame.filename == str(path.absolute())]
    return f"{path}, line {own[-1]}" if own else str(path)
