"""From a record to tokens: the tokenizer of a model directory, chat templates, and which tokens carry a loss."""

import dataclasses
import functools
import json
import pathlib
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from ml_collections import ConfigDict

from peftjax.core.paths import suggest

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}

# Of a text record, at most this many tokens are the prompt that a generated sample continues.
TEXT_PROMPT_TOKENS = 32


def load_tokenizer(directory: str | pathlib.Path) -> "Tokenizer":
    """The tokenizer of a Hugging Face model directory."""
    return Tokenizer(directory)


class Tokenizer:
    """Text to token ids and back, as the tokenizer of a Hugging Face model directory does it.

    Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json and the
    chat template. Padding and truncation stored in tokenizer.json are switched off: lengths are the caller's matter.
    A bos token is added where the post-processor in tokenizer.json adds one, as transformers does, and also where
    add_bos_token in tokenizer_config.json asks for it; add_eos_token likewise.

    Attributes:
      bos_id, eos_id: ids of the tokens that begin and end a text; None where the model has none.
      eos_ids: every id that ends a generation: eos_id and those of generation_config.json.

    Raises:
      ValueError: the directory has no tokenizer.json, or one of the files cannot be read.
    """

    def __init__(self, directory: str | pathlib.Path):
        self.directory = pathlib.Path(directory)
        self._config = read_json(self.directory / "tokenizer_config.json")
        model_config = read_json(self.directory / "config.json")
        generation_config = read_json(self.directory / "generation_config.json")
        self._tokenizer = _load_tokenizer(self.directory, self._config, model_config)
        named = _special_tokens(self._config, read_json(self.directory / "special_tokens_map.json"))
        self._special_tokens = {name: token for name, token in named.items() if self._id(token["content"]) is not None}
        _mark_special(self._tokenizer, self._special_tokens.values())

        self.bos_id = self._named_id("bos", generation_config, model_config)
        self.eos_id = self._named_id("eos", generation_config, model_config)
        self._pad_id = self._named_id("pad", generation_config, model_config)
        ends = {self.eos_id, *_ids((generation_config or model_config).get("eos_token_id"))}
        self.eos_ids = tuple(sorted(i for i in ends if i is not None))

        self._prefix, self._suffix = _added_around(self._tokenizer)
        if self._config.get("add_bos_token") and self.bos_id is not None and self.bos_id not in self._prefix:
            self._prefix = [self.bos_id, *self._prefix]
        if self._config.get("add_eos_token") and self.eos_id is not None and self.eos_id not in self._suffix:
            self._suffix = [*self._suffix, self.eos_id]

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included; a model's embedding may have more rows."""
        return self._tokenizer.get_vocab_size()

    @property
    def pad_id(self) -> int:
        """The id that fills what is left of a row: the pad token, else the eos token."""
        pad = self.eos_id if self._pad_id is None else self._pad_id
        if pad is None:
            raise ValueError(
                f"the tokenizer in {self.directory} has neither a pad nor an eos token to fill rows with: name a "
                "pad_token in its tokenizer_config.json"
            )
        return pad

    def encode(self, text: str, bos: bool | None = None, eos: bool | None = None) -> list[int]:
        """The token ids of a text.

        None leaves the beginning (end) to the tokenizer: the ids then equal those of transformers. `bos=True` makes
        them begin with what the tokenizer puts before a text, once, also where the text has it written in it; that is
        the bos token for a Llama and nothing for a GPT-2 or a Qwen. `eos=True` makes them end with the eos token, once,
        which few tokenizers do by themselves. False adds nothing.
        """
        ids = self._encoding(text).ids
        ids = self.end(ids) if eos else [*ids, *(self._suffix if eos is None else [])]
        return self.begin(ids) if bos else [*(self._prefix if bos is None else []), *ids]

    def begin(self, ids: list[int]) -> list[int]:
        """The ids, after what the tokenizer puts before a text unless it is there."""
        return ids if ids[: len(self._prefix)] == self._prefix else [*self._prefix, *ids]

    def end(self, ids: list[int]) -> list[int]:
        """The ids and the eos token (for a BERT, its [SEP]), unless it is there.

        Raises:
          ValueError: the tokenizer has no token for an end.
        """
        back = self._suffix or [i for i in [self.eos_id] if i is not None]
        if not back:
            raise ValueError(
                f"the tokenizer in {self.directory} has no eos token, which ends an example: name an existing token as "
                "eos_token in its tokenizer_config.json"
            )
        return ids if ids[-len(back) :] == back else [*ids, *back]

    def token_id(self, token: str) -> int:
        """The id of a token as it stands in the vocabulary, such as "<|im_end|>".

        Raises:
          ValueError: there is no such token.
        """
        if (found := self._id(token)) is None:
            near = suggest(token, self.special_texts)
            raise ValueError(f"the tokenizer in {self.directory} has no token {token!r}.{near}")
        return found

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text, nothing added, and for each the characters [start, end) of the text it stands for."""
        encoding = self._encoding(text)
        return encoding.ids, encoding.offsets

    def encode_continuation(self, text: str) -> list[int]:
        """The ids of a text that goes on from another one: without the space that some tokenizers put before a text."""
        before = self._encoding("\n").ids
        ids = self._encoding("\n" + text).ids
        return ids[len(before) :] if ids[: len(before)] == before else self._encoding(text).ids

    def cut(self, max_length: int, words: bool = False) -> Callable[..., tuple[tokenizers.Encoding, int]]:
        """A function that encodes a text, or a pair of them, as transformers does, special tokens included: cut to
        `max_length` tokens, of a pair the longer text first; also gives the length of the whole.

        words: a text is a list of words.
        """
        data = json.loads(self._tokenizer.to_str())
        before = data.get("pre_tokenizer") or {}
        if words and before.get("type") == "ByteLevel":
            before["add_prefix_space"] = True  # a word of a list is one in the middle of a text
        whole, cutting = (tokenizers.Tokenizer.from_str(json.dumps(data)) for _ in range(2))
        cutting.enable_truncation(max_length)

        def encode(text: Any, pair: Any = None) -> tuple[tokenizers.Encoding, int]:
            encoding = whole.encode(text, pair, is_pretokenized=words)
            length = len(encoding.ids)
            return (encoding if length <= max_length else cutting.encode(text, pair, is_pretokenized=words)), length

        return encode

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as text, by the model's own chat template; the template writes the special tokens too.

        A template that prints today's date (`strftime_now`) does so here as well.

        Raises:
          ValueError: the model has no chat template, or its template refuses the conversation.
        """
        import jinja2

        try:
            return self._chat_template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **{name: token["content"] for name, token in self._special_tokens.items()},
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"the chat template of {self.directory} refuses the conversation: {error}") from error

    @functools.cached_property
    def special_texts(self) -> tuple[str, ...]:
        """The special tokens as they stand in a text."""
        return tuple(token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special)

    @functools.cached_property
    def _chat_template(self) -> Any:
        return _compile_template(_chat_template_text(self.directory, self._config))

    def _encoding(self, text: str) -> tokenizers.Encoding:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def _named_id(self, name: str, *configs: dict[str, Any]) -> int | None:
        """The id of the bos, eos or pad token: by the tokenizer's own files, else by the model's."""
        if token := self._special_tokens.get(f"{name}_token"):
            return self._id(token["content"])
        ids = [i for config in configs for i in _ids(config.get(f"{name}_token_id")) if 0 <= i < self.vocab_size]
        return ids[0] if ids else None


def _ids(value: Any) -> list[int]:
    """A config's token id entry as a list: it may be missing, a number or a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _load_tokenizer(directory: pathlib.Path, config: dict[str, Any], model: dict[str, Any]) -> tokenizers.Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        only = ", only a SentencePiece tokenizer.model" if (directory / "tokenizer.model").is_file() else ""
        raise ValueError(
            f"{directory} has no tokenizer.json{only}. transformers writes one: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    is_llama = config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
    try:
        if is_llama and model.get("model_type") == "llama":
            tokenizer = tokenizers.Tokenizer.from_str(json.dumps(_as_llama(read_json(path), config)))
        else:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers package raises a bare Exception
        raise ValueError(f"{path} cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _as_llama(data: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """A SentencePiece Llama's tokenizer.json, rewritten to what transformers 5 makes of it.

    Its LlamaTokenizer takes the vocabulary, the merges and the post-processor from the file and builds the rest itself:
    no second space before a text that begins with one, and unknown characters dropped where there are no byte tokens.
    """
    byte_level = "ByteLevel" in json.dumps([data.get("pre_tokenizer"), data.get("decoder")])  # Llama 3 and later
    if byte_level or data["model"].get("type") != "BPE":
        return data
    prefix_space = config.get("add_prefix_space") is not False
    scheme = "never" if not prefix_space else "always" if config.get("legacy") else "first"
    pre_tokenizer = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix_space:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return data | {
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": data["model"] | {"unk_token": None, "fuse_unk": True, "byte_fallback": True, "dropout": None},
    }


def _special_tokens(config: dict[str, Any], special_map: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Named special tokens, {"bos_token": {"content": "<s>", ...}}; tokenizer_config.json goes before the older map."""
    found = {}
    for name, token in {**special_map, **config}.items():
        if name.endswith("_token") and isinstance(token, str | dict):
            found[name] = {"content": token} if isinstance(token, str) else token
    return found


def _mark_special(tokenizer: tokenizers.Tokenizer, tokens: Iterable[dict[str, Any]]) -> None:
    """Makes the named tokens special (one piece in a text, skipped by decode), which some tokenizer.json forget."""
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for token in tokens:
        added = known.get(token["content"])
        if added is None:
            flags = {flag: bool(token.get(flag)) for flag in ("single_word", "lstrip", "rstrip", "normalized")}
            added = tokenizers.AddedToken(token["content"], special=True, **flags)
        added.special = True
        tokenizer.add_special_tokens([added])


def _added_around(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer's post-processor puts before and after every text."""
    for probe in ("a", "0", ".", *tokenizer.get_vocab()):
        bare = tokenizer.encode(probe, add_special_tokens=False).ids
        if bare:
            whole = tokenizer.encode(probe).ids
            at = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
            return whole[:at], whole[at + len(bare) :]
    return [], []


def _chat_template_text(directory: pathlib.Path, config: dict[str, Any]) -> str:
    """The chat template: of chat_template.jinja, else tokenizer_config.json, else chat_template.json."""
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    template = config.get("chat_template") or read_json(directory / "chat_template.json").get("chat_template")
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


def _compile_template(text: str) -> Any:
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


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One document for training.

    Attributes:
      tokens: [n] int32.
      loss_mask: [n] bool, true where the model is asked to predict this token. Nothing predicts the first one.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a model is asked in an evaluation by generation.

    Attributes:
      tokens: to continue.
      prompt: their text.
      expected: the text that should follow. Compare without the spaces around it: some tokenizers lose them.
      record: the record's name.
    """

    tokens: list[int]
    prompt: str
    expected: str
    record: str


def encode_record(record: Mapping[str, Any], data: ConfigDict, tokenizer: Tokenizer, *, name: str) -> Example:
    """The tokens of a record and which of them carry a loss, by `data.format` (`data` is config.data).

    text: the text between bos (where the tokenizer adds it by itself) and eos; a loss on all of it. An empty text has
      no loss.
    completion: bos, prompt, completion, eos; a loss on the completion and the eos. The prompt's tokens are those of the
      prompt alone, what a generation starts from, and the completion's are those it has after the prompt. Where
      tokenizing both together would merge across their boundary (Hugging Face TRL then warns and trains on the merged
      tokens), the completion is tokenized by itself.
    chat: the conversation by the model's chat template; a loss on every assistant turn, its end-of-turn token included.

    Raises:
      ValueError: a field is missing or is not text; a template or a conversation that cannot be used. `name`, what to
        call the record, is in the message.
    """
    if data.format == "text":
        return _encode_text(record, data, tokenizer, name)
    if data.format == "completion":
        prompt, completion = _prompt_and_completion(record, data, tokenizer, name)[1:]
        return _example([*prompt, *completion], [False] * len(prompt) + [True] * len(completion))
    if data.format == "chat":
        return _encode_chat(_messages(record, data, name), tokenizer, name)
    raise ValueError(f'config.data.format = {data.format!r} must be "text", "completion" or "chat"')


def encode_prompt(record: Mapping[str, Any], data: ConfigDict, tokenizer: Tokenizer, *, name: str) -> Prompt:
    """What a generation starts from for this record, and the text that should follow.

    completion: the prompt; the completion. chat: what precedes the last assistant turn; that turn's content.
    text: the first half of the tokens, 32 of them at most; the rest of the text.

    Raises:
      ValueError: as `encode_record`; also a conversation without an assistant turn.
    """
    if data.format == "completion":
        expected, ids, _ = _prompt_and_completion(record, data, tokenizer, name)
    elif data.format == "chat":
        messages = _messages(record, data, name)
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
        if last is None or not isinstance(messages[last].get("content"), str):
            raise ValueError(f"{name}: the conversation has no assistant turn with a text to expect")
        text = _render(tokenizer, messages[:last], name, add_generation_prompt=True)
        ids, expected = tokenizer.encode(text, bos=False, eos=False), messages[last]["content"]
    else:
        whole = encode_record(record, data, tokenizer, name=name).tokens.tolist()
        cut = max(1, min(TEXT_PROMPT_TOKENS, len(whole) // 2))
        ids, expected = whole[:cut], tokenizer.decode(whole[cut:])
    return Prompt(ids, tokenizer.decode(ids), expected, name)


def _example(tokens: Sequence[int], loss_mask: Sequence[bool] | np.ndarray) -> Example:
    return Example(np.asarray(tokens, np.int32), np.asarray(loss_mask, bool))


def _encode_text(record: Mapping[str, Any], data: ConfigDict, tokenizer: Tokenizer, name: str) -> Example:
    text = field_of(record, data.text_field, "text_field", name)
    if not isinstance(text, str):
        raise ValueError(f"{name}: the field {data.text_field!r} must hold text, and holds {type(text).__name__}")
    ids = tokenizer.encode(text, bos=False, eos=False)
    tokens = tokenizer.end(tokenizer.begin(ids))
    return _example(tokens, np.full(len(tokens), bool(ids)))


def _prompt_and_completion(
    record: Mapping[str, Any], data: ConfigDict, tokenizer: Tokenizer, name: str
) -> tuple[str, list[int], list[int]]:
    """The completion's text, the prompt's tokens, and the completion's tokens with their eos."""
    prompt = fill(data.prompt_template, record, data, name)
    completion = fill(data.completion_template, record, data, name)
    before = tokenizer.encode(prompt, bos=True, eos=False)
    both = tokenizer.encode(prompt + completion, bos=True, eos=False)
    after = both[len(before) :] if both[: len(before)] == before else tokenizer.encode_continuation(completion)
    return completion, before, tokenizer.end(after)


def _encode_chat(messages: list[Message], tokenizer: Tokenizer, name: str) -> Example:
    """The rendered conversation; the assistant's turns are found by rendering the messages up to each of them."""
    whole = _render(tokenizer, messages, name)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:i], name, add_generation_prompt=True)
        after = _render(tokenizer, messages[: i + 1], name)
        if not (whole.startswith(after) and after.startswith(before)):
            raise ValueError(
                f"{name}: the chat template of {tokenizer.directory} writes the conversation up to message {i + 1} (an "
                "assistant turn) differently once more messages follow, so the assistant's part cannot be told. Split "
                'such conversations into one record for each answer, or use config.data.format = "completion"'
            )
        # What stands after the end-of-turn token, usually a line break, belongs to the template and not to the answer.
        answer = after.rstrip()
        spans.append((len(before), len(answer) if answer.endswith(tokenizer.special_texts) else len(after)))
    tokens, offsets = tokenizer.encode_with_offsets(whole)
    ends = np.array([end for _, end in offsets], int)
    mask = np.zeros(len(tokens), bool)
    for start, end in spans:  # a token that begins before an answer and ends inside it counts as part of the answer
        mask |= (start < ends) & (ends <= end)
    return _example(tokens, mask)


def _render(
    tokenizer: Tokenizer, messages: Sequence[Message], name: str, *, add_generation_prompt: bool = False
) -> str:
    try:
        return tokenizer.chat(messages, add_generation_prompt)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _messages(record: Mapping[str, Any], data: ConfigDict, name: str) -> list[Message]:
    messages = field_of(record, data.messages_field, "messages_field", name)
    if isinstance(messages, Mapping):  # TFDS stores a sequence of dicts as a dict of sequences
        messages = [dict(zip(messages, values, strict=True)) for values in zip(*messages.values(), strict=True)]
    good = isinstance(messages, list | tuple) and messages
    if not good or not all(isinstance(m, Mapping) and "role" in m and "content" in m for m in messages):
        raise ValueError(
            f'{name}: the field {data.messages_field!r} must hold a list of messages {{"role": ..., "content": ...}}, '
            f"and holds {str(messages)[:80]!r}"
        )
    return list(messages)


def fill(template: str, record: Mapping[str, Any], data: ConfigDict, name: str) -> str:
    """The template with the record's fields in it."""
    try:
        keys = [key for _, key, _, _ in string.Formatter().parse(template) if key is not None]
    except ValueError as error:
        raise ValueError(f"the template {template!r}: {error}. A brace itself is written {{{{ or }}}}") from error
    values = {key: _template_value(key, record, data, name) for key in keys}
    try:
        return template.format_map(values)
    except ValueError as error:  # a format that does not suit the value, such as {label:d} for a text
        raise ValueError(f"{name}: the template {template!r}: {error}") from error


def _template_value(key: str, record: Mapping[str, Any], data: ConfigDict, name: str) -> str | int | float:
    """The value of {key}: a field of the record, "prompt" and "completion" standing for those that the config names."""
    setting = f"{key}_field" if key in ("prompt", "completion") else "prompt_template or completion_template"
    field = data[setting] if key in ("prompt", "completion") else key
    value = field_of(record, field, setting, name)
    if not isinstance(value, str | int | float):
        raise ValueError(f"{name}: the field {field!r} must hold text or a number, and holds {type(value).__name__}")
    return value


def field_of(record: Mapping[str, Any], field: str, setting: str, name: str) -> Any:
    """A field of a record; config.data.`setting` names it."""
    if field not in record:
        raise ValueError(
            f"{name}: the record has no field {field!r} (named by config.data.{setting}).{suggest(field, record)} "
            f"It has {', '.join(record) or 'no field at all'}"
        )
    return record[field]
