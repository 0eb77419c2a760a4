"""Which command a process runs, known before the first import of another module."""

import os
import sys


def command() -> str | None:
    """The peftjax command of this process, "" if it names none; None if another program imports peftjax."""
    return command_in(sys.argv, sys.orig_argv)


def command_in(arguments: list[str], started: list[str]) -> str | None:
    """The command whose package Python is importing.

    Args:
        arguments: sys.argv, which is ["-m", ...] until Python has found the module to run.
        started: sys.orig_argv.
    """
    if arguments[:1] == ["-m"] and "-m" in started:
        package, _, name = started[started.index("-m") + 1].partition(".")
        if package != "peftjax":
            return None
        return name or (arguments[1:] or [""])[0]  # python -m peftjax train
    if arguments and os.path.basename(arguments[0]) == "peftjax":  # noqa: PTH119  # pathlib is not loaded yet
        return (arguments[1:] or [""])[0]
    return None
