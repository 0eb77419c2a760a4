"""The lengths of unpacked batches. That padding changes no loss and no gradient: tests/training/test_padding.py."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from peftjax.core.config import defaults
from peftjax.data.batches import Batches, Batching, HeldOut, train_batches
from peftjax.data.padding import lengths, pad_alike
from peftjax.data.tokenizer import Tokenizer
from peftjax.tasks import make_task
from peftjax.training import config as configs
from peftjax.training.config import Config

TOKENS = (5, 70, 12, 33, 90, 20, 31, 32, 200, 9)  # of each record


@pytest.fixture
def file(write_jsonl: Callable[..., str], tokenizer: Tokenizer) -> str:
    def text(tokens: int) -> str:
        return "#" * (tokens - len(tokenizer.encode("", bos=True, eos=True)))

    return write_jsonl("a.jsonl", [{"text": text(tokens)} for tokens in TOKENS])


def make(file: str, kind: str = "causal_lm", **data: Any) -> Config:
    config = defaults()
    config.task.kind, config.data.train, config.data.eval = kind, (file,), (file,)
    config.data.shuffle, config.data.max_length = False, 100
    config.data.update(data)
    return configs.validate(config)


def train(config: Config, tokenizer: Tokenizer, **options: Any) -> Batches:
    task = make_task(config.task, config.data, tokenizer.directory)
    return train_batches(config.data, task, Batching(2, **options), config.seed)


@pytest.mark.parametrize("longest", [2, 32, 100, 512, 2048])
@pytest.mark.parametrize("multiple", [1, 8, 256])
def test_lengths_are_few_and_divisible_where_the_longest_is(longest: int, multiple: int) -> None:
    found = lengths(longest, multiple=multiple)
    assert list(found) == sorted(set(found))
    assert found[-1] == longest
    assert min(found) >= min(32, longest)
    assert {length % multiple for length in found} == {longest % multiple}
    assert len(found) <= {2: 1, 32: 1, 100: 3, 512: 5, 2048: 7}[longest]
    for wanted in (32, 64, 128, 512):
        if multiple <= wanted < longest:
            assert any(wanted <= length < wanted + multiple for length in found)


def test_a_batch_is_as_long_as_its_longest_document_needs_in_every_process(file: str, tokenizer: Tokenizer) -> None:
    config = make(file)
    batches = list(itertools.islice(train(config, tokenizer), 5))
    assert [batch.arrays["tokens"].shape for batch in batches] == [(2, 100), (2, 64), (2, 100), (2, 32), (2, 100)]
    for batch, own in zip(batches, zip(TOKENS[::2], TOKENS[1::2], strict=True), strict=True):
        real = np.minimum(own, 100)
        assert batch.arrays["tokens"].dtype == batch.arrays["targets"].dtype == np.int32
        assert batch.arrays["loss_weights"].sum(axis=1).tolist() == [min(n, 101) - 1 - (n > 100) for n in own]
        assert [(row != tokenizer.pad_id).sum() for row in batch.arrays["tokens"]] == real.tolist()
        assert batch.real_tokens == real.sum()
    for process in (0, 1):
        part = train(config, tokenizer, parts=2, own=(process,))
        for whole in batches:
            own = next(part)
            for name, array in whole.arrays.items():
                np.testing.assert_array_equal(own.arrays[name], array[process : process + 1])
    task = make_task(config.task, config.data, tokenizer.directory)
    held_out = list(HeldOut(config.data, task).batches(Batching(4)))
    assert [batch.arrays["tokens"].shape for batch in held_out] == [(4, 100), (4, 100), (4, 100)]
    assert (held_out[-1].arrays["tokens"][2:] == tokenizer.pad_id).all()
    uneven = train(config, tokenizer, multiple=8)
    assert [next(uneven).arrays["tokens"].shape[1] for _ in range(4)] == [100, 36, 100, 36]


def test_packed_rows_keep_their_length_and_targets_have_lengths_of_their_own(
    file: str, write_jsonl: Callable[..., str], tokenizer: Tokenizer
) -> None:
    packed = train(make(file, pack=True), tokenizer)
    packed.preview(3)
    assert packed.padding_text() == ""
    assert next(packed).arrays["tokens"].shape == (2, 100)
    pairs = [{"prompt": "#" * 50, "completion": "#" * n} for n in (3, 4, 40, 3)]
    fields = {"prompt_template": "{prompt}", "max_target_length": 130}
    batches = train(make(write_jsonl("b.jsonl", pairs), "seq2seq", **fields), tokenizer)
    shapes = [{name: array.shape[1] for name, array in next(batches).arrays.items()} for _ in range(2)]
    names = ("decoder_tokens", "targets", "loss_weights")
    assert shapes == [{"tokens": 64, "mask": 64} | dict.fromkeys(names, length) for length in (32, 128)]
    assert batches.padding_text() == "batches are padded to 32, 64 or 100 tokens (targets to 32, 128 or 130)"
    counts = batches.summary()
    targets = f", {counts['tokens']} input tokens, loss on {counts['loss_tokens']} targets"
    assert batches.summary_text().endswith(targets)  # not "loss on ... of ... tokens", which are those of another text


def test_the_start_states_the_lengths_and_how_full_the_first_batches_are(file: str, tokenizer: Tokenizer) -> None:
    batches = train(make(file), tokenizer)
    next(batches)
    before = json.dumps(batches.get_state())
    batches.preview(3)
    assert json.dumps(batches.get_state()) == before
    real = (12 + 33 + 90 + 20 + 31 + 32) / (2 * (64 + 100 + 32))
    start = "batches are padded to 32, 64 or 100 tokens, the next"
    assert batches.padding_text() == (
        f"{start} 3 batches to 32, 64 or 100; {real:.0%} of the tokens in the next 3 batches are not padding"
    )
    batches.preview(1)
    advice = "data.pack=True would reduce the padding"
    assert batches.padding_text() == (
        f"{start} batch to 64; {45 / 128:.0%} of the tokens in the next batch are not padding; {advice}"
    )
    short = train(make(file, max_length=30), tokenizer)
    short.preview(1)
    assert short.padding_text() == (
        f"batches are padded to 30 tokens; {35 / 60:.0%} of the tokens in the first batch are not padding"
    )
    assert (
        short.too_long_text()
        == "1 of 2 records in the first batch are too long and are cut to 30 tokens (data.max_length)"
    )
    assert batches.too_long_text() == ""
    next(batches)
    assert f"4 records in 4 rows, 0 dropped, {1 - (75 + 45) / 328:.0%} padding" in batches.summary_text()


def test_a_state_from_before_rows_had_several_lengths_is_restored(file: str, tokenizer: Tokenizer) -> None:
    batches = train(make(file), tokenizer)
    next(batches)
    state = batches.get_state()
    del state["counts"]["positions"]
    again = train(make(file), tokenizer)
    again.set_state(state)
    assert again.summary() == batches.summary()
    np.testing.assert_array_equal(next(again).arrays["tokens"], next(batches).arrays["tokens"])


def test_batches_are_padded_alike(file: str, tokenizer: Tokenizer) -> None:
    config = make(file)
    empty = make_task(config.task, config.data, tokenizer.directory).empty_row()
    long, middle, _, short = (batch.arrays for batch in itertools.islice(train(config, tokenizer), 4))
    alike = pad_alike([short, middle], empty)
    for arrays, original in zip(alike, (short, middle), strict=True):
        for name, array in arrays.items():
            length = original[name].shape[1]
            assert (array.shape, array.dtype) == ((2, 64), long[name].dtype)
            np.testing.assert_array_equal(array[:, :length], original[name])
            assert (array[:, length:] == empty[name][length:64]).all()
