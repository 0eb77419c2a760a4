"""What every command shares: its arguments, and user mistakes printed without a traceback."""

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax

from peftjax.core import config, distributed


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Ends the process with what `main(arguments)` returns, None counting as 0.

    A ValueError or an OSError is the user's to mend: its message goes to stderr and the exit code is 2. With
    PEFTJAX_TRACEBACK=1 in the environment it keeps its traceback, as every other exception does. Ctrl-C exits with 130, a
    preempted run with 75. A warning is a line on stderr.
    """
    keep_programs()
    wait = False  # for the other processes
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            code = main(sys.argv[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except distributed.Preempted as stop:
        print(stop, file=sys.stderr)
        code = distributed.PREEMPTED
    except Exception as error:
        mistake = isinstance(error, ValueError | OSError) and os.environ.get("PEFTJAX_TRACEBACK") != "1"
        if not mistake and not distributed.many():
            raise
        if not mistake:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        wait = not isinstance(error, jax.errors.JaxRuntimeError)
        if not wait:
            print(
                "Where another process ended first, this is how the others learn of it: see what it said.",
                file=sys.stderr,
            )
        code = 2 if mistake else 1
    if code not in (None, 0, distributed.PREEMPTED) and distributed.many():
        distributed.leave(code, wait=wait)
    sys.exit(code)


def keep_programs() -> None:
    """Programs that took a second or more to compile outlive the process, in the user's cache directory.

    JAX_COMPILATION_CACHE_DIR names another directory, JAX_ENABLE_COMPILATION_CACHE=false switches it off. A directory that
    cannot be made is done without. Processes can share one: an entry that another is still writing does not decompress, and
    is compiled instead.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftjax" / "programs"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(directory, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(directory))


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
