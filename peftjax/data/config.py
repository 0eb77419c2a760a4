"""The section `data` of the configuration."""

import dataclasses

from peftjax.core.config import field
from peftjax.core.errors import UserError
from peftjax.data.chat_template import read_template

CONVERSATIONS = ("chat", "sharegpt", "alpaca")  # the formats that a chat template renders


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which records are read, which of their fields are used, and how they become rows of tokens or pixels."""

    train: tuple[str, ...] = field(
        (),
        "Training sources: tfds:NAME/SPLIT, hf:NAME/SPLIT, FILE.jsonl (also .jsonl.gz, .jsonl.zst, .json, .csv, .tsv, .parquet), a "
        "directory of such files or images:DIR, each optionally followed by @WEIGHT",
    )
    eval: tuple[str, ...] = field((), "Held-out sources, in the same notation")
    tfds_data_dir: str = field("", "Directory of prepared TFDS datasets; empty: the default of TFDS")
    map: str = field(
        "",
        "Function that converts each record before its fields are read: MODULE:FUNCTION or FILE.py:FUNCTION; "
        "empty: none",
    )
    format: str = field(
        "text",
        "Record format for causal_lm: a single text, a prompt and its completion, chat messages, or the fields of ShareGPT "
        "or Alpaca",
        choices=("text", "completion", "chat", "sharegpt", "alpaca"),
    )
    train_on: str = field(
        "completions",
        "Tokens in the loss: all, those of completions or answers, or only those of the last answer; format text always uses all",
        choices=("all", "completions", "last"),
    )
    text_field: str = field("text", "Field with the text, for format text")
    prompt_field: str = field("prompt", "Field inserted for {prompt} in a template")
    completion_field: str = field("completion", "Field inserted for {completion} in a template")
    messages_field: str = field(
        "messages", "Field with the list of messages, for format chat; for sharegpt: conversations"
    )
    chat_template: str = field(
        "",
        "Chat template in place of the tokenizer's: a file (.jinja) or the Jinja text itself; empty: the tokenizer's",
    )
    prompt_template: str = field(
        "{prompt}", "Format string over the record's fields: the prompt, or the input of seq2seq and classification"
    )
    completion_template: str = field(
        "{completion}", "Format string over the record's fields: the target of format completion and of seq2seq"
    )
    pair_template: str = field("", "Format string over the record's fields: the second text of a pair; empty: no pair")
    label_field: str = field("label", "Field with the label: a class (index or name), a number, or one class per word")
    words_field: str = field("words", "Field with the list of words, for token_classification")
    image_field: str = field("image", "Field with the image, for image_classification")
    max_length: int = field(512, "Maximum sequence length in tokens", low=2)
    max_target_length: int = field(128, "Maximum target length of seq2seq in tokens", low=2)
    too_long: str = field(
        "truncate",
        "What to do with records longer than max_length or max_target_length; split: train on all of a long text, in pieces; "
        "for format text",
        choices=("truncate", "drop", "split", "error"),
    )
    pack: bool = field(False, "Pack several records into one sequence; they do not attend to each other")
    shuffle: bool = field(True, "Reshuffle the records every epoch")
    workers: int = field(0, "Number of threads that read ahead; 0: read in the training loop", low=0)

    def __post_init__(self) -> None:
        if not self.chat_template:
            return
        if self.format not in CONVERSATIONS:
            raise UserError(
                f"data.chat_template renders conversations, and data.format={self.format!r} has none; set data.format to "
                f"{', '.join(CONVERSATIONS[:-1])} or {CONVERSATIONS[-1]}"
            )
        # A run records the text, not the file, which may change.
        object.__setattr__(self, "chat_template", read_template(self.chat_template, "data.chat_template"))
