"""Config files in YAML: a mapping of sections, each a mapping of fields.

Plain scalars are read as in YAML 1.2: `1e-4` is a number, and `no` and `on` are strings. PyYAML by itself reads YAML 1.1,
in which the first is a string and the others are booleans.
"""

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from peftjax.core.errors import UserError

_SCALARS = (  # (tag, pattern, the characters that a value begins with); the first one that matches counts
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL", "~nN"),
    ("null", r"", ("",)),
    ("merge", r"<<", "<"),
)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # not SafeLoader's


for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list(_first))


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The sections of a YAML file, and the lines of the fields: {"section": 1, "section.field": 2}.

    The fields of a mapping in a list have its index: {"section.0.field": 3}.

    Raises:
        UserError: The file is not valid YAML or not a mapping; the message has the line if it is known.
    """
    try:
        loader = _Loader(path.read_text(encoding="utf-8-sig"))
        root = loader.get_single_node()
        if root is None:
            return {}, {}
        lines = _lines(root, path)
        sections: dict[str, Any] = loader.construct_document(root)
        return sections, lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error


def _lines(root: yaml.Node, path: Path) -> dict[str, int]:
    """The line of each section and field."""
    lines: dict[str, int] = {}
    for section, (line, value) in _entries(root, path).items():
        lines[section] = line
        for place, node in _mappings(section, value):
            lines |= {f"{place}.{name}": line for name, (line, _) in _entries(node, path).items()}
    return lines


def _mappings(name: str, value: yaml.Node) -> list[tuple[str, yaml.Node]]:
    """A mapping, or the mappings in a list, each with its name."""
    several = isinstance(value, yaml.SequenceNode)
    nodes = [(f"{name}.{index}", node) for index, node in enumerate(value.value)] if several else [(name, value)]
    return [(place, node) for place, node in nodes if isinstance(node, yaml.MappingNode)]


def _entries(node: yaml.Node, path: Path) -> dict[str, tuple[int, yaml.Node]]:
    """The line and the value of each key of a mapping.

    Raises:
        UserError: The node is not a mapping, or a key is not a string or is given twice.
    """
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1
        raise UserError(f"{path}, line {line}: a config must be a mapping with sections, such as model: {{path: DIR}}")
    entries: dict[str, tuple[int, yaml.Node]] = {}
    for key, value in node.value:
        line, name = key.start_mark.line + 1, key.value
        if not isinstance(name, str) or key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            raise UserError(f"{path}, line {line}: the name of a section or a field must be a string, not {name!r}")
        if name in entries:
            raise UserError(f"{path}, line {line}: {name} is given twice, first on line {entries[name][0]}")
        entries[name] = line, value
    return entries
