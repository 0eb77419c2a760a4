"""A synthetic TFDS dataset: dates as people write them, to be rewritten as ISO 8601.

    prompt                         completion
    March 7, 2024                  2024-03-07
    Thursday, March 7, 2024        2024-03-07
    Thu 7 Mar 2024                 2024-03-07
    the 7th of March 2024          2024-03-07
    7-Mar-2024                     2024-03-07
    7.3.2024                       2024-03-07    (with dots, the day comes first)

Each day from 1900 to 2099 occurs in one split only, so training never sees a held-out answer. The day and the form of an
example are determined by the SHA-256 of its split and number, so they are the same on every machine.
"""

import datetime
import hashlib
from collections.abc import Callable, Iterator

import tensorflow_datasets as tfds

EXAMPLES = {"train": 20_000, "validation": 1_000, "test": 1_000}
HELD_OUT_PERCENT = {"validation": 5, "test": 5}
FIRST_DAY, LAST_DAY = datetime.date(1900, 1, 1), datetime.date(2099, 12, 31)

# Written out, because strftime and the calendar module depend on the locale.
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip


def weekday(day: datetime.date) -> str:
    return WEEKDAYS[day.weekday()]


def month(day: datetime.date) -> str:
    return MONTHS[day.month - 1]


def ordinal(day: datetime.date) -> str:
    """Return the day of the month as 1st, 2nd, 3rd, 4th, ..., 11th, 12th, 13th, ..., 21st, ..."""
    number = day.day
    suffix = "th" if number in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


FORMS: tuple[Callable[[datetime.date], str], ...] = (
    lambda day: f"{month(day)} {day.day}, {day.year}",
    lambda day: f"{day.day} {month(day)} {day.year}",
    lambda day: f"{weekday(day)}, {month(day)} {day.day}, {day.year}",
    lambda day: f"{weekday(day)[:3]} {day.day} {month(day)[:3]} {day.year}",
    lambda day: f"{month(day)[:3]} {ordinal(day)}, {day.year}",
    lambda day: f"the {ordinal(day)} of {month(day)} {day.year}",
    lambda day: f"{day.day}-{month(day)[:3]}-{day.year}",
    lambda day: f"{day.year}, {month(day)} {day.day}",
    lambda day: f"{day.day}.{day.month}.{day.year}",
)


class RewriteDates(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc]
    """Dates as people write them (`prompt`) and as ISO 8601 (`completion`); splits train, validation, test."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded, so there is no checksum file next to the code. To look for one, TFDS 4.9.10 would import
    # importlib_resources, which it does not install.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict({"prompt": tfds.features.Text(), "completion": tfds.features.Text()}),
            supervised_keys=("prompt", "completion"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        days = days_by_split()
        return {split: self._generate_examples(split, days[split]) for split in EXAMPLES}

    def _generate_examples(self, split: str, days: list[datetime.date]) -> Iterator[tuple[int, dict[str, str]]]:
        for index in range(EXAMPLES[split]):
            number = pseudorandom(f"{split} {index}")
            day, form = days[number // len(FORMS) % len(days)], FORMS[number % len(FORMS)]
            yield index, {"prompt": form(day), "completion": day.isoformat()}


def days_by_split() -> dict[str, list[datetime.date]]:
    """Return the days of each split, in order."""
    days: dict[str, list[datetime.date]] = {split: [] for split in EXAMPLES}
    for number in range(FIRST_DAY.toordinal(), LAST_DAY.toordinal() + 1):
        day = datetime.date.fromordinal(number)
        days[split_of(day)].append(day)
    return days


def split_of(day: datetime.date) -> str:
    """Return the split that a day belongs to."""
    percentile = pseudorandom(day.isoformat()) % 100
    for split, percent in HELD_OUT_PERCENT.items():
        if percentile < percent:
            return split
        percentile -= percent
    return "train"


def pseudorandom(text: str) -> int:
    """Return a pseudorandom number below 2^64 that depends only on `text`."""
    return int.from_bytes(hashlib.sha256(f"rewrite_dates 1 {text}".encode()).digest()[:8], "big")
