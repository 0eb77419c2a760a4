"""The tokenizer of a model directory: text to token ids and back. transformers reads the files."""

import contextlib
import functools
import itertools
import json
import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tokenizers

from peftjax.core import cli
from peftjax.core.errors import UserError
from peftjax.core.home import expand
from peftjax.core.paths import suggest
from peftjax.data.chat_template import ChatTemplate, Message, Tools, Variables, read_template
from peftjax.io.hf_files import SIDE_FILES, VOCABULARIES, check_files, find_model
from peftjax.io.json_files import read_json_if_any

TextOrWords = str | Sequence[str]  # a text, or its words


def load_tokenizer(
    path: str | pathlib.Path, revision: str | None = None, chat_template: str | pathlib.Path | None = None
) -> "Tokenizer":
    """Load the tokenizer of a Hugging Face model.

    Args:
        path: A directory with the files of a tokenizer, a hub id, or "embedded", the bundled model.
        revision: Branch, tag or commit of a hub id.
        chat_template: A chat template in place of the tokenizer's: a Jinja text, or a file with one.

    Raises:
        UserError: There is no such directory or hub model, it has no tokenizer, or a file cannot be read.

    Examples:
        >>> import peftjax
        >>> tokenizer = peftjax.load_tokenizer("embedded")
        >>> tokenizer.decode(tokenizer.encode("Hello"))
        'Hello'
    """
    directory = expand(path)
    if str(path) == "embedded" or revision is not None or not directory.is_dir():
        directory = find_model(path, revision, ("config.json", *SIDE_FILES))
    return Tokenizer(directory, read_template(chat_template) if chat_template else "")


class Tokenizer:
    """Convert text to token ids and back, as transformers does with the same files.

    `AutoTokenizer` of transformers loads the tokenizer, with its added tokens and its chat template. Padding and truncation
    are disabled. The bos token is added before a text if the tokenizer's post-processor adds it, or if
    tokenizer_config.json sets add_bos_token; the eos token after a text likewise. A bos, eos or pad token that the
    tokenizer's files do not name is taken from generation_config.json or config.json.

    Args:
        directory: A directory with the files of a tokenizer.
        chat_template: The text of a chat template in place of the tokenizer's; empty: the tokenizer's.

    Attributes:
        directory: The directory.
        bos_id: Id of the token that begins a text; None if there is none.
        eos_id: Id of the token that ends a text; None if there is none.

    Raises:
        UserError: The directory has no tokenizer, or a file cannot be read.
    """

    def __init__(self, directory: str | pathlib.Path, chat_template: str = ""):
        self.directory, self._given_template = pathlib.Path(directory), chat_template
        check_files(self.directory, SIDE_FILES)
        model_config = read_json_if_any(self.directory / "config.json")
        generation_config = read_json_if_any(self.directory / "generation_config.json")
        self._theirs = _load(self.directory)
        self._tokenizer: tokenizers.Tokenizer = self._theirs.backend_tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

        self.bos_id = self._named_id("bos", generation_config, model_config)
        self.eos_id = self._named_id("eos", generation_config, model_config)
        rows = (model_config.get("text_config") or model_config).get("vocab_size") or self.vocab_size
        pad = self._named_id("pad", generation_config, model_config)
        self._pad_id = None if pad is None or pad >= rows else pad  # transformers adds a pad token that is missing
        named = [i for i in _ids((generation_config or model_config).get("eos_token_id")) if i >= 0]
        own = [] if self.eos_id is None or self.eos_id < 0 else [self.eos_id]
        self._eos_ids = tuple(sorted({*own, *named}))
        self._text_eos_ids = tuple(named or own)
        self._prefix, self._suffix = _added_around(self._tokenizer)
        self._of_encoder_decoder = bool(model_config.get("is_encoder_decoder"))
        # transformers 5 no longer reads these two fields if there is a tokenizer.json; transformers 4 did.
        config = read_json_if_any(self.directory / "tokenizer_config.json")
        if config.get("add_bos_token") and self.bos_id is not None and self.bos_id not in self._prefix:
            self._prefix = [self.bos_id, *self._prefix]
        if config.get("add_eos_token") and self.eos_id is not None and self.eos_id not in self._suffix:
            self._suffix = [*self._suffix, self.eos_id]

    @property
    def vocab_size(self) -> int:
        """The number of tokens, including added ones; a model's embedding may have more rows."""
        return self._tokenizer.get_vocab_size()

    @property
    def pad_id(self) -> int:
        """The id that pads a row: the pad token's, or the eos token's if the model has no row for a pad token."""
        pad = self.eos_id if self._pad_id is None else self._pad_id
        if pad is None:
            raise UserError(
                f"the tokenizer in {self.directory} has neither a pad nor an eos token, so rows cannot be padded; set "
                "pad_token in its tokenizer_config.json"
            )
        return pad

    def encode(self, text: str, bos: bool | None = None, eos: bool | None = None) -> list[int]:
        """Convert a text to token ids.

        With the defaults, the ids match transformers.

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

    def encode_prompt(self, prompt: str, chat: bool = False) -> list[int]:
        """Convert a prompt to the tokens that generation starts from.

        A decoder continues the prompt, so no eos token is added. An encoder-decoder reads it as it reads any text: T5's
        tokenizer ends it with the eos token.

        Args:
            prompt: The prompt.
            chat: Whether it is a user message, to be rendered with the chat template.

        Raises:
            UserError: The model has no chat template, or the template rejects the message.
        """
        if chat:
            return self.encode(self.chat([{"role": "user", "content": prompt}], True), bos=False, eos=False)
        return self.encode(prompt) if self._of_encoder_decoder else self.encode(prompt, bos=True, eos=False)

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
        found: int | None = self._tokenizer.token_to_id(token)
        if found is None:
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
            It raises a UserError for a longer input if the special tokens alone have the maximum length.
        """
        data = json.loads(self._tokenizer.to_str())
        before = data.get("pre_tokenizer") or {}
        if words and before.get("type") == "ByteLevel":
            before["add_prefix_space"] = True  # a word in a list is not at the beginning of a text
        whole, cutting = (tokenizers.Tokenizer.from_str(json.dumps(data)) for _ in range(2))
        cutting.enable_truncation(max_length)

        def encode(text: TextOrWords, pair: TextOrWords | None = None) -> tuple[tokenizers.Encoding, int]:
            with self._reported(text):
                encoding = whole.encode(text, pair, is_pretokenized=words)
            length = len(encoding.ids)
            if length <= max_length:
                return encoding, length
            added = whole.num_special_tokens_to_add(pair is not None)
            if added >= max_length:  # the library would not truncate at all
                raise UserError(
                    f"data.max_length={max_length} leaves no room for text: the tokenizer in {self.directory} adds "
                    f"{added} special tokens; use at least {added + 1}"
                )
            return cutting.encode(text, pair, is_pretokenized=words), length

        return encode

    def decode(self, ids: Iterable[int]) -> str:
        """Convert token ids to text, without special tokens."""
        return self._theirs.decode([int(i) for i in ids], skip_special_tokens=True)

    def chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Tools = None,
        variables: Variables = None,
    ) -> str:
        """Render a conversation with the model's chat template, which also writes the special tokens.

        A template may write the current date (`strftime_now`).

        Args:
            messages: The conversation, each message {"role": ..., "content": ...}.
            add_generation_prompt: Whether to end with the beginning of an assistant turn.
            tools: JSON schemas of functions that the assistant can call.
            variables: Other variables of the template, such as {"enable_thinking": False}.

        Raises:
            UserError: The model has no chat template, or the template rejects the conversation.
        """
        return self.template.render(messages, add_generation_prompt, tools, variables)

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The chat template; false if there is none."""
        return ChatTemplate(self._theirs, self.directory, self._given_template)

    @functools.cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """All ids that end an answer: `eos_id`, the ids in generation_config.json, and the end-of-turn token's.

        The end-of-turn token is the special token that the chat template writes after an answer. Base models such as Qwen3's
        name it in their template only, and learn it in training.
        """
        after = self.template.answer_end.lstrip()
        end_of_turn = max((text for text in self.special_texts if after.startswith(text)), key=len, default=None)
        return tuple(sorted({*self._eos_ids, *([self.token_id(end_of_turn)] if end_of_turn else [])}))

    def stop_ids(self, chat: bool) -> tuple[int, ...]:
        """Return the ids that end the continuation of a text, or the answer to a chat prompt.

        As in `generate` of transformers, a text ends at the eos tokens of generation_config.json, or of config.json if there is no
        such file; at `eos_id` if they name none. An answer in a chat ends at `eos_ids`.
        """
        return self.eos_ids if chat else self._text_eos_ids

    @functools.cached_property
    def eos_texts(self) -> tuple[str, ...]:
        """The eos tokens that the tokenizer and generation_config.json name, as they are written in a text."""
        return tuple(text for i in self._eos_ids if (text := self._tokenizer.id_to_token(i)))

    @functools.cached_property
    def special_texts(self) -> tuple[str, ...]:
        """The special tokens, as they are written in a text."""
        return tuple(token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special)

    def _encoding(self, text: str) -> tokenizers.Encoding:
        with self._reported(text):
            return self._tokenizer.encode(text, add_special_tokens=False)

    @contextlib.contextmanager
    def _reported(self, text: TextOrWords) -> Iterator[None]:
        """Report a failure of the tokenizers library, which raises plain exceptions, as an error in the tokenizer's files."""
        try:
            yield
        except TypeError as error:  # a lone surrogate: how Python reads an argument that is not UTF-8
            raise UserError(f"cannot encode {str(text)[:40]!r}: it is not valid Unicode") from error
        except Exception as error:  # the only type that the library raises
            raise UserError(
                f"the tokenizer in {self.directory} cannot encode {str(text)[:40]!r}: {error}. Its vocabulary "
                "probably has no token for unknown text; set unk_token in tokenizer.json to a token of the vocabulary"
            ) from error

    def _named_id(self, name: str, *configs: dict[str, Any]) -> int | None:
        """The id of the bos, eos or pad token, from the tokenizer's files or else from the configs."""
        token_id: int | None = getattr(self._theirs, f"{name}_token_id")
        ids = [i for config in configs for i in _ids(config.get(f"{name}_token_id")) if 0 <= i < self.vocab_size]
        return token_id if token_id is not None else ids[0] if ids else None


def _ids(value: Any) -> list[int]:
    """A config's token ids as a list; the value may be a number or a list. Anything but integers is ignored."""
    return [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]


def _load(directory: pathlib.Path) -> Any:
    """The tokenizer that `AutoTokenizer` loads from a directory, without running code from it."""
    if not any(file.is_file() for pattern in VOCABULARIES for file in directory.glob(pattern)):
        raise UserError(
            f"{directory} has no tokenizer: none of the files {', '.join(VOCABULARIES)}. Write one with transformers: "
            "AutoTokenizer.from_pretrained(BASE).save_pretrained(DIR)"
        )
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # one is that torch is not installed
    with _without_torch():
        from transformers import AddedToken

    config = read_json_if_any(directory / "tokenizer_config.json")
    try:
        untyped = {  # transformers expects a "__type", which some files lack
            name: AddedToken(**(token | {"special": True}))
            for name, token in config.items()
            if name.endswith("_token") and isinstance(token, dict) and "__type" not in token
        }
        theirs = _from_pretrained(directory, "auto_map" in config, untyped)
    except Exception as error:  # of any kind: from the tokenizers library, for a missing package, from JSON
        raise UserError(
            f"the tokenizer in {directory} cannot be loaded by transformers: {' '.join(str(error).split())}"
        ) from error
    if not theirs.is_fast:
        raise UserError(
            f"the tokenizer in {directory} is a {type(theirs).__name__}, which has no tokenizer.json. Write one with "
            "transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    return theirs


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """In one of our commands, transformers is imported as if torch were not installed: no command needs it.

    Other programs may use the models of transformers, so torch stays visible to them.
    """
    hidden = cli.running and not sys.modules.keys() & {"torch", "transformers"}
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # as where it is not installed
    try:
        yield
    finally:
        if hidden:
            del sys.modules["torch"]


def _from_pretrained(directory: pathlib.Path, own_code: bool, options: dict[str, Any]) -> Any:
    """The tokenizer that transformers loads; from a directory with its own tokenizer class, the one in tokenizer.json."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **options)
    except ValueError:  # transformers has no such class and would have to run the directory's code
        if not own_code or not (directory / "tokenizer.json").is_file():
            raise
    theirs = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True, **options)
    warnings.warn(
        f"the tokenizer in {directory} contains its own Python code (auto_map in tokenizer_config.json), which is not run; "
        "only tokenizer.json is used",
        stacklevel=2,
    )
    return theirs


def _added_around(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer's post-processor adds before and after every text."""
    tokens = filter(None, map(tokenizer.id_to_token, range(tokenizer.get_vocab_size())))
    for probe in itertools.chain(("a", "0", "."), tokens):
        try:
            bare = tokenizer.encode(probe, add_special_tokens=False).ids
        except Exception:  # the only type that the library raises: the vocabulary has no unknown token
            continue
        if bare:
            whole = tokenizer.encode(probe).ids
            at = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
            return whole[:at], whole[at + len(bare) :]
    return [], []
