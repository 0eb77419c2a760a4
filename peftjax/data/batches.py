"""The batches of a training run and of an evaluation: shuffled, mixed, packed or padded, counted, and resumable.

    sources -> endless shuffled (mixed) order -> documents, some left out or split -> rows -> HostBatch

Packed rows have max_length tokens. Otherwise the rows of a batch have the length of its longest document, rounded up to
one of a few lengths.

Every process goes through the same global stream and keeps its rows of each batch. For any number of processes, a step
sees the same records at the same length, and the state of the stream is the same. `data.workers` threads read and
tokenize ahead.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from peftjax.core.errors import UserError
from peftjax.data import packing
from peftjax.data.config import DataConfig
from peftjax.data.documents import RecordEncoder, Row
from peftjax.data.mapping import Mapped
from peftjax.data.padding import Padding, Preview, pad
from peftjax.data.records import Prompt
from peftjax.data.source_strings import split_weight
from peftjax.data.sources import Concatenated, Sample, Source, open_source, with_distinct_names
from peftjax.data.splitting import split
from peftjax.data.stream import Encoded, Kept, endless, nothing_left, read_ahead

# What is counted, in the order of the summary.
COUNTS = ("records", "too_long", "empty", "rows", "positions", "tokens", "loss_tokens")

PREVIEWED = 32_768  # tokens, with padding; enough to tell how full rows are, and read in less than a second


@dataclasses.dataclass(frozen=True)
class Batching:
    """How the rows of a batch are divided among microbatches and processes.

    Attributes:
        size: Number of rows in a batch, over all processes and microbatches.
        accumulate: Number of microbatches in a batch.
        parts: Number of equal parts of the rows of each microbatch.
        own: Indices of the parts that this process loads.
        multiple: The lengths of rows differ from the maximum length by a multiple of this, as in `padding.lengths`.
    """

    size: int
    accumulate: int = 1
    parts: int = 1
    own: tuple[int, ...] = (0,)
    multiple: int = 1

    def own_rows(self) -> np.ndarray:
        """The rows of this process: a part of every microbatch, which has the same rows for any number of processes.

        Raises:
            UserError: The rows cannot be divided evenly.
        """
        if self.size % (self.accumulate * self.parts):
            times = f"train.accumulate={self.accumulate} times " if self.accumulate > 1 else ""
            raise UserError(
                f"train.batch_size={self.size} must be a multiple of {times}{self.parts}, the number of parts (mesh.data x "
                "mesh.fsdp) into which several processes split its rows"
            )
        rows = np.arange(self.size).reshape(self.accumulate, self.parts, -1)
        return rows[:, self.own].ravel()


@dataclasses.dataclass(frozen=True, eq=False)
class HostBatch:
    """One step's rows of this process.

    Attributes:
        arrays: The arrays of the documents by name, each with a leading B, the batch size of this process.
        records: Names of the records in the whole batch, including those of other processes; of split texts, one per
            piece.
        real_tokens: Tokens of the whole batch without padding, or the number of images.
        read: Number of records that were read for the whole batch, with those left out.
    """

    arrays: dict[str, np.ndarray]
    records: list[str]
    real_tokens: int
    read: int = 0


class Batches(Iterator[HostBatch]):
    """An iterator over batches that counts what it returned and can be set back to an earlier position.

    State, summary and counts cover the batches that were returned, not those that threads prepared ahead.

    Attributes:
        source: All training records, of which an epoch has each once; None for a mixture with weights.
        sources: The name and the number of records of each source.
        ahead: One row of each batch that `preview` has read.
        previewed: What was counted in these batches, over all processes.
    """

    def __init__(
        self,
        title: str,
        data: DataConfig,
        encoder: RecordEncoder,
        batching: Batching,
        documents: grain.IterDataset,
        lengths: list[tuple[str, int]],
    ):
        self._title, self._data, self._unit, self._texts = title, data, encoder.unit, encoder.texts
        self._padding = Padding(encoder, fixed=data.pack, multiple=batching.multiple)
        self._preview: Preview | None = None
        self.ahead: list[Row] = []
        self.previewed: dict[str, int] = {}
        self.sources: list[list[Any]] = [[spec, length] for spec, length in lengths]  # lists, as JSON gives them back
        self.source: Source | None = None
        self._iterator = iter(_batched(documents, data, self._padding, batching))
        self._counts = collections.Counter(dict.fromkeys(COUNTS, 0))  # and "pieces", once a text is split

    def __next__(self) -> HostBatch:
        try:
            batch, counts = next(self._iterator)
        except UserError as error:
            error.__notes__ = []  # grain adds one about the frames that it removed from the traceback
            raise
        self._counts.update(counts)
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position in the stream, as values that JSON can hold."""
        return {"position": self._iterator.get_state(), "counts": dict(self._counts), "sources": self.sources}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go back to where `get_state` was called: the same batches follow.

        Raises:
            UserError: The sources or their numbers of records have changed since.
        """
        if state["sources"] != self.sources:
            there, here = (
                ", ".join(f"{spec} ({length:,} records)" for spec, length in lengths)
                for lengths in (state["sources"], self.sources)
            )
            raise UserError(f"the data has changed since the checkpoint was saved: it was {there}, now it is {here}")
        self._iterator.set_state(state["position"])
        # Earlier versions padded every row to max_length and did not count positions.
        full = state["counts"]["rows"] * self._data.max_length
        self._counts = collections.Counter(dict.fromkeys(COUNTS, 0) | {"positions": full} | state["counts"])

    @property
    def row(self) -> Row:
        """A row as long as those of the longest batch in `ahead`; without any batch, a row of the smallest possible length."""
        return max(self.ahead, key=self._padding.positions, default=self._padding.fit([]))

    def preview(self, most: int) -> None:
        """Read the next batches and go back, so that `ahead` has a row of each and `padding_text` describes them.

        Args:
            most: The most batches to read. Fewer are read if they have `PREVIEWED` tokens, and one if all have one
                length.

        Raises:
            UserError: A record cannot be read, or no record has anything to learn from.
        """
        start, before = self.get_state(), self._counts.copy()
        self.ahead, positions = [], 0
        while not self.ahead or (self._padding.lengths and len(self.ahead) < most and positions < PREVIEWED):
            self.ahead.append({name: array[0].copy() for name, array in next(self).arrays.items()})
            positions = self._counts["positions"] - before["positions"]
        lengths = [self._padding.positions(row) for row in self.ahead]
        self.previewed = {name: count - before[name] for name, count in self._counts.items()}
        records, too_long, pieces = (self.previewed.get(name, 0) for name in ("records", "too_long", "pieces"))
        fill = self.previewed["tokens"] / positions
        self._preview = Preview(lengths, fill, not before["rows"], records, too_long, pieces)
        self.set_state(start)

    def padding_text(self) -> str:
        """The lengths that batches are padded to, as a sentence that also describes the batches of `preview`.

        Empty if all batches have one length.
        """
        return self._padding.describe(self._preview)

    def too_long_text(self) -> str:
        """How many records of the batches of `preview` are too long, as a sentence; empty if none is."""
        if self._preview is None or not self._preview.too_long:
            return ""
        found, length = self._preview, f"{self._data.max_length:,} tokens"
        pieces = f"split into {found.pieces:,} pieces of at most {length}"
        what = {"drop": "dropped", "split": pieces}.get(self._data.too_long, f"cut to {length}")
        return f"{found.too_long:,} of {found.records:,} records in {found.name} are too long and are {what} (data.max_length)"

    def summary(self) -> dict[str, int]:
        """Counts over all processes.

        records: read; too_long: of these, longer than max_length; empty: left out, without a loss; rows: filled;
        positions: in the rows, with padding; tokens: without padding; loss_tokens: targets with a loss; pieces: of the records
        that are too long, if they are split.
        """
        return dict(self._counts)

    def padding(self) -> float | None:
        """The fraction of the positions in the rows that hold padding; None without texts, or before the first batch."""
        positions = self._counts["positions"]
        return 1 - self._counts["tokens"] / positions if positions and self._texts else None

    @property
    def incomplete(self) -> bool:
        """Whether a record was truncated or dropped."""
        lost = self._counts["too_long"] if self._data.too_long != "split" else 0
        return lost + self._counts["empty"] > 0

    def summary_text(self) -> str:
        """The counts as a sentence to print."""
        c, data = self._counts, self._data
        if not self._texts:
            return f"{self._title}: {c['records']:,} {self._unit} read"
        records, rows = (f"{c[name]:,} {name[:-1] if c[name] == 1 else name}" for name in ("records", "rows"))
        parts = [f"{self._title}: {records} in {rows}"]
        why: list[str] = []
        two_texts = len(self._texts) > 1  # an input and a target, with lengths of their own
        dropped = c["empty"]
        if c["too_long"] and data.too_long == "drop":
            targets = f" or with a target longer than {data.max_target_length:,}" if two_texts else ""
            why.append(f"{c['too_long']:,} longer than {data.max_length:,} tokens{targets}")
            dropped += c["too_long"]
        elif c["pieces"]:
            parts.append(f"{c['too_long']:,} split into {c['pieces']:,} pieces of at most {data.max_length:,} tokens")
        elif c["too_long"]:
            targets = f" (targets to {data.max_target_length:,})" if two_texts else ""
            parts.append(f"{c['too_long']:,} cut to {data.max_length:,} tokens{targets}")
        if c["empty"]:
            why.append(f"{c['empty']:,} without a loss")
        parts.append(f"{dropped:,} dropped" + (f" ({', '.join(why)})" if why else ""))
        counted = f"loss on {c['loss_tokens']:,} of {c['tokens']:,} tokens"
        if "loss_weights" not in self._texts[0].names:  # the targets are labels, or the tokens of another text
            counted = f"{c['tokens']:,} input tokens, loss on {c['loss_tokens']:,} targets"
        parts += [f"{self.padding() or 0.0:.0%} padding", counted]
        return ", ".join(parts)

    def record_count(self) -> int:
        """Number of records in the sources."""
        return sum(length for _, length in self.sources)

    def close(self) -> None:
        """End the threads that read ahead."""
        self._iterator.close()


class EvalBatches(Batches):
    """One pass over the held-out records, in their order. The last batch is padded with rows without a loss."""

    def __init__(self, *arguments: Any, rest: dict[str, int]):
        super().__init__(*arguments)
        self._rest = rest  # what was left out after the last row, known once the stream ends

    def __next__(self) -> HostBatch:
        try:
            return super().__next__()
        except StopIteration:
            self._counts.update(self._rest)
            self._rest = {}
            if not self._counts["rows"]:
                raise nothing_left(", ".join(spec for spec, _ in self.sources), self._data) from None
            raise


def train_batches(data: DataConfig, encoder: RecordEncoder, batching: Batching, seed: int) -> Batches:
    """Endless batches of data.train.

    Without weights the sources are concatenated: an epoch has every record once. With weights ("a.jsonl@0.7") each
    source is repeated on its own and drawn in proportion. With data.shuffle every epoch has another order, determined
    by `seed`.

    Raises:
        UserError: There is no source, only some sources have weights, the processes do not divide the batch, or a
            source or its first record cannot be read. While iterating: a record cannot be read, is too long where
            data.too_long is "error", or a source has no record left to train on.
    """
    specs, weights, sources = _open(data, "train", encoder)
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(weights):
        bare = ", ".join(spec for spec, weight in zip(specs, weights, strict=True) if weight is None)
        raise UserError(f"data.train: in a mixture every source needs a weight, but {bare} has none")
    parts: list[Source] = sources if given else [Concatenated(sources)]
    orders = [endless(part, number, data, encoder, seed) for number, part in enumerate(parts)]
    order = grain.MapDataset.mix(orders, given) if len(orders) > 1 else orders[0]
    lengths = _lengths(specs, sources)
    named = lengths if given else [(", ".join(specs), len(parts[0]))]
    kept = split(Kept(read_ahead(order, data.workers), data, named, {}), data)
    batches = Batches("train", data, encoder, batching, kept, lengths)
    batches.source = None if given else parts[0]
    return batches


class HeldOut:
    """The records of data.eval, opened once for all evaluations of a run.

    Args:
        data: The section `data` of the config.
        encoder: The task.

    Raises:
        UserError: As `train_batches`; also a source with a weight, which means nothing in one pass.
    """

    def __init__(self, data: DataConfig, encoder: RecordEncoder) -> None:
        self._data, self._encoder = data, encoder
        specs, _, sources = _open(data, "eval", encoder)
        self._records, self._specs, self._lengths = Concatenated(sources), ", ".join(specs), _lengths(specs, sources)

    def batches(self, batching: Batching) -> EvalBatches:
        """One pass, in batches of as many rows as in training; every process gets as many batches."""
        data, encoder, rest = self._data, self._encoder, dict[str, int]()
        order = grain.MapDataset.source(Encoded(self._records, 0, data, encoder))
        kept = split(Kept(read_ahead(order, data.workers), data, [(self._specs, len(self._records))], rest), data)
        return EvalBatches("eval", data, encoder, batching, kept, self._lengths, rest=rest)

    def prompts(self, count: int) -> list[Prompt]:
        """Prompts of at most `count` records, evenly spread over them, with the expected answers.

        A record whose prompt leaves no room for an answer within data.max_length is skipped.

        Raises:
            UserError: A record cannot be read, or no prompt is short enough.
        """
        sample = Sample(self._records, count)
        prompts = [self._encoder.prompt(sample[i], sample.name(i)) for i in range(len(sample))]
        if not any(prompts):
            raise nothing_left("data.eval", self._data)
        return [prompt for prompt in prompts if prompt is not None]

    def record(self, name: str) -> dict[str, Any]:
        """The record with a name, as in `HostBatch.records`."""
        return self._records[self._index[name]]

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        return {self._records.name(index): index for index in range(len(self._records))}


def _open(data: DataConfig, which: str, encoder: RecordEncoder) -> tuple[list[str], list[float | None], list[Source]]:
    """The specifications of data.train or data.eval without their weights, the weights, and the sources.

    The first record of each is encoded, so that a wrong field or template is reported before a model is loaded.
    """
    given = data.train if which == "train" else data.eval
    if not given:
        raise UserError(f"data.{which} names no source; set it to one such as tfds:NAME/SPLIT or FILE.jsonl")
    pairs = [split_weight(spec) for spec in given]
    if which == "eval" and any(weight is not None for _, weight in pairs):
        raise UserError("data.eval: an evaluation reads every record once, so its sources take no weight")
    specs, weights = [spec for spec, _ in pairs], [weight for _, weight in pairs]
    opened = with_distinct_names(specs, [open_source(spec, tfds_data_dir=data.tfds_data_dir) for spec in specs])
    sources: list[Source] = [Mapped(source, data.map) for source in opened] if data.map else opened
    for source in sources:
        encoder.document(source[0], source.name(0))
    return specs, weights, sources


def _lengths(specs: list[str], sources: list[Source]) -> list[tuple[str, int]]:
    return [(spec, len(source)) for spec, source in zip(specs, sources, strict=True)]


def _batched(documents: grain.IterDataset, data: DataConfig, padding: Padding, batching: Batching) -> grain.IterDataset:
    """Pairs of this process's part of each batch and the counts of the whole batch."""
    own = batching.own_rows()

    def to_batch(rows: list[Row]) -> tuple[HostBatch, dict[str, int]]:
        notes = [note for row in rows for note in (row["notes"] if data.pack else [row["notes"]])]
        empty = padding.fit(rows)
        counts: collections.Counter[str] = collections.Counter(
            rows=len(rows), positions=len(rows) * padding.positions(empty)
        )
        for note in notes:
            counts.update(note.counts | {"tokens": note.tokens, "loss_tokens": note.loss_tokens})
        filled = rows + [empty] * (batching.size - len(rows))
        mine = [pad(filled[row], empty) for row in own]
        arrays = {name: np.stack([row[name] for row in mine]) for name in empty}
        records = [note.record for note in notes]
        return HostBatch(arrays, records, real_tokens=counts["tokens"], read=counts["records"]), dict(counts)

    rows = packing.pack(documents, padding.empty) if data.pack else documents
    return rows.batch(batching.size, batch_fn=to_batch)
