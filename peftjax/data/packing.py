"""Rows of a fixed length from documents, several packed into each row.

A document is a dict of arrays [n]. A row has the same arrays as [T], with the values of an empty row as padding, and two
more:

    positions      int32    position in the document, from 0
    segments       int32    number of the document in the row, from 1; 0 for padding

"notes" is metadata of a document; in a row it is a list with one entry per document.
"""

import grain

from peftjax.data.documents import Row

# Rows that are filled at the same time. More rows waste less space, but a restored stream tokenizes more again.
OPEN_ROWS = 32


def pack(documents: grain.IterDataset, empty: Row) -> grain.IterDataset:
    """Return rows of whole documents with tokens, targets and loss_weights.

    Each document goes into the first of `OPEN_ROWS` open rows that has room for it (first fit).
    """
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
