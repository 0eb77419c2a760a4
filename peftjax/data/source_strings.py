"""The strings that name sources: their weights, their paths, and suggestions for those that do not exist."""

import math
import pathlib
import re

from peftjax.core.errors import UserError
from peftjax.core.home import expand
from peftjax.core.paths import suggest


def split_weight(spec: str) -> tuple[str, float | None]:
    """Split a source string into the source and its weight: "a.jsonl@0.5" gives ("a.jsonl", 0.5).

    Returns:
        The source without its weight, and the weight; None if it has none.

    Raises:
        UserError: The weight is not positive.
    """
    match = re.fullmatch(r"(.+)@(-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)", spec)
    if not match:
        return spec, None
    weight = float(match[2])
    if not 0 < weight < math.inf:
        raise UserError(f"source {spec!r}: the weight {match[2]} is not positive; use a finite number above 0")
    return match[1], weight


def absolute(spec: str) -> str:
    """Return a source string with an absolute path, if it has a path: "images:a@2" gives "images:/home/me/a@2"."""
    if spec.startswith(("tfds:", "hf:")):
        return spec
    kind, path = ("images:", spec[7:]) if spec.startswith("images:") else ("", spec)
    return f"{kind}{expand(path).absolute()}"


def not_found(spec: str, path: pathlib.Path, kind: str) -> UserError:
    """The error for a path that does not exist; it suggests similar names in the nearest existing folder."""
    folder, missing = path.parent, path.name
    while not folder.is_dir():
        folder, missing = folder.parent, folder.name
    names = sorted(entry.name for entry in folder.iterdir())
    holds = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "nothing"
    return UserError(f"source {spec!r}: no such {kind}.{suggest(missing, names)} {folder.resolve()} holds {holds}")
