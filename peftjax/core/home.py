"""Home directories in the paths that users give."""

import os
from pathlib import Path

from peftjax.core.errors import UserError, shown


def expand(path: str | Path) -> Path:
    """Replace a leading ~ or ~USER by that home directory. The path is unchanged if there is no such user.

    Raises:
        UserError: `path` is not a path.
    """
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"a path must be a string or a pathlib.Path, not {shown(path)}")
    return Path(os.path.expanduser(path))  # noqa: PTH111  # Path.expanduser raises a RuntimeError without such a user
