"""Printing that does not end a run: what reads the output, such as `tee`, may have ended before it."""

import os
import sys


def say(text: str, *, error: bool = False) -> None:
    """Print a line to stdout, or to stderr. Once nobody reads it any more, the line and all later ones are dropped."""
    stream = sys.stderr if error else sys.stdout
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:  # Ctrl-C in `train | tee log` ends tee as well, and the state must still be saved
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
