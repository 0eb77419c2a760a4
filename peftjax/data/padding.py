"""Rows of one document each: padded to the longest document of the batch, rounded up to one of a few lengths.

A program is compiled for each length, so there must be few. They are known from the configuration alone; which of them a
batch has follows from its own documents.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from peftjax.data.documents import Arrays, RecordEncoder, Row

SHORTEST = 32  # shorter batches are hardly faster
POOR = 0.5  # the fraction of tokens other than padding below which packing is suggested


def lengths(longest: int, ratio: int = 2, multiple: int = 1) -> tuple[int, ...]:
    """The lengths that rows may have: 32, 32 ratio, 32 ratio^2, ... and the longest.

    Args:
        longest: The longest length.
        ratio: The ratio of two neighboring lengths.
        multiple: All lengths differ from the longest by a multiple of this. If the longest length, with any number of
            virtual tokens, can be divided among devices or into the blocks of a kernel, so can all others.

    Examples:
        >>> lengths(200)
        (32, 64, 128, 200)
        >>> lengths(510, multiple=4)
        (34, 66, 130, 258, 510)
        >>> lengths(512, multiple=128)
        (128, 256, 512)
    """
    found, length = [], SHORTEST
    while length < longest:
        found.append(longest - (longest - length) // multiple * multiple)
        length *= ratio
    return tuple(dict.fromkeys([*found, longest]))


class Preview(NamedTuple):
    """Statistics of a few batches.

    Attributes:
        lengths: The length of each batch.
        fill: The fraction of the tokens that are not padding.
        first: Whether they are the first batches of the run.
        records: Number of records that were read for them.
        too_long: Number of these records that are longer than max_length.
        pieces: Number of pieces into which these were split.
    """

    lengths: list[int]
    fill: float
    first: bool
    records: int
    too_long: int
    pieces: int

    @property
    def name(self) -> str:
        """What to call the batches: "the first 3 batches"."""
        order, count = "first" if self.first else "next", len(self.lengths)
        return f"the {order} {count} batches" if count > 1 else f"the {order} batch"


class Padding:
    """Pads the documents of a batch.

    Attributes:
        empty: A row of padding with the longest length.
        lengths: For each text, the lengths that its arrays may have; empty if rows have one length.
    """

    def __init__(self, encoder: RecordEncoder, *, fixed: bool, multiple: int = 1) -> None:
        """
        Args:
            encoder: The encoder that makes the documents.
            fixed: Whether all rows have the longest length.
            multiple: As in `lengths`.
        """
        self.empty, self._texts, self._packs = encoder.empty_row(), encoder.texts, encoder.packs
        longest = {} if fixed else {text: len(self.empty[text.names[0]]) for text in encoder.texts}
        self.lengths = {text: lengths(most, text.ratio, multiple) for text, most in longest.items()}

    def fit(self, documents: Sequence[Row]) -> Row:
        """A row of padding into which each of the documents fits; without documents, the shortest one."""
        row = dict(self.empty)
        for text, allowed in self.lengths.items():
            longest = max((len(document[text.names[0]]) for document in documents), default=0)
            length = next(length for length in allowed if length >= longest)
            row |= {name: row[name][:length] for name in text.names}
        return row

    def positions(self, row: Row) -> int:
        """The length of the first text in a row, or in rows [B, ...]; 1 without texts."""
        return int(row[self._texts[0].names[0]].shape[-1]) if self._texts else 1

    def describe(self, preview: Preview | None) -> str:
        """Describe the possible lengths, and the next batches if a preview is given; empty if there is only one length."""
        if not self.lengths:
            return ""
        inputs, *others = self.lengths.values()
        targets = "".join(f" (targets to {_either(allowed)})" for allowed in others)
        text = f"batches are padded to {_either(inputs)} tokens{targets}"
        if preview is None:
            return text
        which = preview.name
        found = f", {which} to {_either(sorted(set(preview.lengths)))}" if len(inputs) > 1 else ""
        advice = "; data.pack=True would reduce the padding" if self._packs and preview.fill < POOR else ""
        return f"{text}{found}; {preview.fill:.0%} of the tokens in {which} are not padding{advice}"


def pad(document: Row, empty: Row) -> Arrays:
    """The arrays of a document, padded from `empty`, a row of padding."""
    row: Arrays = {name: array.copy() for name, array in empty.items()}
    for name, array in row.items():
        if array.ndim:
            array[: len(document[name])] = document[name]
        else:
            array[...] = document[name]
    return row


def pad_alike(batches: Sequence[Arrays], empty: Row) -> list[Arrays]:
    """Batches of arrays [B, ...], padded further to the longest of them, so that they have the same shapes."""
    padded: list[Arrays] = [{} for _ in batches]
    for name, filler in empty.items():
        longest = max(batch[name].shape[1:2] for batch in batches)
        for batch, alike in zip(batches, padded, strict=True):
            array = batch[name]
            if array.shape[1:2] != longest:
                more = np.broadcast_to(filler[array.shape[1] : longest[0]], (len(array), longest[0] - array.shape[1]))
                array = np.concatenate([array, more], axis=1)
            alike[name] = array
    return padded


def _either(numbers: Sequence[int]) -> str:
    """The numbers as in "32, 64 or 128"."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last
