"""The number of rows in one pass over the training data."""

import grain
import numpy as np

from peftjax.data import packing
from peftjax.data.config import DataConfig
from peftjax.data.documents import RecordEncoder
from peftjax.data.sources import Sample, Source
from peftjax.data.splitting import split
from peftjax.data.stream import Encoded, Kept, read_ahead

PROBED = 16  # records whose size tells how many can be tokenized
TYPICAL = 2_000  # characters of a record; of longer ones, fewer are tokenized


def count_rows(source: Source, data: DataConfig, encoder: RecordEncoder, most: int) -> tuple[int, bool]:
    """The rows of one epoch, and whether the number is exact.

    Without packing, a record is a row. With packing, and where long texts are dropped or split, records are tokenized to count
    the rows: all of them, or `most` (fewer if they are longer than `TYPICAL`), evenly spread over the source, from which the
    number is estimated.

    Args:
        source: All training records.
        data: The section `data`.
        encoder: Turns records into documents.
        most: The number of records to tokenize.

    Raises:
        UserError: A record cannot be read.
    """
    if not data.pack and (data.too_long not in ("drop", "split") or not encoder.texts):
        return len(source), True
    probe = Sample(source, PROBED)
    size = sum(len(str(probe[index])) for index in range(len(probe))) / len(probe)
    most = max(1, int(most * min(1.0, TYPICAL / size)))
    sample = Sample(source, most)
    order = grain.MapDataset.source(Encoded(sample, 0, data, encoder))
    kept = split(Kept(read_ahead(order, data.workers), data, [("data.train", len(sample))], {}), data)
    if data.pack:  # how much of a row is not padding
        fills = [float(np.mean(row["segments"] > 0)) for row in packing.pack(kept, encoder.empty_row())]
    else:
        fills = [1.0 for _ in kept]
    if len(sample) == len(source):
        return len(fills), True
    # Up to OPEN_ROWS rows, none is complete: further records would fill them.
    found = len(fills) if len(fills) > packing.OPEN_ROWS else sum(fills)
    return round(found * len(source) / len(sample)), False
