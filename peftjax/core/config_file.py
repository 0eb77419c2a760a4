"""Running a config file: Python with a function `get_config()` that returns a ConfigDict."""

import importlib.util
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from peftjax.core.errors import UserError
from peftjax.core.paths import suggest


def run(given: str | Path) -> ConfigDict | Mapping[str, Any]:
    """What the `get_config()` of a file returns; the text after the colon of "FILE.py:TEXT" is its argument.

    Raises:
      UserError: The file is missing or fails; the message has the line that failed.
    """
    file, colon, argument = str(given).rpartition(".py:")
    path = Path(file + ".py" if colon else given)
    if not path.is_file():
        near = suggest(path.name, [other.name for other in path.parent.glob("*.py")])
        raise UserError(f"--config={path}: no such file.{near}")
    spec = importlib.util.spec_from_file_location(f"peftjax_config_{path.stem}", path.absolute())
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path}: a config is a Python file, so its name ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = vars(module).get("get_config")
        if not callable(get_config):
            raise UserError("a config file needs a function get_config() that returns a ConfigDict")
        config = get_config(argument) if colon else get_config()
        if not isinstance(config, ConfigDict | Mapping):
            raise UserError(f"get_config() must return a ConfigDict, but returned {config!r}")
    except (Exception, SystemExit) as error:  # the file may fail in any way; the user needs the place and the reason
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{_place(path, error)}: {kind}{' '.join(str(error).split())}") from error
    return config


def _place(path: Path, error: BaseException) -> str:
    """The file and, if the error has one in it, the line."""
    if isinstance(error, SyntaxError):
        return f"{path}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame.lineno for frame in frames if frame.filename == str(path.absolute())]
    return f"{path}, line {own[-1]}" if own else str(path)
