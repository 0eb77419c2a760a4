"""What mkdocs and mkdocstrings do not do by themselves.

Links from a page to files of the repository outside docs/: in the repository such a link works as it is. The site does not
contain these files, so there the link becomes the file's path. The pictures in `PICTURES` are copied into the site. A link to
a file that does not exist fails the build.

Results: `<!-- results: FILE -->` is replaced by that Markdown file of the repository, if it exists.

Dataclasses: `ClassVar` without a type is a class variable too, and not a parameter of the constructor.
"""

import os
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PICTURES = ("experiments/*/*.png", "benchmarks/results/*.svg")
RESULTS = re.compile(r"<!-- results: (\S+) -->")
LINK = re.compile(r"(!?)\[([^\]]*)\]\((\.\./[^)#]+)\)")


def on_files(files: Any, config: Any) -> Any:
    for picture in (picture for pattern in PICTURES for picture in ROOT.glob(pattern)):
        files.append(File.generated(config, str(picture.relative_to(ROOT)), abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    def include(comment: re.Match[str]) -> str:
        table = ROOT / comment[1]
        return table.read_text() if table.exists() else ""

    def replace(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        path = os.path.normpath(Path("docs", page.file.src_path).parent / target)
        if path.startswith("docs/"):
            return link.group()
        if not (ROOT / path).exists():
            raise PluginError(f"{page.file.src_path}: the link to {target} leads nowhere")
        if picture:
            return f"![{text}]({path})"
        return f"`{path}`" if text in (path, Path(path).name, "output") else f"{text} (`{path}`)"

    return LINK.sub(replace, RESULTS.sub(include, markdown))


class BareClassVars(griffe.Extension):
    """Take the annotation from class variables without a type, which griffe would show as parameters."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        if str(attr.annotation) == "ClassVar":
            attr.annotation = None
