"""The batches of a training and of an evaluation: shuffled, mixed, packed or padded, counted, and resumable.

    sources -> endless shuffled (mixed) order -> Example -> Document, or left out -> rows of max_length -> Batch

The order is a function of an index (grain), so the state of the whole stream is a few numbers. Every process goes
through the same global stream and keeps its rows of each batch: whatever the number of processes, a step sees the same
records, and one state serves them all. `config.data.workers` threads read and tokenize ahead; 0 does it when asked.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict

from peftjax.data import packing
from peftjax.data.records import Prompt
from peftjax.data.rows import Rows
from peftjax.data.sources import Concatenated, Source, open_source, split_weight

# What is counted, in the order it is told in.
COUNTS = ("records", "too_long", "empty", "rows", "tokens", "loss_tokens")
FEW = 1000  # records; the shuffle of fewer is our own
AHEAD = 64  # documents that each thread may be ahead by


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """One step's rows of this process.

    Attributes:
      arrays: those of rows.py by name, each with a leading B, the batch size of this process.
      records: names of the records in the whole batch, those of the other processes too.
      real_tokens: how many tokens of the whole batch are not padding; of images, how many there are.
    """

    arrays: dict[str, np.ndarray]
    records: list[str]
    real_tokens: int


@dataclasses.dataclass(frozen=True)
class Note:
    """What is remembered of a record beside its tokens.

    Attributes:
      record: its name.
      part: the number of its part of the mixture.
      too_long: whether it is longer than max_length.
      tokens: how many it has in its row.
      loss_tokens: how many of its targets count.
      counts: of this record and of those left out since the one before it.
    """

    record: str
    part: int
    too_long: bool
    tokens: int
    loss_tokens: int
    counts: dict[str, int] = dataclasses.field(default_factory=dict)


class Batches(Iterator[Batch]):
    """An iterator over batches that counts what it gave out and can be put back to where it was.

    State, summary and counts cover the batches that were given out, not those that threads prepared ahead.
    """

    def __init__(self, title: str, config: ConfigDict, stream: grain.IterDataset, lengths: list[tuple[str, int]]):
        self._title, self._data, self._images = title, config.data, config.task.kind == "image_classification"
        self._lengths: list[list[Any]] = [[spec, length] for spec, length in lengths]  # lists, as JSON gives them back
        self._iterator = iter(stream)
        self._counts: dict[str, int] = dict.fromkeys(COUNTS, 0)

    def __next__(self) -> Batch:
        batch, counts = next(self._iterator)
        self._add(counts)
        return batch

    def get_state(self) -> dict[str, Any]:
        """Where the stream is, as JSON-serialisable values."""
        return {"position": self._iterator.get_state(), "counts": dict(self._counts), "sources": self._lengths}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `get_state` was called: the same batches follow.

        Raises:
          ValueError: the sources are others, or have other numbers of records, than when the state was taken.
        """
        if state["sources"] != self._lengths:
            there, here = (
                ", ".join(f"{spec} ({length:,} records)" for spec, length in lengths)
                for lengths in (state["sources"], self._lengths)
            )
            raise ValueError(f"the data has changed since the checkpoint: it read {there}, and now there is {here}")
        self._iterator.set_state(state["position"])
        self._counts = dict(state["counts"])

    def summary(self) -> dict[str, int]:
        """Counts over all processes.

        records: read. too_long: of these, longer than max_length. empty: left out, nothing to learn in them.
        rows: filled. tokens: in the rows, padding aside. loss_tokens: targets that counted.
        """
        return dict(self._counts)

    def summary_text(self) -> str:
        """The counts as a sentence to print."""
        c, data = self._counts, self._data
        if self._images:
            return f"{self._title}: {c['records']:,} images read"
        fate = {"truncate": f"cut to their first {data.max_length}", "drop": "left out", "error": "refused"}
        filled = c["tokens"] / (c["rows"] * data.max_length) if c["rows"] else 0.0
        return (
            f"{self._title}: {c['records']:,} records read into {c['rows']:,} rows, {filled:.0%} full; "
            f"{c['too_long']:,} longer than {data.max_length:,} tokens ({fate[data.too_long]}); "
            f"{c['empty']:,} left out, without a token to learn from; "
            f"{c['tokens']:,} tokens, {c['loss_tokens']:,} targets with a loss"
        )

    def close(self) -> None:
        """Ends the threads that work ahead."""
        self._iterator.close()

    def _add(self, counts: dict[str, int]) -> None:
        for name, count in counts.items():
            self._counts[name] += count


class EvalBatches(Batches):
    """One pass over the held-out records, in their order. The last batch is filled up with rows without a loss."""

    def __init__(self, *arguments: Any, rest: dict[str, int]):
        super().__init__(*arguments)
        self._rest = rest  # what was left out after the last row, known once the stream ends

    def __next__(self) -> Batch:
        try:
            return super().__next__()
        except StopIteration:
            self._add(self._rest)
            self._rest = {}
            if not self._counts["rows"]:
                raise _nothing_left(", ".join(spec for spec, _ in self._lengths), self._data) from None
            raise


def train_batches(config: ConfigDict, rows: Rows, *, process_index: int = 0, process_count: int = 1) -> Batches:
    """Endless batches of config.data.train, of `config.train.batch_size` rows over all processes.

    Without weights the sources are one: an epoch has every record once. With weights ("a.jsonl@0.7") each source is
    repeated by itself and drawn in proportion. With config.data.shuffle every epoch has another order, fixed by
    config.seed; without, the records come as they lie.

    Raises:
      ValueError: no source, weights on some sources only, a batch size that the processes do not divide, or what
        `open_source` refuses, or `encode_record` of a first record. While iterating: what it refuses of the others, a
        record that is too long where config.data.too_long is "error", or a source of which nothing is left to train on.
    """
    specs, weights, sources = _open(config, "train", rows)
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(weights):
        bare = ", ".join(spec for spec, weight in zip(specs, weights, strict=True) if weight is None)
        raise ValueError(f"config.data.train: in a mixture every source has a weight; there is none on {bare}")
    parts: list[Source] = sources if given else [Concatenated(sources)]
    orders = [_order(part, number, config, rows) for number, part in enumerate(parts)]
    order = grain.MapDataset.mix(orders, given) if len(orders) > 1 else orders[0]
    lengths = _lengths(specs, sources)
    named = lengths if given else [(", ".join(specs), len(parts[0]))]
    kept = _Kept(_read(order, config), config.data, named, {})
    return Batches("train", config, _batched(kept, config, rows.empty(), process_index, process_count), lengths)


def eval_batches(config: ConfigDict, rows: Rows, *, process_index: int = 0, process_count: int = 1) -> EvalBatches:
    """One pass over config.data.eval in batches of the training's shape; every process gets as many.

    Raises:
      ValueError: as `train_batches`; also a source with a weight, which means nothing in one pass.
    """
    specs, _, sources = _open(config, "eval", rows)
    held_out, rest = Concatenated(sources), dict[str, int]()
    order = grain.MapDataset.source(_Encoded(held_out, 0, config, rows))
    kept = _Kept(_read(order, config), config.data, [(", ".join(specs), len(held_out))], rest)
    batches = _batched(kept, config, rows.empty(), process_index, process_count)
    return EvalBatches("eval", config, batches, _lengths(specs, sources), rest=rest)


def eval_examples(config: ConfigDict, rows: Rows, n: int) -> list[Prompt]:
    """Prompts of at most `n` records of config.data.eval, evenly spread over them, and what should follow.

    A record whose prompt leaves no room for an answer within config.data.max_length is passed over.

    Raises:
      ValueError: no source, a source that cannot be read, or no record with a prompt short enough.
    """
    _, _, sources = _open(config, "eval", rows)
    held_out = Concatenated(sources)
    count = min(n, len(held_out))
    chosen = [i * len(held_out) // count for i in range(count)]
    prompts = [rows.prompt(held_out[i], held_out.name(i)) for i in chosen]
    if not any(prompts):
        raise _nothing_left("config.data.eval", config.data)
    return [prompt for prompt in prompts if prompt is not None]


class _Encoded:
    """A source whose records are documents, made when asked for."""

    def __init__(self, source: Source, part: int, config: ConfigDict, rows: Rows):
        self._source, self._part, self._data, self._rows = source, part, config.data, rows

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> packing.Row:
        name = self._source.name(index)
        document = self._rows.document(self._source[index], name)
        if document.too_long and self._data.too_long == "error":
            raise ValueError(
                f"{name}: {document.too_long}. Raise it, shorten the record, or set config.data.too_long to "
                '"truncate" or "drop"'
            )
        arrays = document.arrays
        tokens = len(arrays["tokens"]) if "tokens" in arrays else 1
        losses = int(np.count_nonzero(arrays["loss_weights"]))
        return arrays | {"notes": Note(name, self._part, bool(document.too_long), tokens, losses)}


class _Kept(grain.IterDataset):  # type: ignore[misc]
    """The documents that are not left out; each carries the counts of those left out before it.

    `parts` has the name and the number of records of each part of the mixture: once a part has gone by twice without a
    document kept, none will ever come. `rest` receives the counts of those left out after the last document.
    """

    def __init__(self, parent: grain.IterDataset, data: ConfigDict, parts: list[tuple[str, int]], rest: dict[str, int]):
        super().__init__(parent)
        self._arguments = data, parts, rest

    def __iter__(self) -> "_KeptIterator":
        return _KeptIterator(iter(self._parent), *self._arguments)


class _KeptIterator(grain.DatasetIterator):  # type: ignore[misc]
    def __init__(self, parent: Any, data: ConfigDict, parts: list[tuple[str, int]], rest: dict[str, int]):
        super().__init__(parent)
        self._data, self._parts, self._rest = data, parts, rest
        self._in_a_row = [0] * len(parts)  # left out

    def __next__(self) -> packing.Row:
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
                raise _nothing_left(name, self._data)
        self._rest.update(counts)
        raise StopIteration

    def get_state(self) -> Any:
        return self._parent.get_state()

    def set_state(self, state: Any) -> None:
        self._parent.set_state(state)


def _nothing_left(what: str, data: ConfigDict) -> ValueError:
    return ValueError(
        f"{what}: every record is left out, because it has no token to learn from within config.data.max_length = "
        f"{data.max_length} (config.data.too_long = {data.too_long!r}, format = {data.format!r})"
    )


def _open(config: ConfigDict, which: str, rows: Rows) -> tuple[list[str], list[float | None], list[Source]]:
    """The source strings of config.data.train or .eval without their weights, the weights, the sources.

    The first record of each is encoded, so that a wrong field or template is told before a model is loaded for it.
    """
    if not config.data[which]:
        raise ValueError(f"config.data.{which} names no source: give it one, such as tfds:NAME/SPLIT or FILE.jsonl")
    pairs = [split_weight(spec) for spec in config.data[which]]
    if which == "eval" and any(weight is not None for _, weight in pairs):
        raise ValueError("config.data.eval: an evaluation reads every record once, so its sources take no weight")
    sources = [open_source(spec, tfds_data_dir=config.data.tfds_data_dir) for spec, _ in pairs]
    for source in sources:
        rows.document(source[0], source.name(0))
    return [spec for spec, _ in pairs], [weight for _, weight in pairs], sources


def _lengths(specs: list[str], sources: list[Source]) -> list[tuple[str, int]]:
    return [(spec, len(source)) for spec, source in zip(specs, sources, strict=True)]


def _order(source: Source, part: int, config: ConfigDict, rows: Rows) -> grain.MapDataset:
    """A source's documents without end, in a new order every epoch."""
    order = grain.MapDataset.source(_Encoded(source, part, config, rows))
    if config.data.shuffle:
        # Hashed, because grain counts the seed up from epoch to epoch and neighbouring seeds would share orders.
        seed = int(np.random.SeedSequence([config.seed, part]).generate_state(1)[0])
        order = order.shuffle(seed=seed) if len(source) >= FEW else _ShuffledFew(order, seed)
    return order.repeat()


class _ShuffledFew(grain.MapDataset):  # type: ignore[misc]
    """grain's shuffle for few records: its own tries 16-bit numbers until one is an index, 14 ms for 2 records."""

    def __init__(self, parent: grain.MapDataset, seed: int):
        super().__init__(parent)
        self._seed = seed

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: int) -> packing.Row:
        epoch, i = divmod(index, len(self))
        return self._parent[_permutation(len(self), self._seed, epoch)[i]]


@functools.lru_cache(maxsize=32)
def _permutation(length: int, seed: int, epoch: int) -> list[int]:
    return np.random.default_rng([seed, epoch]).permutation(length).tolist()


def _read(order: grain.MapDataset, config: ConfigDict) -> grain.IterDataset:
    """The documents one after the other, made ahead by `config.data.workers` threads."""
    threads = config.data.workers
    return order.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=AHEAD * threads))


def _batched(
    documents: grain.IterDataset, config: ConfigDict, empty: packing.Row, process_index: int, process_count: int
) -> grain.IterDataset:
    """Pairs of this process's part of each batch and the counts of the whole batch."""
    size, parts = config.train.batch_size, config.train.accumulate
    if size % (parts * process_count):
        times = f"train.accumulate = {parts} times " if parts > 1 else ""
        raise ValueError(
            f"config.train.batch_size = {size} must be a multiple of {times}the {process_count} processes that share it"
        )
    # Of every microbatch a part, so that it has the same rows whatever the number of processes.
    own = np.arange(size).reshape(parts, process_count, -1)[:, process_index].ravel()

    def to_batch(rows: list[packing.Row]) -> tuple[Batch, dict[str, int]]:
        notes = [note for row in rows for note in row["notes"]]
        counts: collections.Counter[str] = collections.Counter(rows=len(rows))
        for note in notes:
            counts.update(note.counts | {"tokens": note.tokens, "loss_tokens": note.loss_tokens})
        filled = rows + [empty] * (size - len(rows))
        mine = [filled[row] for row in own]
        arrays = {name: np.stack([row[name] for row in mine]) for name in empty}
        return Batch(arrays, records=[note.record for note in notes], real_tokens=counts["tokens"]), dict(counts)

    rows = (packing.pack if config.data.pack else packing.pad)(documents, empty)
    return rows.batch(size, batch_fn=to_batch)
