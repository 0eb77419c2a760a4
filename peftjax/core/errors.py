"""The error a user is meant to read."""


class UserError(ValueError):
    """A mistake in what the user gave: the message says what, where, its value, what was near and how to fix it.

    The commands print it without a traceback (peftjax/core/cli.py).
    """
