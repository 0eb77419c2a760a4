"""The format of the prompts that a model was trained on, which is kept in a file beside the adapter.

peftjax.json, in the directory of an adapter or of a whole model:

    {"prompt": {"task": "causal_lm", "format": "completion", "template": "Q: {question}\\nA:", "prompt_field": "prompt"}}

Hugging Face PEFT, AdapterHub and transformers ignore this file. Beside it is chat_template.jinja if the run has a chat template
of its own (data.chat_template).
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftjax.core.errors import UserError
from peftjax.core.files import write_atomically
from peftjax.data.chat_template import read_template
from peftjax.data.config import DataConfig
from peftjax.data.fields import fields_in, fill
from peftjax.data.records import encode_prompt
from peftjax.data.tokenizer import Tokenizer
from peftjax.io.hf_files import CHAT_TEMPLATE, PROMPT_FORMAT, TEMPLATES, check_regular
from peftjax.io.json_files import read_json_if_any
from peftjax.tasks import TASKS
from peftjax.tasks.prompt_records import (
    conversation_in,
    encode_chat_prompt,
    encode_conversation,
    json_in,
    text_in,
    with_messages,
)

_CHATS = ("chat", "sharegpt")
_TEMPLATE_TASKS = [kind for kind, task in TASKS.items() if task.fills_template]


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """How a record became a prompt in training.

    Attributes:
        task: The task type.
        format: The value of data.format. With `Task.fills_template`, the template is used with every format.
        template: The value of data.prompt_template.
        prompt_field: The value of data.prompt_field: the field that {prompt} stands for.
    """

    task: str
    format: str
    template: str
    prompt_field: str

    @classmethod
    def of(cls, task: str, data: DataConfig) -> "PromptFormat":
        """Return the format of a run's config."""
        return cls(task, data.format, data.prompt_template, data.prompt_field)

    def save(self, directory: Path) -> None:
        """Write the file into the directory of an adapter or a model."""
        write_atomically(directory / PROMPT_FORMAT, json.dumps({"prompt": dataclasses.asdict(self)}, indent=2) + "\n")

    @property
    def has_template(self) -> bool:
        """Whether data.prompt_template makes the prompt."""
        return self.task in _TEMPLATE_TASKS or self.format == "completion"

    def describe(self, tokenizer: Tokenizer, prompts: Sequence[str] = ()) -> str:
        """Say what `encode` does to a prompt, or to these prompts; "" if it is continued as it is."""
        if self.has_template:
            return "" if self.template == "{prompt}" else f"the prompt template {self.template!r}"
        if self.format in _CHATS and prompts and all(map(conversation_in, prompts)):
            return "the chat template"
        if self.format in _CHATS or (self.format == "alpaca" and tokenizer.template):
            return "the chat template, with the prompt as a user message"
        return "Alpaca's prompt, with the prompt as the instruction" if self.format == "alpaca" else ""

    def encode(self, prompt: str, tokenizer: Tokenizer, name: str) -> list[int]:
        """Convert a prompt to the tokens that generation continues, as for the prompts of an evaluation.

        Args:
            prompt: The text for the field of the template or for the user message. For a template with several fields, and
                optionally for Alpaca's, a JSON object with the fields. For a chat optionally as in `encode_chat_prompt`.
            tokenizer: The tokenizer.
            name: What messages call the prompt.

        Raises:
            UserError: The prompt lacks a field of the template, or the tokenizer has no chat template.
        """
        if self.format in _CHATS and not self.has_template:
            return encode_chat_prompt(prompt, tokenizer, name)
        if not self.has_template and self.format != "alpaca":
            return tokenizer.encode_prompt(prompt)
        return self._encode_fields(self._record(prompt, name), tokenizer, name)

    def encode_record(self, record: Mapping[str, Any], tokenizer: Tokenizer, name: str) -> list[int]:
        """Convert a record of a file of prompts to the tokens that generation continues.

        Args:
            record: A conversation as in `with_messages`, the fields that the template or Alpaca's prompt inserts, or the
                field "prompt" with a text as in `encode`.
            tokenizer: The tokenizer.
            name: What messages call the record.

        Raises:
            UserError: As `encode`; or the record holds none of these, or messages for a model that was not trained on a chat.
        """
        if self.has_template and (
            record.keys() >= {*self._fields.values()} or not {"prompt", "messages"} & record.keys()
        ):
            return self._encode_fields(record, tokenizer, name)
        if conversation := with_messages(record):
            if self.has_template or self.format not in _CHATS:
                raise UserError(
                    f'{name}: the model was not trained on messages; give the text of the prompt in a field "prompt", or add --chat '
                    "to render messages with the chat template"
                )
            return encode_conversation(conversation, tokenizer, name)
        if not self.has_template and self.format == "alpaca" and "instruction" in record:
            return self._encode_fields({**record, "output": ""}, tokenizer, name)
        return self.encode(text_in(record, name), tokenizer, name)

    def _encode_fields(self, record: Mapping[str, Any], tokenizer: Tokenizer, name: str) -> list[int]:
        """The tokens of the template or of Alpaca's prompt with the fields of a record."""
        data = DataConfig(
            format=self.format,
            prompt_template=self.template,
            prompt_field=self.prompt_field,
            completion_template="",
        )
        if self.task in _TEMPLATE_TASKS:
            return tokenizer.encode(fill(self.template, record, data, name))
        return encode_prompt(record, data, tokenizer, name=name).tokens

    @property
    def _fields(self) -> dict[str, str]:
        """What the template inserts, and the fields of the record that this is in."""
        renamed = {"prompt": self.prompt_field}
        found = fields_in(self.template)
        return {renamed.get(path, path): renamed.get(field, field) for path, field in found.items()}

    def _record(self, prompt: str, name: str) -> dict[str, Any]:
        """The record with a prompt."""
        if not self.has_template:
            given = _object(prompt)
            return (given if "instruction" in given else {"instruction": prompt}) | {"output": ""}
        fields = self._fields
        if len(fields) == 1:
            return {next(iter(fields)): prompt}
        record, names = _object(prompt), list(dict.fromkeys(fields.values()))
        if missing := [field for field in names if field not in record]:
            example = json.dumps(record | dict.fromkeys(missing, "..."))
            raise UserError(
                f"{name}={prompt[:60]!r} lacks {', '.join(missing)}, which the prompt template {self.template!r} inserts; give "
                f"a JSON object, {name}='{example}', or --raw to continue the text as it is"
            )
        return record


def save_chat_template(directory: Path, template: str) -> None:
    """Write the chat template of a run into the directory of its adapter or model, whose other templates it replaces."""
    write_atomically(directory / CHAT_TEMPLATE, template)
    shutil.rmtree(directory / TEMPLATES, ignore_errors=True)


def read_chat_template(adapter: Path) -> str:
    """Read the chat template of the run that has trained an adapter; empty if the run used the base tokenizer's."""
    path = adapter / CHAT_TEMPLATE
    check_regular(path)
    return read_template(path) if path.is_file() and (adapter / PROMPT_FORMAT).is_file() else ""


def read_prompt_format(directory: Path) -> PromptFormat | None:
    """Read the format that is kept in a directory; None if there is none.

    Raises:
        UserError: The file is not what this version of peftjax writes.
    """
    found = read_json_if_any(directory / PROMPT_FORMAT).get("prompt")
    names = [field.name for field in dataclasses.fields(PromptFormat)]
    if found is None:
        return None
    if (
        not isinstance(found, dict)
        or sorted(found) != sorted(names)
        or not all(isinstance(v, str) for v in found.values())
    ):
        raise UserError(
            f'{directory / PROMPT_FORMAT}: "prompt" must be an object with the texts {", ".join(names)}; use --raw to ignore it'
        )
    return PromptFormat(**found)


def _object(text: str) -> dict[str, Any]:
    """The JSON object in a text; empty if it is none."""
    value = json_in(text)
    return value if isinstance(value, dict) else {}
