"""The command `peftjax`: `peftjax train ...` is the same as `python -m peftjax.train ...`.

Only the module of the chosen command is imported.
"""

import importlib
from typing import NoReturn

import peftjax
from peftjax.core import cli
from peftjax.core.errors import UserError
from peftjax.core.output import say
from peftjax.core.paths import suggest

# Each command: the module with its `main`, and what it does, in one line.
COMMANDS = {
    "train": ("peftjax.train", "Train a model with the method of a config; run it again to resume"),
    "evaluate": ("peftjax.evaluate", "Evaluate a trained run, an adapter or a base model"),
    "generate": ("peftjax.generate", "Generate text with a trained run, or with a model and an adapter"),
    "sweep": ("peftjax.sweep", "Train one run for each combination of field values, or for each random draw"),
    "compare": ("peftjax.compare", "Compare the scores and costs of runs and sweeps"),
    "plan": ("peftjax.plan.__main__", "Plan a run: whether its train step fits a device, and how fast it can be"),
    "list-methods": ("peftjax.list_methods", "List all methods with the parameters they would train in a model"),
    "report": ("peftjax.report.__main__", "Rewrite the report.html of a run, or the sweep.html of a sweep"),
}


def usage() -> str:
    """The text of `peftjax --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    last = "`peftjax COMMAND --help` lists the options of a command, `peftjax --version` prints the version."
    return "\n".join(["usage: peftjax COMMAND [options]", "", *lines, "", last])


def dispatch(argv: list[str]) -> int | None:
    """Run the command named by the first argument; returns its exit code.

    Raises:
        UserError: There is no such command.
    """
    first = argv[0] if argv else "--help"
    if first in ("-h", "--help"):
        say(usage())
        return 0
    if first == "--version":
        say(f"peftjax {peftjax.__version__}")
        return 0
    name = first.replace("_", "-")
    if name not in COMMANDS:
        hint = suggest(name, COMMANDS) or f" The commands are {', '.join(COMMANDS)}"
        raise UserError(f"peftjax {first}: no such command.{hint}")
    module, _ = COMMANDS[name]
    code: int | None = importlib.import_module(module).main(argv[1:])
    return code


def main() -> NoReturn:
    """Run `peftjax` with the arguments of this process."""
    cli.run(dispatch)


if __name__ == "__main__":
    main()
