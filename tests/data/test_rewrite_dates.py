"""The dates task: its answers are right, its splits share no day, and it is the same every time."""

import datetime
from collections.abc import Iterator
from pathlib import Path

import pytest

from peftjax.data import rewrite_dates
from peftjax.data.rewrite_dates import FORMS, RewriteDates, days_by_split, ordinal, split_of
from peftjax.data.sources import open_source

SIZES = {"train": 60, "validation": 20, "test": 20}


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewrite_dates, "EXAMPLES", SIZES)
        yield


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, small: None) -> dict[str, list[tuple[str, str]]]:
    """The records of every split, from a dataset prepared on disk."""
    folder = tmp_path_factory.mktemp("tfds")
    return {split: records(folder, split) for split in SIZES}


def records(folder: Path, split: str) -> list[tuple[str, str]]:
    source = open_source(f"tfds:rewrite_dates/{split}", tfds_data_dir=str(folder))
    return [(source[i]["prompt"], source[i]["completion"]) for i in range(len(source))]


def test_every_form_writes_the_date_as_people_do() -> None:
    day = datetime.date(2024, 3, 7)
    assert [form(day) for form in FORMS] == [
        "March 7, 2024",
        "7 March 2024",
        "Thursday, March 7, 2024",
        "Thu 7 Mar 2024",
        "Mar 7th, 2024",
        "the 7th of March 2024",
        "7-Mar-2024",
        "2024, March 7",
        "7.3.2024",
    ]


def test_no_two_days_are_written_alike() -> None:
    days = [datetime.date(2023, 12, 1) + datetime.timedelta(days=n) for n in range(500)]
    for form in FORMS:
        assert len({form(day) for day in days}) == len(days)


def test_ordinals_follow_english_spelling() -> None:
    expected = "1st 2nd 3rd 4th 10th 11th 12th 13th 20th 21st 22nd 23rd 24th 30th 31st"
    numbers = [int(written[:-2]) for written in expected.split()]
    assert " ".join(ordinal(datetime.date(2024, 1, number)) for number in numbers) == expected


def test_every_day_is_in_exactly_one_split() -> None:
    days = days_by_split()
    assert sum(map(len, days.values())) == len(set().union(*days.values())) == 73_049
    assert {split: len(days[split]) // 1000 for split in days} == {"train": 65, "validation": 3, "test": 3}


def test_splits_are_the_same_on_every_machine() -> None:
    assert [split_of(datetime.date(1900, 1, number)) for number in range(1, 32)].count("train") == 30
    assert records_of("validation") == [
        ("1999, February 3", "1999-02-03"),
        ("the 21st of April 1922", "1922-04-21"),
        ("25-Jan-1915", "1915-01-25"),
    ]


def records_of(split: str) -> list[tuple[str, str]]:
    builder = object.__new__(RewriteDates)  # the generator alone needs no directory
    examples = builder._generate_examples(split, days_by_split()[split])
    return [(example["prompt"], example["completion"]) for _, example in examples][:3]


def test_the_prepared_dataset_has_right_answers_in_disjoint_splits(prepared: dict[str, list[tuple[str, str]]]) -> None:
    seen: dict[str, set[str]] = {}
    for split, size in SIZES.items():
        found = prepared[split]
        assert len(found) == size
        for prompt, completion in found:
            day = datetime.date.fromisoformat(completion)
            assert prompt in [form(day) for form in FORMS]
            assert split_of(day) == split
        assert len({prompt for prompt, _ in found}) > size * 0.9
        seen[split] = {completion for _, completion in found}
    assert not seen["train"] & (seen["validation"] | seen["test"])
    assert not seen["validation"] & seen["test"]


def test_a_second_preparation_gives_the_same_records(
    prepared: dict[str, list[tuple[str, str]]], tmp_path: Path
) -> None:
    assert {split: records(tmp_path, split) for split in SIZES} == prepared
