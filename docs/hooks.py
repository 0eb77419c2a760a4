"""What mkdocs and mkdocstrings do not do by themselves.

Links from a page to files of the repository outside docs/: in the repository such a link works as it is. The site does not
contain these files, so there the link becomes the file's path. The pictures in `PICTURES` are copied into the site. A link to
a file that does not exist fails the build.

Results: `<!-- results: FILE -->` is replaced by that Markdown file of the repository, if it exists.

API reference: `::: peftjax.attach` would show the module of that name instead of the function, so it fails the build. The path
of a page of the documentation in a docstring, such as docs/lora.md, becomes a link with the page's title.

Dataclasses: `ClassVar` without a type is a class variable too, and not a parameter of the constructor.

Methods: an entry also shows the docstring of the module, which has the equation, and the options of the base classes.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PICTURES = ("experiments/*/*.png", "benchmarks/results/*.svg")
RESULTS = re.compile(r"<!-- results: (\S+) -->")
PAGE = re.compile(r"\bdocs/(\w+\.md)")
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
        same = text in (path, Path(path).name, str(Path(path).parent), "output")
        return f"`{path}`" if same else f"{text} (`{path}`)"

    return LINK.sub(replace, RESULTS.sub(include, markdown))


def on_page_content(html: str, page: Any, files: Any, **_: Any) -> str:
    if module := re.search(r'<h3 id="peftjax\.(\w+)\.\1"', html):
        raise PluginError(f"{page.file.src_path}: {module[1]} is shown as a module; write the function's full path")

    def link(path: re.Match[str]) -> str:
        file = files.get_file_from_path(path[1])
        if file is None:
            raise PluginError(f"{page.file.src_path}: a docstring names {path[0]}, which does not exist")
        return f'<a href="{file.url_relative_to(page.file)}">{file.page.title}</a>'

    return PAGE.sub(link, html) if page.file.src_path.startswith("api/") else html


class BareClassVars(griffe.Extension):
    """Take the annotation from class variables without a type, which griffe would show as parameters."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        if str(attr.annotation) == "ClassVar":
            attr.annotation = None


class WholeMethods(griffe.Extension):
    """Add to a method's docstring its module's docstring and the options that it inherits."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for module in all_modules(pkg["methods"]):
            for method in module.classes.values():
                if not method.is_alias and method.docstring:
                    text = with_inherited(method)
                    if module.docstring and text.startswith("Options of "):
                        text = f"{module.docstring.value.rstrip()}\n\n{text.partition('.')[2].strip()}"
                    method.docstring.value = text


def all_modules(package: griffe.Module) -> Iterator[griffe.Module]:
    for module in package.modules.values():
        if not module.is_alias:
            yield module
            yield from all_modules(module)


OPTION = re.compile(r"^    (\w+)[ :].*(?:\n {8}.*)*\n?", re.MULTILINE)
OPTIONS = re.compile(r"(?<=^Attributes:\n)(?: {4}.*\n?)*", re.MULTILINE)


def options_of(docstring: str) -> dict[str, str]:
    """The entries of the list of options in a docstring, by name."""
    block = OPTIONS.search(docstring)
    return {option[1]: option[0].rstrip() for option in OPTION.finditer(block[0])} if block else {}


def with_inherited(method: griffe.Class) -> str:
    """The docstring of a class, with the options of its base classes below `Method`."""
    text, bases = method.docstring.value, method.mro()
    names = [base.name for base in bases]
    inherited: dict[str, str] = {}
    for base in reversed(bases[: names.index("Method")] if "Method" in names else []):
        inherited |= options_of(base.docstring.value if base.docstring else "")
    own = options_of(text)
    listed = "\n".join((inherited | own).values())
    listed = listed.replace("default -", "default \N{MINUS SIGN}")  # griffe would read "default -1" as a subtraction
    if OPTIONS.search(text):
        return OPTIONS.sub(lambda _: listed + "\n", text)
    return f"{text}\n\nAttributes:\n{listed}" if listed else text
