"""Pages from templates: all text is escaped, and a page loads nothing and runs no script but its own."""

import base64
import functools
import hashlib
import importlib.resources
import json
from typing import TYPE_CHECKING, Any

from peftjax.core.terminal import printable
from peftjax.core.units import format_bytes
from peftjax.report.text import format_duration, format_number, format_percent, value_text

if TYPE_CHECKING:
    import jinja2


def render_page(template: str, **values: Any) -> str:
    """Return the page of a template in this package with these values."""
    script = _read("charts.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = _environment().get_template(template)
    return page.render(style=_read("page.css"), script=script, script_hash=f"sha256-{digest}", **values)


@functools.cache
def _environment() -> "jinja2.Environment":  # it keeps the compiled templates
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": format_bytes,
        "duration": format_duration,
        "number": format_number,
        "percent": format_percent,
        "printable": printable,
        "value": value_text,
        "json": functools.partial(json.dumps, ensure_ascii=False),
    }
    return environment


def _read(name: str) -> str:
    return importlib.resources.files("peftjax.report").joinpath(name).read_text(encoding="utf-8")
