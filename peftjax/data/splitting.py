"""Splitting texts that are too long for a row into pieces (data.too_long="split")."""

import dataclasses

import grain
import numpy as np

from peftjax.data.config import DataConfig
from peftjax.data.documents import Row
from peftjax.data.stream import Note


def split(documents: grain.IterDataset, data: DataConfig) -> grain.IterDataset:
    """The documents; with data.too_long="split", in pieces of at most data.max_length tokens."""
    if data.too_long != "split":
        return documents
    return grain.experimental.FlatMapIterDataset(documents, Split(data.max_length))


class Split(grain.experimental.FlatMapTransform):  # type: ignore[misc]
    """Splits a document into pieces of `length` tokens, the last of which may be shorter.

    The tokens keep their targets, so the last token of a piece predicts the first one of the next piece: together, the
    pieces predict each token of the document but the first exactly once. The last token of the document has no target
    and never becomes a separate piece.
    """

    def __init__(self, length: int):
        self._length = length

    def flat_map(self, document: Row) -> list[Row]:
        note: Note = document["notes"]
        starts = range(0, note.tokens - 1, self._length)
        counts = note.counts | ({"pieces": len(starts)} if note.too_long else {})
        pieces = []
        for start in starts:
            piece = {name: array[start : start + self._length] for name, array in document.items() if name != "notes"}
            losses = int(np.count_nonzero(piece["loss_weights"]))
            own = counts if start == 0 else {}  # the record is counted once
            notes = dataclasses.replace(note, tokens=len(piece["tokens"]), loss_tokens=losses, counts=own)
            pieces.append(piece | {"notes": notes})
        return pieces
