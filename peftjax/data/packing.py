"""From documents to rows of one length: several documents packed into a row, or one document and padding.

A document is a dict of arrays, most of them [n]; a row has the same, [T], with padding after the document, and what is
said of padding stands in the row without a document. Packed rows of a causal language model have two more:

    positions      int32    0, 1, ... from each document's beginning
    segments       int32    1, 2, ... the number of the document in its row; 0 where none is

"notes" is what the caller knows of a document, and of a row a list with one object a document.
"""

import grain

from peftjax.data.documents import Row

# Rows that are filled at a time. More of them waste less, and make a restored stream tokenize more of them again.
OPEN_ROWS = 32


def pad(documents: grain.IterDataset, empty: Row) -> grain.IterDataset:
    """A row for every document: `empty`, the row without one, with the document's arrays at its beginning."""

    def to_row(document: Row) -> Row:
        row: Row = {name: array.copy() for name, array in empty.items()}
        for name, array in row.items():
            if array.ndim:
                array[: len(document[name])] = document[name]
            else:
                array[...] = document[name]
        return row | {"notes": [document["notes"]]}

    return documents.map(to_row)


def pack(documents: grain.IterDataset, empty: Row) -> grain.IterDataset:
    """Rows of whole documents (tokens, targets, loss_weights), each put into the first of `OPEN_ROWS` rows that has room
    for it."""
    padding = {name: empty[name][0].item() for name in ("tokens", "targets", "loss_weights")}
    packed = grain.experimental.FirstFitPackIterDataset(
        documents,
        length_struct={name: len(empty[name]) for name in padding},
        num_packing_bins=OPEN_ROWS,
        shuffle_bins=False,
        meta_features=["targets", "loss_weights", "notes"],
        padding_struct=padding,
    )

    def to_row(row: Row) -> Row:
        row["positions"], row["segments"] = row.pop("tokens_positions"), row.pop("tokens_segment_ids")
        return row

    return packed.map(to_row)
