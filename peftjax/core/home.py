"""Home directories in the paths that users give."""

import os
from pathlib import Path


def expand(path: str | Path) -> Path:
    """Replace a leading ~ or ~USER by that home directory. The path is unchanged if there is no such user."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  # Path.expanduser raises a RuntimeError without such a user
