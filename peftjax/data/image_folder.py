"""Folders of images as a source of records, one folder for each class."""

import os
import pathlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from peftjax.core.errors import UserError
from peftjax.core.home import expand
from peftjax.data.source_strings import not_found, split_weight

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageFolder:
    """The images at any depth below DIR/CLASS as {"image": the file's bytes, "label": CLASS}, sorted by path.

    A warning lists files without an image suffix. Hidden files and folders are ignored.
    """

    def __init__(self, spec: str):
        self._root = expand(spec.removeprefix("images:"))
        if not self._root.is_dir():
            raise not_found(spec, self._root, "folder")
        self._paths, others = list[str](), list[str]()
        for path in sorted(_walk(self._root)):
            image = "/" in path and path.lower().endswith(SUFFIXES)
            (self._paths if image else others).append(path)
        classes = class_folders([spec])
        empty = set(classes) - {path.partition("/")[0] for path in self._paths}
        if empty or not classes:
            why = f"its folder {min(empty)!r} contains no images" if empty else "it has no class folders"
            raise UserError(
                f"source {spec!r}: {why}. Images belong in DIR/CLASS, and have one of the suffixes {', '.join(SUFFIXES)}"
            )
        if others:
            some = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
            warnings.warn(f"source {spec!r}: ignoring files that are not images of a class: {some}", stacklevel=2)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self._paths[index]
        return {"image": (self._root / path).read_bytes(), "label": path.partition("/")[0]}

    def name(self, index: int) -> str:
        return self._paths[index]


def class_folders(specs: Iterable[str]) -> tuple[str, ...]:
    """Return the class names of all image folders among some source strings, sorted."""
    names = [split_weight(spec)[0].removeprefix("images:") for spec in specs if spec.startswith("images:")]
    roots = [root for name in names if (root := expand(name)).is_dir()]
    folders = (entry for root in roots for entry in root.iterdir())
    return tuple(sorted({entry.name for entry in folders if entry.is_dir() and not entry.name.startswith(".")}))


def _walk(root: pathlib.Path) -> Iterator[str]:
    """The paths of all files below a folder that are not hidden, relative to it, with "/" as the separator."""
    for folder, below, names in os.walk(root, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                yield (pathlib.Path(folder) / name).relative_to(root).as_posix()
