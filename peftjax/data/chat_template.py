"""Find and compile the chat template of a model directory."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from peftjax.core.errors import UserError
from peftjax.io.hf_files import read_json_if_any

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}


def chat_template_text(directory: pathlib.Path, config: dict[str, Any]) -> str:
    """Read the chat template from chat_template.jinja, or else tokenizer_config.json, or else chat_template.json.

    Args:
        directory: The model directory.
        config: Its tokenizer_config.json.

    Raises:
        UserError: There is no chat template, or there are several and none is called "default".
    """
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    template = config.get("chat_template") or read_json_if_any(directory / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        if "default" not in template:
            raise UserError(
                f'{directory} has the chat templates {", ".join(template)}, but none named "default"; rename one, or write it '
                "to chat_template.jinja"
            )
        template = template["default"]
    if not template:
        raise UserError(
            f"the tokenizer in {directory} has no chat template, so messages cannot be converted to text; add a "
            'chat_template.jinja, or use config.data.format = "completion" with your own templates'
        )
    return template


def compile_template(text: str) -> Any:
    """Compile a chat template in an environment like that of transformers: sandboxed, with trimmed blocks."""
    import datetime

    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}...{% endgeneration %} marks the assistant's text; it renders its body."""

        tags = {"generation"}  # noqa: RUF012  (as jinja declares it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # jinja's filter escapes HTML

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(text)
