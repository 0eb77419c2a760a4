"""Where a run comes from: its command, directory, git commit, and the versions of the software."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import jax


def origin(workdir: Path) -> dict[str, str]:
    """Return the command line of this process, the absolute workdir, and the git commit of the current directory.

    The commit is left out where there is no git repository. "-dirty" follows it if tracked files have been changed.
    """
    found = {"command": _command(sys.orig_argv), "workdir": str(workdir.resolve()), "git commit": _commit()}
    return {name: value for name, value in found.items() if value}


def versions() -> dict[str, str]:
    """Return the versions of Python, the JAX libraries and peftjax, and the devices of this process."""
    found = {"Python": platform.python_version()}
    for name in ("jax", "flax", "optax", "peftjax"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # peftjax, where it is on the path but not installed
            continue
    count, kind = jax.device_count(), jax.devices()[0].device_kind
    return found | {"device": f"{count} x {kind}" if count > 1 else kind}


def _command(words: list[str]) -> str:
    """A command line as in a shell, without the directories of the interpreter and of a console script."""
    words = [Path(words[0]).name, *words[1:]]
    if len(words) > 1 and Path(words[1]).name == "peftjax":  # the console script, which the interpreter runs
        words = ["peftjax", *words[2:]]
    return shlex.join(words)


def _commit() -> str:
    """The commit of the repository that the current directory is in; empty if there is none, or no git."""
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]  # exclude: no tag names
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        result = subprocess.run(describe, capture_output=True, text=True, timeout=10, check=False, env=environment)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
