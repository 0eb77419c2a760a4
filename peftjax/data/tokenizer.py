"""The tokenizer of a model directory: text to token ids and back."""

import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tokenizers

from peftjax.core.paths import suggest
from peftjax.data.chat_template import Message, chat_template_text, compile_template
from peftjax.io.hf_files import read_json_if_any


def load_tokenizer(directory: str | pathlib.Path) -> "Tokenizer":
    """The tokenizer of a Hugging Face model directory.

    Example:
        >>> import peftjax
        >>> from peftjax.io.hf_files import resolve
        >>> tokenizer = peftjax.load_tokenizer(resolve("embedded"))  # a directory
        >>> tokenizer.decode(tokenizer.encode("Hello"))
        'Hello'
    """
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
        return compile_template(chat_template_text(self.directory, self._config))

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
            tokenizer = tokenizers.Tokenizer.from_str(json.dumps(_as_llama(read_json_if_any(path), config)))
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
