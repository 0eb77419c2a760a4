"""The errors that users are meant to read."""


class UserError(ValueError):
    """A mistake in what the user gave: a config, a file, the data, or an argument of a public function.

    The message says on one line what happened, where, the value and the fix. The commands print it without a traceback. Any
    other exception is a bug in peftjax, or a lack of memory.
    """


class NotFiniteError(UserError):
    """The loss, the gradient norm or the logits of a model are NaN or infinite."""


def root_cause(error: BaseException) -> BaseException:
    """The error that an error was raised from, at the end of the chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def shown(value: object) -> str:
    """A value in a message: its repr, or the first line of it, which for a model has many."""
    return repr(value).partition("\n")[0][:200]
