"""What all commands share: arguments, exit codes, and user mistakes printed without a traceback."""

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax

from peftjax.core import debug_log, distributed, signals
from peftjax.core.errors import UserError
from peftjax.core.output import say
from peftjax.core.preemption import Interrupted, Preempted


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """End the process with what `main(arguments)` returns; None counts as 0.

    The message of a UserError or an OSError goes to stderr, and the exit code is 2. With PEFTJAX_TRACEBACK=1 in the
    environment it keeps its traceback, as every other exception does. Ctrl-C exits with 130, a preempted run with 75.
    A warning is one line on stderr.
    """
    signals.restore()
    debug_log.divert()
    keep_programs()
    wait = False  # whether to wait for the other processes
    saved = False  # whether all processes have saved and are ending
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            code = main(sys.argv[1:])
    except KeyboardInterrupt as stop:
        say(str(stop) or "interrupted", error=True)
        code, saved = signals.INTERRUPTED, isinstance(stop, Interrupted)
    except Preempted as stop:
        say(str(stop), error=True)
        code, saved = signals.PREEMPTED, True
    except Exception as error:
        mistake = isinstance(error, UserError | OSError) and os.environ.get("PEFTJAX_TRACEBACK") != "1"
        if not mistake and not distributed.many():
            raise
        if not mistake:
            traceback.print_exc()
        say(f"error: {' '.join(str(error).splitlines())}", error=True)
        wait = not isinstance(error, jax.errors.JaxRuntimeError)
        if not wait:
            say("If another process ended first, its own message says why.", error=True)
        code = 2 if mistake else 1
    if code and not saved and distributed.many():
        distributed.leave(code, wait=wait)
    sys.exit(code)


def keep_programs() -> None:
    """Keep programs that took a second or more to compile in the user's cache directory, for later processes.

    JAX_COMPILATION_CACHE_DIR sets another directory, JAX_ENABLE_COMPILATION_CACHE=false disables the cache. Without a
    writable directory there is no cache. Processes can share one: an entry that is still being written does not
    decompress, and is compiled instead.
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
    del where, also  # a line of our code tells a user nothing
    say(f"warning: {message}", error=True)


def require_value(options: argparse.Namespace, *names: str) -> None:
    """Raises a UserError if one of the named options is given but empty, as after --workdir=$UNSET in a shell."""
    for name in names:
        if getattr(options, name) == "":
            raise UserError(
                f"--{name}= is empty; give a path, and check that the shell variable is set if you used one"
            )


def parse(
    argv: list[str],
    command: str,
    summary: str,
    fields: str,
    *,
    workdir: bool = True,
    options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.Namespace:
    """The arguments of `python -m peftjax.COMMAND`: `config` (path), `overrides` (strings "--config.a.b=c") and `workdir`.

    A missing or unknown argument ends the process with code 2, as argparse does.

    Args:
      argv: The command line without the program.
      command: The name of the command.
      summary: What it does, for --help.
      fields: The description of all config fields, for --help.
      workdir: Whether the command has --workdir.
      options: Adds the command's own options to the parser.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m peftjax.{command}",
        description=summary,
        epilog=fields,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="Python file with get_config(), or FILE.py:ARGUMENT"
    )
    if workdir:
        parser.add_argument(
            "--workdir", required=True, metavar="DIR", help="Directory for everything that the run writes"
        )
    if options is not None:
        options(parser)
    overrides = [argument for argument in argv if argument.startswith("--config.")]
    arguments = parser.parse_args([argument for argument in argv if argument not in overrides])
    arguments.overrides = overrides
    require_value(arguments, "config", *(["workdir"] if workdir else []))
    return arguments
