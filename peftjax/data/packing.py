"""From documents to rows of one length: several documents packed into a row, or one document and padding.

A document and a row are dicts of arrays [n] and [T]:

    tokens         int32    the ids; the pad id where no document is
    targets        int32    the token to predict here, that is the next one of the same document; else 0
    loss_weights   float32  1 where the target counts; 0 at a document's last token, so nothing crosses into the next
    positions      int32    0, 1, ... from each document's beginning
    segments       int32    1, 2, ... the number of the document in its row; 0 where none is

and "notes", what the caller knows of the row's documents: a list with one object a document.
"""

from typing import Any

import grain
import numpy as np

from peftjax.data.text import Example

ARRAYS = ("tokens", "targets", "loss_weights", "positions", "segments")
# Rows that are filled at a time. More of them waste less, and make a restored stream tokenize more of them again.
OPEN_ROWS = 32

Row = dict[str, Any]


def document(example: Example, max_length: int, note: Any) -> Row:
    """The first `max_length` tokens of an example as a document, without positions and segments."""
    tokens = example.tokens[:max_length]
    ahead = np.zeros_like(tokens)
    ahead[:-1] = tokens[1:]
    weights = np.zeros(len(tokens), np.float32)
    weights[:-1] = example.loss_mask[1:max_length]
    return {"tokens": tokens, "targets": ahead, "loss_weights": weights, "notes": note}


def empty_row(max_length: int, pad_id: int) -> Row:
    """A row without a document: it fills an incomplete batch and has no loss."""
    row: Row = {name: np.zeros(max_length, np.int32) for name in ARRAYS}
    row["tokens"] += pad_id
    row["loss_weights"] = row["loss_weights"].astype(np.float32)
    row["notes"] = []
    return row


def pad(documents: grain.IterDataset, max_length: int, pad_id: int) -> grain.IterDataset:
    """A row for every document, filled up at its end."""

    def to_row(doc: Row) -> Row:
        row, n = empty_row(max_length, pad_id), len(doc["tokens"])
        for name in ("tokens", "targets", "loss_weights"):
            row[name][:n] = doc[name]
        row["positions"][:n] = np.arange(n)
        row["segments"][:n] = 1
        row["notes"] = [doc["notes"]]
        return row

    return documents.map(to_row)


def pack(documents: grain.IterDataset, max_length: int, pad_id: int) -> grain.IterDataset:
    """Rows of whole documents, each put into the first of `OPEN_ROWS` rows that has room for it."""
    lengths = {"tokens": max_length, "targets": max_length, "loss_weights": max_length}
    packed = grain.experimental.FirstFitPackIterDataset(
        documents,
        length_struct=lengths,
        num_packing_bins=OPEN_ROWS,
        shuffle_bins=False,
        meta_features=["targets", "loss_weights", "notes"],
        padding_struct={"tokens": pad_id, "targets": 0, "loss_weights": 0.0},
    )

    def to_row(row: Row) -> Row:
        row["positions"], row["segments"] = row.pop("tokens_positions"), row.pop("tokens_segment_ids")
        return row

    return packed.map(to_row)
