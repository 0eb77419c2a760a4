"""Printing that survives a closed pipe: Ctrl-C in `train | tee log` ends tee first."""

import os
import sys


def say(text: str, *, error: bool = False) -> None:
    """Print a line to stdout, or to stderr. Once nobody reads it any more, the line and all later ones are dropped."""
    stream = sys.stderr if error else sys.stdout
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:  # the state must still be saved
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
