import grain
import numpy as np
import pytest

from peftjax.data import packing
from peftjax.data.padding import pad
from peftjax.data.records import Example
from peftjax.tasks.causal_lm import next_tokens

PAD = 99
NAMES = ("tokens", "targets", "loss_weights")


def documents(lengths: list[int], seed: int = 0) -> list[packing.Row]:
    """Documents of distinct tokens, the loss on a random half of them."""
    rng = np.random.default_rng(seed)
    first = np.cumsum([100, *lengths])
    return [
        next_tokens(Example(np.arange(a, a + n, dtype=np.int32), rng.random(n) < 0.5), 16) | {"notes": f"doc{i}"}
        for i, (a, n) in enumerate(zip(first, lengths, strict=False))
    ]


def empty(pack: bool) -> packing.Row:
    zeros = np.zeros(16, np.int32)
    row = {"tokens": np.full_like(zeros, PAD), "targets": zeros, "loss_weights": zeros.astype(np.float32)}
    return row | ({"positions": zeros, "segments": zeros} if pack else {})


def rows_of(docs: list[packing.Row], pack: bool) -> list[packing.Row]:
    if not pack:
        return [pad(doc, empty(pack)) | {"notes": [doc["notes"]]} for doc in docs]
    stream = grain.MapDataset.source(docs).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    return list(packing.pack(stream, empty(pack)))


def test_a_document_predicts_its_own_next_tokens_and_nothing_at_its_end() -> None:
    example = Example(np.array([5, 6, 7, 8], np.int32), np.array([True, False, True, True]))
    document = next_tokens(example, 16)
    assert document["targets"].tolist() == [6, 7, 8, 0]
    assert document["loss_weights"].tolist() == [0, 1, 1, 0]


def test_a_long_document_is_cut_and_the_token_beyond_is_no_target() -> None:
    example = Example(np.arange(20, dtype=np.int32), np.ones(20, bool))
    document = next_tokens(example, 16)
    assert document["tokens"].tolist() == list(range(16))
    assert document["targets"].tolist() == [*range(1, 16), 0]
    assert document["loss_weights"].tolist() == [1] * 15 + [0]


@pytest.mark.parametrize("pack", [False, True])
def test_every_document_stands_whole_in_one_row_once(pack: bool) -> None:
    docs = documents([3, 16, 5, 1, 7, 9, 2, 16, 12, 4, 4, 4, 10])
    found = {}
    for row in rows_of(docs, pack):
        names = NAMES + (("positions", "segments") if pack else ())
        assert {name: row[name].shape for name in row if name != "notes"} == dict.fromkeys(names, (16,))
        assert {row[name].dtype for name in names if name != "loss_weights"} == {np.dtype(np.int32)}
        assert row["loss_weights"].dtype == np.float32
        segments = row["segments"] if pack else (row["tokens"] != PAD).astype(int)
        assert segments.max() == len(row["notes"])
        for segment, note in enumerate(row["notes"], start=1):
            at = segments == segment
            if pack:
                assert row["positions"][at].tolist() == list(range(at.sum()))
            assert note not in found
            found[note] = {name: row[name][at].tolist() for name in NAMES}
        outside = segments == 0
        assert (row["tokens"][outside] == PAD).all()
        assert not row["loss_weights"][outside].any()
    assert found == {doc["notes"]: {name: doc[name].tolist() for name in NAMES} for doc in docs}


def test_packing_needs_fewer_rows_than_padding_and_no_target_crosses_a_boundary() -> None:
    docs = documents([4] * 40)
    packed = rows_of(docs, pack=True)
    assert len(packed) == 10
    assert len(rows_of(docs, pack=False)) == 40
    for row in packed:
        ends = np.flatnonzero(np.diff(row["segments"]) != 0)
        assert ends.size == 3
        assert not row["loss_weights"][ends].any()
        inside = row["loss_weights"] > 0
        assert (row["targets"][inside] == np.roll(row["tokens"], -1)[inside]).all()


def test_an_empty_row_has_no_document_and_no_loss() -> None:
    row = empty(pack=True)
    assert (row["tokens"] == PAD).all()
    assert not row["segments"].any()
    assert not row["loss_weights"].any()
