"""Streams of documents: the order of the records, mixtures, and records that are left out.

The order is a function of an index (grain), so the state of a stream is a few numbers.
"""

import collections
import dataclasses
import functools
from typing import Any

import grain
import numpy as np

from peftjax.core.errors import UserError
from peftjax.data.config import DataConfig
from peftjax.data.documents import RecordEncoder, Row
from peftjax.data.sources import Source

FEW = 1000  # records; fewer are shuffled by our own code
AHEAD = 64  # documents that each thread may be ahead by


@dataclasses.dataclass(frozen=True)
class Note:
    """Metadata of a record, which stays with its document.

    Attributes:
        record: Name of the record.
        part: Index of its part of the mixture.
        too_long: Whether it is longer than max_length.
        tokens: Number of its tokens in the row.
        loss_tokens: Number of its targets with a loss.
        counts: Counts of this record and of those left out since the one before it.
    """

    record: str
    part: int
    too_long: bool
    tokens: int
    loss_tokens: int
    counts: dict[str, int] = dataclasses.field(default_factory=dict)


class Encoded:
    """A source whose records are documents, encoded on access."""

    def __init__(self, source: Source, part: int, data: DataConfig, encoder: RecordEncoder):
        self._source, self._part, self._data, self._encoder = source, part, data, encoder

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Row:
        name = self._source.name(index)
        document = self._encoder.document(self._source[index], name)
        if document.too_long and self._data.too_long == "error":
            raise UserError(
                f"{name}: {document.too_long}. Raise the limit, shorten the record, or set data.too_long to "
                '"truncate" or "drop"'
            )
        self._encoder.check(document.arrays, name)
        losses = int(np.count_nonzero(document.arrays["loss_weights"]))
        return document.arrays | {"notes": Note(name, self._part, bool(document.too_long), document.size, losses)}


def endless(source: Source, part: int, data: DataConfig, encoder: RecordEncoder, seed: int) -> grain.MapDataset:
    """The documents of a source without end, with data.shuffle in a new order every epoch."""
    order = grain.MapDataset.source(Encoded(source, part, data, encoder))
    if data.shuffle:
        # Hashed, because grain counts the seed up from epoch to epoch and neighboring seeds would share orders.
        seed = int(np.random.SeedSequence([seed, part]).generate_state(1)[0])
        order = order.shuffle(seed=seed) if len(source) >= FEW else _ShuffledFew(order, seed)
    return order.repeat()


def read_ahead(order: grain.MapDataset, threads: int) -> grain.IterDataset:
    """The documents one after the other, prepared ahead by a number of threads; 0: prepared on demand."""
    return order.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=AHEAD * threads))


class Kept(grain.IterDataset):  # type: ignore[misc]
    """The documents that are not left out; each carries the counts of those left out before it.

    `parts` has the name and the number of records of each part of the mixture. If two passes over a part keep no document, no
    later pass will keep one either. `rest` receives the counts of those left out after the last document.
    """

    def __init__(self, parent: grain.IterDataset, data: DataConfig, parts: list[tuple[str, int]], rest: dict[str, int]):
        super().__init__(parent)
        self._arguments = data, parts, rest

    def __iter__(self) -> "_KeptIterator":
        return _KeptIterator(iter(self._parent), *self._arguments)


class _KeptIterator(grain.DatasetIterator):  # type: ignore[misc]
    def __init__(self, parent: Any, data: DataConfig, parts: list[tuple[str, int]], rest: dict[str, int]):
        super().__init__(parent)
        self._data, self._parts, self._rest = data, parts, rest
        self._in_a_row = [0] * len(parts)  # left out

    def __next__(self) -> Row:
        counts: collections.Counter[str] = collections.Counter()
        for document in self._parent:
            note: Note = document["notes"]
            dropped = note.too_long and self._data.too_long == "drop"
            empty = not note.loss_tokens
            counts.update(records=1, too_long=note.too_long, empty=empty and not dropped)
            if not (dropped or empty):
                self._in_a_row[note.part] = 0
                return document | {"notes": dataclasses.replace(note, counts=dict(counts))}
            self._in_a_row[note.part] += 1
            name, length = self._parts[note.part]
            if self._in_a_row[note.part] > 2 * length:
                raise nothing_left(name, self._data)
        self._rest.update(counts)
        raise StopIteration

    def get_state(self) -> Any:
        return self._parent.get_state()

    def set_state(self, state: Any) -> None:
        self._parent.set_state(state)


def nothing_left(what: str, data: DataConfig) -> UserError:
    """The error for a source whose records are all left out."""
    return UserError(
        f"{what}: every record was left out, because none has a token that counts in the loss within data.max_length="
        f"{data.max_length} (data.too_long={data.too_long!r}, data.format={data.format!r})"
    )


class _ShuffledFew(grain.MapDataset):  # type: ignore[misc]
    """A shuffle for few records. grain's own tries 16-bit numbers until one is an index, which takes 14 ms for 2 records."""

    def __init__(self, parent: grain.MapDataset, seed: int):
        super().__init__(parent)
        self._seed = seed

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: int) -> Row:
        epoch, i = divmod(index, len(self))
        return self._parent[_permutation(len(self), self._seed, epoch)[i]]


@functools.lru_cache(maxsize=32)
def _permutation(length: int, seed: int, epoch: int) -> list[int]:
    return np.random.default_rng([seed, epoch]).permutation(length).tolist()
