"""Long texts in pieces. Their losses: tests/training/test_splitting.py. A killed run: tests/training/test_resume.py."""

import collections
import itertools
import json
import string
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from peftjax.data.batches import Batches, Batching, HeldOut, HostBatch
from peftjax.data.epoch import count_rows
from peftjax.data.tokenizer import Tokenizer
from tests.data.test_batches import assert_same, eval_batches, joined, take, task_of, train_batches

Make = Callable[..., Any]
LENGTH = 16  # of a row
# Tokens of each text, with its beginning and end; the number of pieces follows from the tokens that are predicted.
SIZES = {
    "a.jsonl:1": 5,
    "a.jsonl:2": 16,
    "a.jsonl:3": 17,
    "a.jsonl:4": 32,
    "a.jsonl:5": 33,
    "a.jsonl:6": 34,
    "a.jsonl:7": 70,
}
PIECES = {name: -(-(size - 1) // LENGTH) for name, size in SIZES.items()}
ROWS = sum(PIECES.values())


def text(size: int) -> str:
    """A text of so many tokens: letters that no merge joins, in an order that does not repeat within a piece."""
    return "".join(string.ascii_uppercase[i * 7 % 26] for i in range(size - 2))


@pytest.fixture
def file(write_jsonl: Callable[..., str]) -> str:
    return write_jsonl("a.jsonl", [{"text": text(size)} for size in SIZES.values()])


@pytest.fixture
def documents(tokenizer: Tokenizer) -> dict[str, list[int]]:
    found = {name: tokenizer.encode(text(size), bos=True, eos=True) for name, size in SIZES.items()}
    assert {name: len(tokens) for name, tokens in found.items()} == SIZES
    return found


def pieces(batches: list[HostBatch], pad: int) -> list[tuple[str, dict[str, list[float]]]]:
    """The pieces in some batches: the name of the record, and its arrays."""
    found = []
    for batch in batches:
        names = iter(batch.records)
        for row in range(len(batch.arrays["tokens"])):
            arrays = {name: array[row] for name, array in batch.arrays.items()}
            segments = arrays.pop("segments", (arrays["tokens"] != pad).astype(int))
            for segment in range(1, segments.max() + 1):
                own = {name: array[segments == segment].tolist() for name, array in arrays.items()}
                assert own.pop("positions", list(range(len(own["tokens"])))) == list(range(len(own["tokens"])))
                found.append((next(names), own))
        assert next(names, None) is None
    return found


def test_the_pieces_of_a_text_have_its_tokens_and_predict_each_but_the_first_once(
    file: str, documents: dict[str, list[int]], tokenizer: Tokenizer, make_config: Make
) -> None:
    evaluation = eval_batches(make_config(eval=(file,), too_long="split"), tokenizer)
    found = pieces(list(evaluation), tokenizer.pad_id)
    assert collections.Counter(name for name, _ in found) == PIECES
    for name, tokens in documents.items():
        own = [piece for record, piece in found if record == name]
        assert all(len(piece["tokens"]) == LENGTH for piece in own[:-1])
        assert 0 < len(own[-1]["tokens"]) <= LENGTH
        read = [token for piece in own for token in piece["tokens"]]
        # a last token that would be a piece by itself is only predicted
        assert read == (tokens[:-1] if len(tokens) > LENGTH and len(tokens) % LENGTH == 1 else tokens)
        pairs = [pair for piece in own for pair in zip(piece["targets"], piece["loss_weights"], strict=True)]
        assert [target for target, weight in pairs if weight] == tokens[1:]
    counts = evaluation.summary()
    assert counts["loss_tokens"] == sum(SIZES.values()) - len(SIZES)
    assert (counts["records"], counts["too_long"], counts["pieces"], counts["rows"]) == (7, 5, ROWS - 2, ROWS)
    assert not evaluation.incomplete


def test_packed_pieces_are_those_of_unpacked_rows(file: str, tokenizer: Tokenizer, make_config: Make) -> None:
    found = []
    for pack in (False, True):
        evaluation = eval_batches(make_config(eval=(file,), too_long="split", pack=pack), tokenizer)
        found.append(sorted(pieces(list(evaluation), tokenizer.pad_id), key=str))
    assert found[0] == found[1]
    assert evaluation.summary()["rows"] < ROWS


@pytest.mark.parametrize("pack", [False, True])
def test_an_evaluation_counts_every_record_once(pack: bool, file: str, tokenizer: Tokenizer, make_config: Make) -> None:
    batches = list(eval_batches(make_config(eval=(file,), too_long="split", pack=pack), tokenizer))
    assert sum(batch.read for batch in batches) == len(SIZES)


def test_an_epoch_has_every_piece_once_in_another_order(file: str, tokenizer: Tokenizer, make_config: Make) -> None:
    config = make_config(train=(file,), too_long="split", batch_size=ROWS)
    batches = train_batches(config, tokenizer)
    epochs = [pieces([batch], tokenizer.pad_id) for batch in take(batches, 3)]
    assert all(sorted(epoch, key=str) == sorted(epochs[0], key=str) for epoch in epochs)
    assert len({str(epoch) for epoch in epochs}) == 3
    assert batches.source is not None
    assert count_rows(batches.source, config.data, task_of(config, tokenizer), 1000) == (ROWS, True)
    estimate, exact = count_rows(batches.source, config.data, task_of(config, tokenizer), 6)
    assert not exact
    assert abs(estimate - ROWS) < ROWS / 2


def test_a_packed_epoch_has_the_rows_that_its_pieces_fill(file: str, tokenizer: Tokenizer, make_config: Make) -> None:
    config = make_config(train=(file,), eval=(file,), too_long="split", pack=True)
    evaluation = eval_batches(config, tokenizer)
    assert len(list(evaluation)) > 1
    source = train_batches(config, tokenizer).source
    assert source is not None
    rows = evaluation.summary()["rows"]
    assert count_rows(source, config.data, task_of(config, tokenizer), 1000) == (rows, True)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_stream_restored_within_a_text_goes_on_exactly(
    mixed: bool, pack: bool, workers: int, write_jsonl: Callable[..., str], tokenizer: Tokenizer, make_config: Make
) -> None:
    records = [{"text": text(size)} for size in SIZES.values()]
    records.insert(2, {"text": ""})  # left out on the way
    train = [write_jsonl("a.jsonl", records), write_jsonl("b.jsonl", [{"text": text(100)}])]
    if mixed:
        train = [f"{train[0]}@3", f"{train[1]}@1"]
    config = make_config(train=tuple(train), too_long="split", pack=pack, workers=workers, batch_size=3)

    def preview(batches: Batches) -> Batches:
        batches.preview(2)
        return batches

    whole = preview(train_batches(config, tokenizer))
    states, batches = [json.dumps(whole.get_state())], []
    for batch in itertools.islice(whole, 24):
        batches.append(batch)
        states.append(json.dumps(whole.get_state()))
    for stop in range(20):
        again = preview(train_batches(config, tokenizer))
        again.set_state(json.loads(states[stop]))
        assert json.dumps(again.get_state()) == states[stop]
        assert_same(take(again, 4), batches[stop : stop + 4])
        assert json.dumps(again.get_state()) == states[stop + 4]
        again.close()
    whole.close()


@pytest.mark.parametrize("pack", [False, True])
def test_processes_share_the_batches_that_one_would_have(
    pack: bool, file: str, tokenizer: Tokenizer, make_config: Make
) -> None:
    config = make_config(train=(file,), eval=(file,), too_long="split", pack=pack)
    alone = train_batches(config, tokenizer)
    parts = [train_batches(config, tokenizer, own=(i,), parts=2) for i in (0, 1)]
    assert_same([joined([next(part) for part in parts]) for _ in range(9)], take(alone, 9))
    assert parts[0].get_state() == parts[1].get_state() == alone.get_state()
    held_out = [list(eval_batches(config, tokenizer, own=(i,), parts=2)) for i in (0, 1)]
    whole = [joined(list(batches)) for batches in zip(*held_out, strict=True)]
    assert_same(whole, list(eval_batches(config, tokenizer)))


def test_a_run_states_into_how_many_pieces_texts_are_split(file: str, tokenizer: Tokenizer, make_config: Make) -> None:
    config = make_config(train=(file,), too_long="split", batch_size=ROWS, shuffle=False)
    batches = train_batches(config, tokenizer)
    batches.preview(1)
    split = f"split into {ROWS - 2} pieces of at most 16 tokens"
    assert batches.too_long_text() == (
        f"5 of 7 records in the first batch are too long and are {split} (data.max_length)"
    )
    next(batches)
    assert batches.summary_text().startswith(f"train: 7 records in {ROWS} rows, 5 {split}, 0 dropped, ")


def test_texts_that_fit_are_the_same_with_and_without_splitting(
    write_jsonl: Callable[..., str], tokenizer: Tokenizer, make_config: Make
) -> None:
    source = write_jsonl("a.jsonl", [{"text": text(size)} for size in (3, 9, 16, 12)] + [{"text": ""}])
    cut, split = (train_batches(make_config(train=(source,), too_long=how), tokenizer) for how in ("truncate", "split"))
    assert_same(take(split, 5), take(cut, 5))
    assert split.summary() == cut.summary()
    split.preview(1)
    assert split.too_long_text() == ""


def test_the_tokens_that_a_balanced_loss_counts_are_split_too(
    file: str, tokenizer: Tokenizer, make_config: Make
) -> None:
    config = make_config(eval=(file,), too_long="split")
    task = type(task_of(config, tokenizer))(config.data, tokenizer.directory, router_aux_loss_coef=0.1)
    for batch in HeldOut(config.data, task).batches(Batching(4)):
        np.testing.assert_array_equal(batch.arrays["mask"], batch.arrays["tokens"] != tokenizer.pad_id)
