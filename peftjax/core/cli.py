"""What every command shares: its arguments, and user mistakes printed without a traceback."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from peftjax.core import config


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Ends the process with what `main(arguments)` returns, None counting as 0.

    A ValueError or an OSError is the user's to mend: its message goes to stderr and the exit code is 2. With
    PEFTJAX_TRACEBACK=1 in the environment it keeps its traceback, as every other exception does. Ctrl-C exits with 130.
    A warning is a line on stderr.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            code = main(sys.argv[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except (ValueError, OSError) as error:
        if os.environ.get("PEFTJAX_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)


def _warn(message: Warning | str, *where: Any, **also: Any) -> None:
    del where, also  # a place in our code says nothing to a user
    print(f"warning: {message}", file=sys.stderr)


def parse(
    argv: list[str],
    command: str,
    summary: str,
    *,
    workdir: bool = True,
    options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.Namespace:
    """The arguments of `python -m peftjax.COMMAND`: `config` (path), `overrides` (for `config.load`) and `workdir`.

    `options` may add a command's own ones. --help also lists all fields of the config. An argument that is missing or
    unknown ends the process with code 2, as argparse does.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m peftjax.{command}",
        description=summary,
        epilog=config.describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="Python file with get_config(), or FILE.py:ARGUMENT"
    )
    if workdir:
        parser.add_argument("--workdir", required=True, metavar="DIR", help="where the run keeps all it writes")
    if options is not None:
        options(parser)
    overrides = [argument for argument in argv if argument.startswith("--config.")]
    arguments = parser.parse_args([argument for argument in argv if argument not in overrides])
    arguments.overrides = overrides
    return arguments
