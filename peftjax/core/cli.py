"""What all commands share: arguments, exit codes, and user mistakes printed without a traceback."""

import argparse
import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax

from peftjax.core import debug_log, distributed, signals
from peftjax.core.config import help_text
from peftjax.core.errors import UserError
from peftjax.core.home import expand
from peftjax.core.output import say
from peftjax.core.paths import suggest
from peftjax.core.preemption import Interrupted, Preempted

running = False  # whether this process runs a command, rather than a program that uses the library


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """End the process with what `main(arguments)` returns; None counts as 0.

    The message of a UserError or an OSError goes to stderr, and the exit code is 2. With PEFTJAX_TRACEBACK=1 in the
    environment it keeps its traceback, as every other exception does. Ctrl-C exits with 130, a preempted run with 75.
    A warning is one line on stderr.
    """
    global running
    running = True
    signals.restore()
    debug_log.divert()
    if isinstance(sys.stdout, io.TextIOWrapper):  # characters that its encoding lacks are escaped, as on stderr
        sys.stdout.reconfigure(errors="backslashreplace")
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
    except Exception as raised:  # of any kind: other processes of a run must learn that this one ends
        error = _without_device(raised) or raised
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
    try:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftjax" / "programs"
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home directory, as in some containers
        return
    if os.access(directory, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(directory))


def _without_device(error: Exception) -> UserError | None:
    """The error to report if JAX_PLATFORMS names a device that JAX does not find; None if `error` has another cause."""
    frames = traceback.extract_tb(error.__traceback__)
    named = os.environ.get("JAX_PLATFORMS")
    if not named or not frames or (Path(frames[-1].filename).name, frames[-1].name) != ("xla_bridge.py", "backends"):
        return None
    reason = f" ({' '.join(str(error).split())})" if str(error) else ""
    return UserError(
        f"JAX_PLATFORMS={named}: JAX finds no such device{reason}; unset JAX_PLATFORMS, or install peftjax[cuda] for GPUs or "
        "peftjax[tpu] for TPUs"
    )


def _warn(message: Warning | str, *where: Any, **also: Any) -> None:
    del where, also  # a line of our code tells a user nothing
    say(f"warning: {' '.join(str(message).splitlines())}", error=True)


def require_value(options: argparse.Namespace, *names: str) -> None:
    """Raises a UserError if one of the named options is given but empty, as after --workdir=$UNSET in a shell."""
    for name in names:
        if getattr(options, name) == "":
            raise UserError(
                f"--{name}= is empty; give a path, and check that the shell variable is set if you used one"
            )


def path(text: str) -> str:
    """The path in an option, for argparse's `type`. It expands ~, which shells do not expand in --workdir=~/runs."""
    return str(expand(text)) if text else text


def program(command: str) -> str:
    """How the user has started a command, for its usage message: `peftjax train` or `python -m peftjax.train`."""
    started = Path(sys.argv[0])
    console = started.name == "peftjax" or started.parts[-2:] == ("peftjax", "__main__.py")
    return f"peftjax {command.replace('_', '-')}" if console else f"python -m peftjax.{command}"


def parse_options(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """`parser.parse_args(argv)`, where the names of options may have dashes for underscores, and underscores for dashes.

    Raises:
        UserError: There is no such option.
    """
    declared = {option.replace("_", "-"): option for action in parser._actions for option in action.option_strings}

    def respelled(word: str) -> str:
        name, equals, value = word.partition("=")
        return declared.get(name.replace("_", "-"), name) + equals + value

    words = [respelled(word) if word.startswith("--") else word for word in argv]
    options, unknown = parser.parse_known_args(words)
    if unknown:
        name = unknown[0].partition("=")[0]
        field = "; a field of the config is set by --config.SECTION.FIELD=VALUE" if "--config" in declared else ""
        raise UserError(
            f"unknown argument {unknown[0]}.{suggest(name, declared.values())} {parser.prog} --help lists the options{field}"
        )
    return options


def config_fields(argv: list[str], prefix: str = "--config.") -> tuple[list[str], list[str]]:
    """The arguments that set config fields, such as "--config.train.eval-every=5", and all others.

    In the names of the fields, dashes become underscores.

    Raises:
        UserError: A field has no value.
    """
    found = [word for word in argv if word.startswith(prefix)]
    pairs = [word.partition("=") for word in found]
    for name, equals, _ in pairs:
        if not equals:
            raise UserError(f"{name} needs a value after an equals sign: {name}=VALUE")
    fields = ["--" + name[2:].replace("-", "_") + equals + value for name, equals, value in pairs]
    return fields, [word for word in argv if word not in found]


def parse_command(
    argv: list[str],
    command: str,
    summary: str,
    *,
    of_run: bool = False,
    workdir: bool = True,
    options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.Namespace:
    """The arguments of a command with a config: `config` (path), `overrides` (strings "--config.a.b=c") and `workdir`.

    A missing or unknown argument ends the process with code 2, as argparse does. A command `of_run` reads a run, whose config
    is the default for --config; without a --workdir it is None. `options` adds the command's own options to the parser.
    """
    parser = argparse.ArgumentParser(
        prog=program(command),
        description=summary,
        epilog=help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    files = "Python file with get_config(), FILE.py:ARGUMENT, or a YAML or JSON file"
    parser.add_argument(
        "--config",
        type=path,
        required=not of_run,
        metavar="FILE",
        help=f"Config to use instead of the run's own: {files}" if of_run else files,
    )
    if workdir:
        role = "Workdir of the run" if of_run else "Directory for everything that the run writes"
        parser.add_argument("--workdir", type=path, required=not of_run, metavar="DIR", help=role)
    if options is not None:
        options(parser)
    overrides, rest = config_fields(argv)
    arguments = parse_options(parser, rest)
    arguments.overrides = overrides
    require_value(arguments, "config", *(["workdir"] if workdir else []))
    return arguments
