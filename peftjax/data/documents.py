"""Documents, which are records as arrays, and the protocol of an encoder, which makes them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from peftjax.data.records import Prompt

Arrays = dict[str, np.ndarray]
Row = dict[str, Any]  # arrays of one length by name; "notes" has the `Note` of each of its documents


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """A record as arrays.

    Attributes:
        arrays: The arrays of one example by name. One is called `loss_weights`: one weight of the loss, or one for each
            token. It is 0 in a row of padding.
        size: Its number of tokens, or 1 for an image.
        too_long: What exceeds the configured length, for a message; empty if nothing does.
    """

    arrays: Arrays
    size: int
    too_long: str = ""


@dataclasses.dataclass(frozen=True)
class Text:
    """Arrays of a document with one entry for each token of the same text; they are padded to the same length.

    Attributes:
        names: The names of the arrays.
        ratio: The ratio of two neighboring lengths.
    """

    names: tuple[str, ...]
    ratio: int = 2


class RecordEncoder(Protocol):
    """Turns records into documents. A task is one.

    Attributes:
        unit: What a document consists of, such as "tokens"; without texts, what a document is, such as "images".
        packs: Whether several documents may share a row.
        texts: The texts of a document, which may have any length up to the row's; the first one is its main input.
    """

    unit: str
    packs: bool
    texts: tuple[Text, ...]

    def document(self, record: Mapping[str, Any], name: str) -> Document:
        """The example in a record; messages call the record `name`."""

    def check(self, arrays: Mapping[str, np.ndarray], name: str) -> None:
        """Raises a UserError for an example that the loaded model, if there is one, cannot read."""

    def empty_row(self) -> Row:
        """A row of padding."""

    def prompt(self, record: Mapping[str, Any], name: str) -> Prompt | None:
        """The prompt of a record and the expected answer; None if they do not fit into the maximum length."""


def over(length: int, limit: int, field: str = "max_length") -> str:
    """`Document.too_long` of a text with that many tokens."""
    return f"{length} tokens exceed data.{field}={limit}" if length > limit else ""
