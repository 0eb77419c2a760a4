"""A limit on the texts that the constants of a chat template build, such as {{ 'x' * 10**9 }}.

Jinja computes constants when it compiles a template, in one operation, which no time limit can interrupt.
"""

import functools
import math
import operator
import re

import jinja2
from jinja2 import ext, nodes, parser

LIMIT = 1_000_000  # characters of a text, or elements of a list, that constants build
# Filters and methods with a width.
_PADDING = {"center", "ljust", "rjust", "zfill", "indent", "wordwrap", "lipsum", "format"}
_OPERATORS = {nodes.Add: operator.add, nodes.Sub: operator.sub, nodes.Mul: operator.mul, nodes.Pow: operator.pow}


class _Generation(ext.Extension):
    """transformers' {% generation %} ... {% endgeneration %}: what is inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache
def largest_constant(template: str) -> float:
    """The length of the longest text or list that the constants of a template build; 0 if it cannot be parsed."""
    try:
        tree = jinja2.Environment(extensions=[_Generation, ext.loopcontrols]).parse(template)
    except jinja2.TemplateError:  # reported where it is rendered
        return 0
    return max((_size(node) for node in tree.find_all(nodes.Expr)), default=0)


def _size(node: nodes.Node) -> float:
    """The length of the text or list that an expression builds, as far as it follows from constants."""
    if isinstance(node, nodes.Const):
        return len(node.value) if isinstance(node.value, str) else 0
    if isinstance(node, nodes.List | nodes.Tuple):
        return len(node.items)
    if isinstance(node, nodes.Concat):
        return sum(map(_size, node.nodes))
    if isinstance(node, nodes.Add):
        return _size(node.left) + _size(node.right)
    if isinstance(node, nodes.Mul):
        left, right = node.left, node.right
        return max(_size(left) * (_number(right) or 0), _size(right) * (_number(left) or 0))
    if isinstance(node, nodes.Mod):
        return _width(node.left)
    if isinstance(node, nodes.Pow):
        return math.inf if _number(node) == math.inf else 0
    if isinstance(node, nodes.Filter):
        name, subject = node.name, node.node
    elif isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
        name, subject = node.node.attr, node.node.node
    else:
        return 0
    if name not in _PADDING:
        return 0
    arguments = [*node.args, *(keyword.value for keyword in node.kwargs)]
    return max([_width(subject), *(_number(argument) or 0 for argument in arguments)])


def _number(node: nodes.Node | None) -> float | None:
    """The value of an expression of constants, infinity if it exceeds a float; None for any other expression."""
    try:
        if isinstance(node, nodes.Const):
            return float(node.value) if isinstance(node.value, int | float) else None
        if not isinstance(node, nodes.Add | nodes.Sub | nodes.Mul | nodes.Pow):
            return None
        left, right = _number(node.left), _number(node.right)
        if left is None or right is None:
            return None
        if isinstance(node, nodes.Pow) and left <= 0:  # may be complex
            return None
        result: float = _OPERATORS[type(node)](left, right)
        return result
    except OverflowError:
        return math.inf


def _width(node: nodes.Node | None) -> float:
    """The largest width in a constant format string, such as %999999999d or {:>999999999}."""
    text = node.value if isinstance(node, nodes.Const) and isinstance(node.value, str) else ""
    return max((float(digits) for digits in re.findall(r"[%:][^%:{}\s]*?(\d{4,})", text)), default=0)
