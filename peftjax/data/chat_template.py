"""The chat template of a tokenizer: conversations to text. transformers renders it."""

import functools
import inspect
import pathlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peftjax.core.errors import UserError
from peftjax.core.home import expand
from peftjax.core.paths import suggest
from peftjax.core.time_limit import time_limit
from peftjax.io.json_files import read_json_if_any

LONGEST = 10_000_000  # characters that a shorter conversation may become

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}
Tools = Sequence[Any] | None  # JSON schemas of functions that the assistant can call
Variables = Mapping[str, Any] | None  # of the template, such as {"enable_thinking": False}


def read_template(given: str | pathlib.Path, name: str = "chat_template") -> str:
    """Return the text of a chat template, which is given as this text or as a file that holds it.

    A text with a brace is a template: Jinja's tags have braces, and paths hardly ever do. Messages call it `name`.

    Raises:
        UserError: There is no such file, or it does not hold a template.
    """
    if "{" in str(given):
        return str(given)
    path = expand(given)
    if not path.is_file():
        near = suggest(path.name, [file.name for file in path.parent.glob("*.jinja")])
        raise UserError(f"{name}={str(given)!r} is neither an existing file nor a Jinja template.{near}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}={str(given)!r} is not valid UTF-8: {error}") from error
    if "{" not in text:
        raise UserError(f"{name}={str(given)!r}: the file holds no Jinja template")
    return text


class ChatTemplate:
    """A chat template, or several of which one is for conversations with tools.

    Args:
        theirs: The tokenizer of transformers.
        directory: The directory it was loaded from.
        given: The text of a template to use in place of the tokenizer's; empty: the tokenizer's.

    Attributes:
        name: What messages call it.
    """

    def __init__(self, theirs: Any, directory: pathlib.Path, given: str = ""):
        self._theirs, self._directory = theirs, directory
        self.name = "the given chat template" if given else f"the chat template of {directory}"
        self._said: set[str] = set()
        # Why it was stopped, once it has reached a limit on time or memory: callers try several forms of a conversation.
        self._endless = ""
        # transformers reads this file for processors only.
        processor = read_json_if_any(directory / "chat_template.json")
        self._templates: str | dict[str, str] | None = given or theirs.chat_template or processor.get("chat_template")

    def __bool__(self) -> bool:
        return bool(self._templates)

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: Tools, variables: Variables = None
    ) -> str:
        """Render a conversation as text, with the special tokens.

        Args:
            messages: The conversation.
            add_generation_prompt: Whether to end with the beginning of an assistant turn.
            tools: The functions that the assistant can call.
            variables: Other variables of the template.

        Raises:
            UserError: There is no template, or it rejects the conversation.
        """
        messages = self._in_its_form(messages)
        return self._apply(messages, tools, variables, add_generation_prompt=add_generation_prompt, tokenize=False)

    def marks(self, tools: Tools) -> bool:
        """Whether the template marks the assistant's text with {% generation %}."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self._text(tools)) is not None

    def marked(self, messages: Sequence[Message], tools: Tools, variables: Variables = None) -> list[int]:
        """1 for each token of a rendered conversation that the template marks with {% generation %}, else 0.

        Raises:
            UserError: The template rejects the conversation.
        """
        options = {"tokenize": True, "return_dict": True, "tokenizer_kwargs": {"verbose": False}}
        messages = self._in_its_form(messages)
        return self._apply(messages, tools, variables, return_assistant_tokens_mask=True, **options)["assistant_masks"]

    @functools.cached_property
    def generation_prompt(self) -> str:
        """What the template writes before an answer; empty if it writes nothing."""
        question = [{"role": "user", "content": "?"}]
        try:
            bare, whole = self.render(question, False, None), self.render(question, True, None)
        except UserError:
            return ""
        return whole[len(bare) :] if whole.startswith(bare) else ""

    @functools.cached_property
    def answer_end(self) -> str:
        """What the template writes after the last answer; empty if it writes nothing."""
        mark = "\ue000"
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
        try:
            _, found, after = self.render(turns, False, None).rpartition(mark)
        except UserError:
            return ""
        return after if found else ""

    def warn(self, message: str) -> None:
        """Issue a warning once, since every record may cause it."""
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, stacklevel=3)

    def _in_its_form(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages with content in a form that the template renders: text, or lists of parts."""
        contents = [message.get("content") for message in messages]
        if any(isinstance(content, list) for content in contents) and not self._reads_parts:
            return _converted(messages, list, lambda parts: "".join(part["text"] for part in parts))
        if any(isinstance(content, str) for content in contents) and not self._reads_text and self._reads_parts:
            return _converted(messages, str, lambda text: [{"type": "text", "text": text}])
        return messages

    @functools.cached_property
    def _reads_text(self) -> bool:
        return self._reads("?!")

    @functools.cached_property
    def _reads_parts(self) -> bool:
        return self._reads([{"type": "text", "text": "?!"}])

    def _reads(self, content: Any) -> bool:
        try:
            rendered = self._apply([{"role": "user", "content": content}], None, tokenize=False)
        except UserError:
            return False
        return "?!" in rendered and not re.search(r"""["']\?!""", rendered)  # not the list as Python or JSON writes it

    def _apply(self, messages: Sequence[Message], tools: Tools, variables: Variables = None, **options: Any) -> Any:
        from peftjax.data.template_size import LIMIT, largest_constant  # with jinja2, which not every command needs

        template, what = self._text(tools), self.name
        if tools and not re.search(r"\btools\b", template):
            self.warn(f"{what} does not use the tools of the records, so the model does not see them")
        if variables and (taken := sorted(self._arguments & variables.keys())):
            raise UserError(f"chat_template_kwargs: {taken[0]!r} is not a variable of a template; remove it")
        if self._endless:
            raise UserError(self._endless)
        try:
            if (size := largest_constant(template)) > LIMIT:
                raise UserError(
                    f"{what} repeats or pads a text or list to {size:g} characters or elements; the limit is {LIMIT:,}"
                )
            with time_limit(f"{what} does not end; look for a loop in it"):
                rendered = self._theirs.apply_chat_template(
                    [dict(message) for message in messages],
                    tools=tools,
                    chat_template=template,
                    **(variables or {}),
                    **options,
                )
        except UserError as error:
            self._endless = str(error)
            raise
        except Exception as error:  # of any kind: a template is code
            said = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{what} rejects the conversation: {said}") from error
        if isinstance(rendered, str) and len(rendered) > LONGEST > len(repr((messages, tools))):
            raise UserError(
                f"{what} renders a conversation of {len(repr(messages)):,} characters to {len(rendered):,}; the limit is {LONGEST:,}"
            )
        return rendered

    @functools.cached_property
    def _arguments(self) -> set[str]:
        """The arguments of transformers that are not variables of the template, such as "tokenize"."""
        return set(inspect.signature(self._theirs.apply_chat_template).parameters) - {"documents"}

    def _text(self, tools: Tools) -> str:
        """The template. If there are several, the one for tools if there are tools, otherwise the default."""
        template = self._templates
        if isinstance(template, dict):
            if "default" not in template:
                raise UserError(
                    f'{self._directory} has the chat templates {", ".join(template)}, but none named "default"; rename one, '
                    "or write it to chat_template.jinja"
                )
            template = template["tool_use" if tools and "tool_use" in template else "default"]
        if not template:
            raise UserError(
                f"the tokenizer in {self._directory} has no chat template, so messages cannot be converted to text; set "
                "data.chat_template to a file with one, write it to chat_template.jinja in that directory, or use "
                'data.format="completion" with your own templates'
            )
        return template


def _converted(messages: Sequence[Message], form: type, convert: Callable[[Any], Any]) -> list[Message]:
    """The messages with content of one form converted to another."""
    return [
        {**message, "content": convert(message["content"])} if isinstance(message.get("content"), form) else message
        for message in messages
    ]
