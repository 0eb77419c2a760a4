"""Chat templates: where a model directory keeps its own, and the environment that renders it."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from peftjax.io.hf_files import read_json_if_any

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}


def chat_template_text(directory: pathlib.Path, config: dict[str, Any]) -> str:
    """The chat template: of chat_template.jinja, else tokenizer_config.json, else chat_template.json."""
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    template = config.get("chat_template") or read_json_if_any(directory / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        if "default" not in template:
            raise ValueError(f'{directory} has chat templates named {", ".join(template)}, but none named "default"')
        template = template["default"]
    if not template:
        raise ValueError(
            f"the tokenizer in {directory} has no chat template, so messages cannot be written as text: add a "
            'chat_template.jinja to it, or use config.data.format = "completion" with templates of your own'
        )
    return template


def compile_template(text: str) -> Any:
    """A compiled chat template in the environment that transformers renders it in: sandboxed, blocks trimmed."""
    import datetime

    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}...{% endgeneration %} marks what the assistant says, and prints its body."""

        tags = {"generation"}  # noqa: RUF012  (jinja's own declaration)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # jinja's own escapes HTML

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(text)
