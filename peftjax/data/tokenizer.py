"""The tokenizer of a model directory: text to token ids and back."""

import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tokenizers

from peftjax.core.errors import UserError
from peftjax.core.paths import suggest
from peftjax.data.chat_template import Message, chat_template_text, compile_template
from peftjax.io.hf_files import SIDE_FILES, read_json_if_any, resolve

Text = str | Sequence[str]  # a text, or its words


def load_tokenizer(path: str | pathlib.Path, revision: str | None = None) -> "Tokenizer":
    """Load the tokenizer of a Hugging Face model.

    Args:
        path: A directory with a tokenizer.json, a hub id, or "embedded", the bundled model.
        revision: Branch, tag or commit of a hub id.

    Raises:
        UserError: There is no such directory or hub model, it has no tokenizer.json, or a file cannot be read.

    Examples:
        >>> import peftjax
        >>> tokenizer = peftjax.load_tokenizer("embedded")
        >>> tokenizer.decode(tokenizer.encode("Hello"))
        'Hello'
    """
    directory = pathlib.Path(path).expanduser()
    if str(path) == "embedded" or revision is not None or not directory.is_dir():
        directory = resolve(path, revision, ("config.json", *SIDE_FILES))
    return Tokenizer(directory)


class Tokenizer:
    """Convert text to token ids and back, as transformers does with the same files.

    The tokenizer is read from tokenizer.json, tokenizer_config.json, special_tokens_map.json, generation_config.json,
    config.json and the chat template. Padding and truncation in tokenizer.json are disabled. The bos token is added if the
    post-processor in tokenizer.json adds it, as in transformers, or if tokenizer_config.json sets add_bos_token; the eos
    token likewise.

    Args:
        directory: A directory with a tokenizer.json.

    Attributes:
        directory: The directory.
        bos_id: Id of the token that begins a text; None if there is none.
        eos_id: Id of the token that ends a text; None if there is none.
        eos_ids: All ids that end a generated text: `eos_id`, and those in generation_config.json.

    Raises:
        UserError: The directory has no tokenizer.json, or a file cannot be read.
    """

    def __init__(self, directory: str | pathlib.Path):
        self.directory = pathlib.Path(directory)
        self._config = read_json_if_any(self.directory / "tokenizer_config.json")
        model_config = read_json_if_any(self.directory / "config.json")
        generation_config = read_json_if_any(self.directory / "generation_config.json")
        self._tokenizer = _load_tokenizer(self.directory, self._config, model_config)
        named = _special_tokens(self._config, read_json_if_any(self.directory / "special_tokens_map.json"))
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
        """The number of tokens, including added ones; a model's embedding may have more rows."""
        return self._tokenizer.get_vocab_size()

    @property
    def pad_id(self) -> int:
        """The id that pads a row: that of the pad token, or else of the eos token."""
        pad = self.eos_id if self._pad_id is None else self._pad_id
        if pad is None:
            raise UserError(
                f"the tokenizer in {self.directory} has neither a pad nor an eos token, so rows cannot be padded; set "
                "pad_token in its tokenizer_config.json"
            )
        return pad

    def encode(self, text: str, bos: bool | None = None, eos: bool | None = None) -> list[int]:
        """Convert a text to token ids.

        With the defaults, the ids equal those of transformers.

        Args:
            text: The text.
            bos: True: begin with the tokenizer's prefix (see `begin`); False: add nothing before the text; None: add the
                prefix even if the text begins with it.
            eos: True: end with the eos token (see `end`); False: add nothing after the text; None: add what the
                tokenizer adds by default, for most tokenizers nothing.
        """
        ids = self._encoding(text).ids
        ids = self.end(ids) if eos else [*ids, *(self._suffix if eos is None else [])]
        return self.begin(ids) if bos else [*(self._prefix if bos is None else []), *ids]

    def begin(self, ids: list[int]) -> list[int]:
        """Prepend the tokenizer's prefix, unless the ids begin with it.

        The prefix is what the tokenizer adds before a text: for Llama the bos token, for GPT-2 and Qwen nothing.
        """
        return ids if ids[: len(self._prefix)] == self._prefix else [*self._prefix, *ids]

    def end(self, ids: list[int]) -> list[int]:
        """Append the eos token (for BERT, [SEP]), unless the ids end with it.

        Raises:
            UserError: The tokenizer has no such token.
        """
        back = self._suffix or [i for i in [self.eos_id] if i is not None]
        if not back:
            raise UserError(
                f"the tokenizer in {self.directory} has no eos token, so examples cannot be ended; set eos_token in its "
                "tokenizer_config.json to an existing token"
            )
        return ids if ids[-len(back) :] == back else [*ids, *back]

    def token_id(self, token: str) -> int:
        """Return the id of a token as it is written in the vocabulary, such as "<|im_end|>".

        Raises:
            UserError: There is no such token.
        """
        if (found := self._id(token)) is None:
            near = suggest(token, self.special_texts)
            raise UserError(f"the tokenizer in {self.directory} has no token {token!r}.{near}")
        return found

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Convert a text to token ids without additions.

        Returns:
            The ids, and for each of them the range (start, end) of the characters of the text that it stands for.
        """
        encoding = self._encoding(text)
        return encoding.ids, encoding.offsets

    def encode_continuation(self, text: str) -> list[int]:
        """Convert a text that continues another one, without the space that some tokenizers add before a text."""
        before = self._encoding("\n").ids
        ids = self._encoding("\n" + text).ids
        return ids[len(before) :] if ids[: len(before)] == before else self._encoding(text).ids

    def cut(self, max_length: int, words: bool = False) -> Callable[..., tuple[tokenizers.Encoding, int]]:
        """Return a function that encodes a text or a pair of texts with special tokens, as transformers does.

        Args:
            max_length: The maximum number of tokens. The function truncates longer inputs, the longer text of a pair
                first.
            words: Whether a text is a list of words.

        Returns:
            A function from a text, and optionally a second one, to the encoding and the number of tokens before truncation.
        """
        data = json.loads(self._tokenizer.to_str())
        before = data.get("pre_tokenizer") or {}
        if words and before.get("type") == "ByteLevel":
            before["add_prefix_space"] = True  # a word in a list is not at the beginning of a text
        whole, cutting = (tokenizers.Tokenizer.from_str(json.dumps(data)) for _ in range(2))
        cutting.enable_truncation(max_length)

        def encode(text: Text, pair: Text | None = None) -> tuple[tokenizers.Encoding, int]:
            encoding = whole.encode(text, pair, is_pretokenized=words)
            length = len(encoding.ids)
            return (encoding if length <= max_length else cutting.encode(text, pair, is_pretokenized=words)), length

        return encode

    def decode(self, ids: Iterable[int]) -> str:
        """Convert token ids to text, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Render a conversation with the model's chat template, which also writes the special tokens.

        A template may write the current date (`strftime_now`).

        Args:
            messages: The conversation, each message {"role": ..., "content": ...}.
            add_generation_prompt: Whether to end with the beginning of an assistant turn.

        Raises:
            UserError: The model has no chat template, or the template rejects the conversation.
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
            raise UserError(f"the chat template of {self.directory} rejects the conversation: {error}") from error

    @functools.cached_property
    def special_texts(self) -> tuple[str, ...]:
        """The special tokens, as they are written in a text."""
        return tuple(token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special)

    @functools.cached_property
    def _chat_template(self) -> Any:
        return compile_template(chat_template_text(self.directory, self._config))

    def _encoding(self, text: str) -> tokenizers.Encoding:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def _named_id(self, name: str, *configs: dict[str, Any]) -> int | None:
        """The id of the bos, eos or pad token, from the tokenizer's files or else from the configs."""
        if token := self._special_tokens.get(f"{name}_token"):
            return self._id(token["content"])
        ids = [i for config in configs for i in _ids(config.get(f"{name}_token_id")) if 0 <= i < self.vocab_size]
        return ids[0] if ids else None


def _ids(value: Any) -> list[int]:
    """A config's token ids as a list; the value may be None, a number or a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _load_tokenizer(directory: pathlib.Path, config: dict[str, Any], model: dict[str, Any]) -> tokenizers.Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        only = ", only a SentencePiece tokenizer.model" if (directory / "tokenizer.model").is_file() else ""
        raise UserError(
            f"{directory} has no tokenizer.json{only}. Write one with transformers: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    is_llama = config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
    try:
        if is_llama and model.get("model_type") == "llama":
            tokenizer = tokenizers.Tokenizer.from_str(json.dumps(_as_llama(read_json_if_any(path), config)))
        else:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises a bare Exception
        raise UserError(f"{path} cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _as_llama(data: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Change the tokenizer.json of a Llama with a SentencePiece vocabulary as LlamaTokenizer of transformers 5 does.

    LlamaTokenizer takes only the vocabulary, the merges and the post-processor from the file. The rest of it adds no second
    space before a text that begins with one, and drops unknown characters if there are no byte tokens.
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
    """The special tokens by name, {"bos_token": {"content": "<s>", ...}}; tokenizer_config.json has precedence."""
    found = {}
    for name, token in {**special_map, **config}.items():
        if name.endswith("_token") and isinstance(token, str | dict):
            found[name] = {"content": token} if isinstance(token, str) else token
    return found


def _mark_special(tokenizer: tokenizers.Tokenizer, tokens: Iterable[dict[str, Any]]) -> None:
    """Mark tokens as special: never split in a text, and skipped by `decode`. Some tokenizer.json files omit this."""
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for token in tokens:
        added = known.get(token["content"])
        if added is None:
            flags = {flag: bool(token.get(flag)) for flag in ("single_word", "lstrip", "rstrip", "normalized")}
            added = tokenizers.AddedToken(token["content"], special=True, **flags)
        added.special = True
        tokenizer.add_special_tokens([added])


def _added_around(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer's post-processor adds before and after every text."""
    for probe in ("a", "0", ".", *tokenizer.get_vocab()):
        bare = tokenizer.encode(probe, add_special_tokens=False).ids
        if bare:
            whole = tokenizer.encode(probe).ids
            at = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
            return whole[:at], whole[at + len(bare) :]
    return [], []
