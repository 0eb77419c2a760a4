import collections
import itertools
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peftjax.core.errors import UserError
from peftjax.core.progress import Progress
from peftjax.data import batches as module
from peftjax.data.batches import Batches, Batching, EvalBatches, HostBatch
from peftjax.data.records import Prompt
from peftjax.data.tokenizer import Tokenizer, load_tokenizer
from peftjax.tasks import Task, make_task
from peftjax.training.config import Config
from peftjax.training.evaluation import counted

Make = Callable[..., Any]


def texts(count: int, prefix: str = "w") -> list[dict[str, Any]]:
    """Records of 4 to 10 tokens and a beginning and an end, no two alike."""
    return [{"text": f"{prefix}{i:02d}" + "no" * (i % 7)} for i in range(count)]


@pytest.fixture
def file(write_jsonl: Callable[..., str]) -> str:
    return write_jsonl("a.jsonl", texts(10))


def take(batches: Batches, count: int) -> list[HostBatch]:
    return list(itertools.islice(batches, count))


def task_of(config: Config, tokenizer: Tokenizer) -> Task:
    return make_task(config.task, config.data, tokenizer.directory)


def train_batches(config: Config, tokenizer: Tokenizer, **processes: Any) -> Batches:
    batching = Batching(config.train.batch_size, config.train.accumulate, **processes)
    return module.train_batches(config.data, task_of(config, tokenizer), batching, config.seed)


def eval_batches(config: Config, tokenizer: Tokenizer, **processes: Any) -> EvalBatches:
    batching = Batching(config.train.batch_size, config.train.accumulate, **processes)
    return module.HeldOut(config.data, task_of(config, tokenizer)).batches(batching)


def eval_prompts(config: Config, tokenizer: Tokenizer, n: int) -> list[Prompt]:
    return module.HeldOut(config.data, task_of(config, tokenizer)).prompts(n)


def assert_same(these: list[HostBatch], those: list[HostBatch]) -> None:
    assert [batch.records for batch in these] == [batch.records for batch in those]
    for one, other in zip(these, those, strict=True):
        assert one.arrays.keys() == other.arrays.keys()
        for name, array in one.arrays.items():
            np.testing.assert_array_equal(array, other.arrays[name])
        assert one.real_tokens == other.real_tokens


def joined(parts: list[HostBatch]) -> HostBatch:
    """The batch of all processes."""
    whole = {name: np.concatenate([part.arrays[name] for part in parts]) for name in parts[0].arrays}
    return HostBatch(whole, records=parts[0].records, real_tokens=parts[0].real_tokens)


# --- the order of a training


@pytest.mark.parametrize("count", [10, 1200])
def test_every_epoch_has_every_record_once_in_another_order(
    count: int, write_jsonl: Callable[..., str], tokenizer: Tokenizer, make_config: Make
) -> None:
    config = make_config(train=(write_jsonl("a.jsonl", texts(count)),), batch_size=count // 2)
    batches = train_batches(config, tokenizer)
    epochs = [[name for batch in take(batches, 2) for name in batch.records] for _ in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(f"a.jsonl:{i}" for i in range(1, count + 1))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_seed_decides_the_order(file: str, tokenizer: Tokenizer, make_config: Make) -> None:
    def records(seed: int) -> list[str]:
        batches = train_batches(make_config(train=(file,), batch_size=5, seed=seed), tokenizer)
        return [name for batch in take(batches, 8) for name in batch.records]

    assert records(0) == records(0)
    assert records(0) != records(1)
    assert records(0)[10:] != records(1)[:30]  # not the same epochs one later, either


def test_without_shuffling_the_records_come_as_they_lie(file: str, tokenizer: Tokenizer, make_config: Make) -> None:
    batches = train_batches(make_config(train=(file,), batch_size=5, shuffle=False), tokenizer)
    names = [name for batch in take(batches, 4) for name in batch.records]
    assert names == [f"a.jsonl:{i}" for i in range(1, 11)] * 2


def test_a_row_holds_the_record_it_names(file: str, tokenizer: Tokenizer, make_config: Make) -> None:
    batch = next(train_batches(make_config(train=(file,)), tokenizer))
    assert batch.arrays["tokens"].shape == (4, 16)
    for row, name in enumerate(batch.records):
        text = texts(10)[int(name.split(":")[1]) - 1]["text"]
        real = batch.arrays["tokens"][row] != tokenizer.pad_id
        assert batch.arrays["tokens"][row][real].tolist() == tokenizer.encode(text, bos=True, eos=True)
        assert batch.arrays["loss_weights"][row].sum() == real.sum() - 1
    assert batch.real_tokens == (batch.arrays["tokens"] != tokenizer.pad_id).sum()


def test_fewer_records_than_rows_are_repeated(
    write_jsonl: Callable[..., str], tokenizer: Tokenizer, make_config: Make
) -> None:
    for pack in (False, True):
        config = make_config(train=(write_jsonl("a.jsonl", texts(2)),), batch_size=8, pack=pack)
        batch = next(train_batches(config, tokenizer))
        assert set(batch.records) == {"a.jsonl:1", "a.jsonl:2"}
        assert (batch.arrays["loss_weights"].sum(axis=1) > 0).all()


# --- mixtures


def test_weights_decide_how_often_a_source_is_drawn(
    write_jsonl: Callable[..., str], tokenizer: Tokenizer, make_config: Make
) -> None:
    train = (write_jsonl("a.jsonl", texts(50)) + "@0.75", write_jsonl("b.jsonl", texts(3)) + "@0.25")
    batches = train_batches(make_config(train=train), tokenizer)
    drawn = collections.Counter(name.split(":")[0] for batch in take(batches, 50) for name in batch.records)
    assert drawn == {"a.jsonl": 150, "b.jsonl": 50}


def test_sources_without_weights_are_one(
    write_jsonl: Callable[..., str], tokenizer: Tokenizer, make_config: Make
) -> None:
    train = (write_jsonl("a.jsonl", texts(7)), write_jsonl("b.jsonl", texts(1)))
    batches = train_batches(make_config(train=train), tokenizer)
    drawn = collections.Counter(name for batch in take(batches, 6) for name in batch.records)
    assert len(drawn) == 8
    assert set(drawn.values()) == {3}


def test_two_sources_of_one_size_do_not_share_an_order(
    write_jsonl: Callable[..., str], tokenizer: Tokenizer, make_config: Make
) -> None:
    train = tuple(write_jsonl(f"{name}.jsonl", texts(20)) + "@1" for name in "ab")
    names = [name for batch in take(train_batches(make_config(train=train), tokenizer), 10) for name in batch.records]
    a, b = ([name.split(":")[1] for name in names if name.startswith(source)] for source in "ab")
    assert a != b


# --- state


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_restored_stream_goes_on_exactly(
    mixed: bool, pack: bool, workers: int, write_jsonl: Callable[..., str], tokenizer: Tokenizer, make_config: Make
) -> None:
    records = texts(12)
    records[3] = {"text": ""}  # left out on the way
    records[7] = {"text": "no" * 30}  # too long
    train = (write_jsonl("a.jsonl", records), write_jsonl("b.jsonl", texts(5, "v")))
    train = tuple(f"{name}@{weight}" for name, weight in zip(train, (2, 1), strict=True)) if mixed else train
    config = make_config(train=train, pack=pack, workers=workers, too_long="drop", batch_size=3)

    whole = train_batches(config, tokenizer)
    states, batches = [json.dumps(whole.get_state())], []
    for batch in itertools.islice(whole, 26):
        batches.append(batch)
        states.append(json.dumps(whole.get_state()))
    for stop in (0, 1, 10, 11, 22):
        again = train_batches(config, tokenizer)
        next(again)  # wherever it was before
        again.set_state(json.loads(states[stop]))
        assert json.dumps(again.get_state()) == states[stop]
        assert_same(take(again, 4), batches[stop : stop + 4])
        assert json.dumps(again.get_state()) == states[stop + 4]
        again.close()
    whole.close()


def test_the_number_of_workers_changes_nothing(file: str, tokenizer: Tokenizer, make_config: Make) -> None:
    streams = [train_batches(make_config(train=(file,), pack=True, workers=n), tokenizer) for n in (0, 1, 3)]
    expected, *others = [take(stream, 12) for stream in streams]
    for other in others:
        assert_same(other, expected)
    assert streams[0].get_state() == streams[1].get_state() == streams[2].get_state()
    for stream in streams:
        stream.close()


def test_a_state_of_other_data_is_refused(
    file: str, write_jsonl: Callable[..., str], tokenizer: Tokenizer, make_config: Make
) -> None:
    state = train_batches(make_config(train=(file,)), tokenizer).get_state()
    write_jsonl("a.jsonl", texts(11))
    with pytest.raises(ValueError, match=r"data has changed .*10 records.* now it is .*11 records"):
        train_batches(make_config(train=(file,)), tokenizer).set_state(state)


def test_a_state_stays_small(write_jsonl: Callable[..., str], tokenizer: Tokenizer, make_config: Make) -> None:
    batches = train_batches(make_config(train=(write_jsonl("a.jsonl", texts(500)),), pack=True), tokenizer)
    take(batches, 30)
    assert len(json.dumps(batches.get_state())) < 1000


# --- processes


@pytest.mark.parametrize("pack", [False, True])
def test_processes_share_the_batches_that_one_would_have(
    pack: bool, file: str, tokenizer: Tokenizer, make_config: Make
) -> None:
    config = make_config(train=(file,), eval=(file,), pack=pack)
    alone = train_batches(config, tokenizer)
    parts = [train_batches(config, tokenizer, parts=2, own=(i,)) for i in (0, 1)]
    shared = [joined([next(part) for part in parts]) for _ in range(7)]
    assert_same(shared, take(alone, 7))
    assert parts[0].get_state() == parts[1].get_state() == alone.get_state()

    held_out = [list(eval_batches(config, tokenizer, parts=4, own=(i,))) for i in range(4)]
    assert_same(
        [joined(list(batches)) for batches in zip(*held_out, strict=True)], list(eval_batches(config, tokenizer))
    )


def test_a_batch_that_the_processes_do_not_divide_is_an_error(
    file: str, tokenizer: Tokenizer, make_config: Make
) -> None:
    with pytest.raises(ValueError, match="batch_size=4 must be a multiple of 3, the number of parts"):
        train_batches(make_config(train=(file,)), tokenizer, parts=3)


def test_a_process_can_own_any_parts_of_each_microbatch() -> None:
    assert Batching(16, 2, parts=4, own=(0, 3)).own_rows().tolist() == [0, 1, 6, 7, 8, 9, 14, 15]


# --- evaluation


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pack", [False, True])
def test_an_evaluation_has_every_record_once_in_batches_of_one_shape(
    pack: bool, workers: int, file: str, tokenizer: Tokenizer, make_config: Make
) -> None:
    evaluation = eval_batches(make_config(eval=(file,), pack=pack, workers=workers), tokenizer)
    batches = list(evaluation)
    assert {batch.arrays["tokens"].shape for batch in batches} == {(4, 16)}
    names = [name for batch in batches for name in batch.records]
    assert sorted(names) == sorted(f"a.jsonl:{i}" for i in range(1, 11))
    if not pack:
        assert names == [f"a.jsonl:{i}" for i in range(1, 11)]
        assert not batches[-1].arrays["loss_weights"][2:].any()
        assert (batches[-1].arrays["tokens"][2:] == tokenizer.pad_id).all()
    lengths = [len(tokenizer.encode(record["text"], bos=True, eos=True)) for record in texts(10)]
    assert sum(batch.arrays["loss_weights"].sum() for batch in batches) == sum(lengths) - 10
    assert evaluation.summary() == {
        "records": 10, "too_long": 0, "empty": 0, "rows": evaluation.summary()["rows"],
        "positions": 16 * evaluation.summary()["rows"], "tokens": sum(lengths), "loss_tokens": sum(lengths) - 10,
    }  # fmt: skip
    with pytest.raises(StopIteration):
        next(evaluation)


def test_records_left_out_at_the_end_of_an_evaluation_are_counted(
    write_jsonl: Callable[..., str], tokenizer: Tokenizer, make_config: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"text": ""}, {"text": "yes"}, {"text": ""}, {"text": "no" * 30}, {"text": ""}]
    for pack in (False, True):
        config = make_config(eval=(write_jsonl("a.jsonl", records),), too_long="drop", pack=pack)
        evaluation = eval_batches(config, tokenizer)
        assert [batch.records for batch in evaluation] == [["a.jsonl:2"]]
        counts = evaluation.summary()
        assert (counts["records"], counts["empty"], counts["too_long"], counts["rows"]) == (5, 3, 1, 1)
        for reported in (False, True):
            assert len(list(counted(eval_batches(config, tokenizer), 0, Progress(), reported=reported))) == 1
        start = "eval: 5 records in 1 row, 4 dropped (1 longer than 16 tokens, 3 without a loss), "
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(start)
    config = make_config(eval=(write_jsonl("a.jsonl", records[1:2]),))
    assert len(list(counted(eval_batches(config, tokenizer), 0, Progress()))) == 1
    assert not capsys.readouterr().out


def test_prompts_are_spread_over_the_held_out_records(
    write_jsonl: Callable[..., str], tokenizer: Tokenizer, make_config: Make
) -> None:
    records = [{"prompt": f"{i}:", "completion": "yes"} for i in range(10)]
    records[6]["prompt"] = "no" * 30
    config = make_config(eval=(write_jsonl("a.jsonl", records),), format="completion")
    prompts = eval_prompts(config, tokenizer, 5)
    assert [prompt.record for prompt in prompts] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:5", "a.jsonl:9"]
    assert prompts[1].prompt == "2:"
    assert prompts[1].expected == "yes"
    assert len(eval_prompts(config, tokenizer, 100)) == 9


def test_records_of_two_files_with_one_name_are_told_apart(
    write_jsonl: Callable[..., str], tokenizer: Tokenizer, make_config: Make, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        write_jsonl(f"{folder.name}/dev.jsonl", [{"text": folder.name}])
    config = make_config(eval=tuple(f"{folder}/dev.jsonl" for folder in folders))
    held_out = module.HeldOut(config.data, task_of(config, tokenizer))
    (batch,) = held_out.batches(Batching(2))
    assert batch.records == [f"{folder}/dev.jsonl: dev.jsonl:1" for folder in folders]
    assert [held_out.record(name) for name in batch.records] == [{"text": "a"}, {"text": "b"}]


# --- what is left out, cut or refused


@pytest.fixture
def uneven(write_jsonl: Callable[..., str]) -> str:
    """Two records that fit, one that is too long and one with nothing in it."""
    return write_jsonl("a.jsonl", [{"text": "yes"}, {"text": "no" * 30}, {"text": ""}, {"text": "no"}])


def test_a_long_record_is_cut_and_counted(uneven: str, tokenizer: Tokenizer, make_config: Make) -> None:
    batches = train_batches(make_config(train=(uneven,), shuffle=False, batch_size=3), tokenizer)
    batch = next(batches)
    assert batch.records == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:4"]
    whole = tokenizer.encode("no" * 30, bos=True, eos=True)
    assert batch.arrays["tokens"][1].tolist() == whole[:16]
    assert batch.arrays["targets"][1].tolist() == [*whole[1:16], 0]
    counts = batches.summary()
    assert (counts["records"], counts["too_long"], counts["empty"], counts["rows"]) == (4, 1, 1, 3)
    assert counts["tokens"] == batch.real_tokens
    assert counts["loss_tokens"] == batch.arrays["loss_weights"].sum()
    assert batches.summary_text() == (
        "train: 4 records in 3 rows, 1 cut to 16 tokens, 1 dropped (1 without a loss), "
        f"{1 - batch.real_tokens / 48:.0%} padding, "
        f"loss on {int(batch.arrays['loss_weights'].sum())} of {batch.real_tokens} tokens"
    )


def test_a_long_record_can_be_left_out(uneven: str, tokenizer: Tokenizer, make_config: Make) -> None:
    config = make_config(train=(uneven,), shuffle=False, batch_size=2, too_long="drop")
    batches = train_batches(config, tokenizer)
    assert next(batches).records == ["a.jsonl:1", "a.jsonl:4"]
    assert "2 dropped (1 longer than 16 tokens, 1 without a loss), " in batches.summary_text()


def test_a_long_record_can_be_an_error_that_names_it(uneven: str, tokenizer: Tokenizer, make_config: Make) -> None:
    for workers in (0, 1):
        config = make_config(train=(uneven,), shuffle=False, too_long="error", workers=workers)
        batches = train_batches(config, tokenizer)
        with pytest.raises(ValueError, match=r"^a\.jsonl:2: \d+ tokens exceed data\.max_length=16\. Raise the limit"):
            next(batches)
        batches.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_record_is_an_error_of_one_line(
    workers: int, file: str, tokenizer: Tokenizer, make_config: Make
) -> None:
    with Path(file).open("a") as lines:
        lines.write("{\n")
    batches = train_batches(make_config(train=(file,), shuffle=False, workers=workers), tokenizer)
    with pytest.raises(UserError, match=r"^a\.jsonl:11: not valid JSON: .*, at column \d+$") as error:
        take(batches, 3)
    assert len("".join(traceback.format_exception_only(error.value)).splitlines()) == 1
    batches.close()


def test_a_completion_beyond_the_length_leaves_nothing_to_learn(
    write_jsonl: Callable[..., str], tokenizer: Tokenizer, make_config: Make
) -> None:
    records = [{"prompt": "no" * 30, "completion": "x"}, {"prompt": "a", "completion": "x"}]
    config = make_config(train=(write_jsonl("a.jsonl", records),), format="completion", batch_size=2)
    batches = train_batches(config, tokenizer)
    assert next(batches).records == ["a.jsonl:2"] * 2
    assert batches.summary()["empty"] > 0


@pytest.mark.parametrize("pack", [False, True])
def test_a_stream_of_which_nothing_is_left_is_an_error_and_no_endless_loop(
    pack: bool, write_jsonl: Callable[..., str], tokenizer: Tokenizer, make_config: Make
) -> None:
    bad = write_jsonl("bad.jsonl", [{"text": "no" * 30}, {"text": ""}])
    good = write_jsonl("good.jsonl", texts(3))
    alone = make_config(train=(bad,), eval=(bad,), too_long="drop", pack=pack)
    with pytest.raises(ValueError, match=r"bad\.jsonl: every record was left out"):
        next(train_batches(alone, tokenizer))
    with pytest.raises(ValueError, match=r"bad\.jsonl: every record was left out"):
        list(eval_batches(alone, tokenizer))
    mixed = make_config(train=(f"{good}@0.5", f"{bad}@0.5"), too_long="drop", pack=pack)
    with pytest.raises(ValueError, match=r"bad\.jsonl: every record was left out"):
        take(train_batches(mixed, tokenizer), 50)


def test_sources_that_cannot_be_meant_are_errors(file: str, tokenizer: Tokenizer, make_config: Make) -> None:
    with pytest.raises(ValueError, match=r"data\.train names no source"):
        train_batches(make_config(), tokenizer)
    with pytest.raises(ValueError, match=r"every source needs a weight, but .*a\.jsonl has none"):
        train_batches(make_config(train=(file, f"{file}@0.5")), tokenizer)
    with pytest.raises(ValueError, match=r"data\.eval: .* no weight"):
        eval_batches(make_config(eval=(f"{file}@0.5",)), tokenizer)


# --- real data


@pytest.mark.parametrize("pack", [False, True])
def test_real_data_keeps_ahead_of_a_training(pack: bool, assets: Path, make_config: Make) -> None:
    """A training of 5,000 tokens a second never waits: five times that, in time of one core, is the least."""
    tokenizer = load_tokenizer(assets / "stories260k")
    config = make_config(
        train=(str(assets / "data" / "e2e_nlg" / "train.jsonl.gz"),), batch_size=8, max_length=512, pack=pack,
        format="completion", prompt_template="{mr} => ", completion_template="{ref}",
    )  # fmt: skip
    batches = train_batches(config, tokenizer)
    next(batches)
    start, tokens = time.process_time(), 0
    for batch in take(batches, 12):
        tokens += batch.real_tokens
    assert tokens / (time.process_time() - start) > 25_000
    targets, counts = batch.arrays["targets"][0], batch.arrays["loss_weights"][0] > 0
    learned = targets[counts & (batch.arrays["segments"][0] == 1)] if pack else targets[counts]
    assert learned[-1] == tokenizer.eos_id
    assert "[" not in tokenizer.decode(learned)  # the meaning's brackets are in the prompt
