"""Write train.jsonl and test.jsonl: conversations about dates, for configs/smollm2_chat_lora.py.

    python configs/data/date_chats/make.py

The dates and their formats come from the bundled dataset rewrite_dates. No day is in both files. In every second
conversation, the user also asks for the next day.
"""

import datetime
import itertools
import json
from pathlib import Path

from peftjax.data.rewrite_dates import FORMS, days_by_split, pseudorandom

QUESTIONS = (
    "Write this date in ISO 8601: {}",
    "What is {} as YYYY-MM-DD?",
    "{} in ISO format, please.",
    "Please convert the date {} to year-month-day.",
)
FOLLOW_UPS = ("And the day after?", "What about the next day?", "One day later?")
COUNTS = {"train": 400, "test": 60}


def conversation(split: str, number: int, days: list[datetime.date]) -> list[dict[str, str]]:
    chosen = itertools.count()
    pick = lambda options: options[pseudorandom(f"date_chats {split} {number} {next(chosen)}") % len(options)]  # noqa: E731
    day, form, question, follow_up = pick(days), pick(FORMS), pick(QUESTIONS), pick(FOLLOW_UPS)
    turns = [(question.format(form(day)), day.isoformat())]
    if number % 2:
        turns.append((follow_up, (day + datetime.timedelta(1)).isoformat()))
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]


def write(folder: Path) -> None:
    days = days_by_split()
    for split, count in COUNTS.items():
        records = [{"messages": conversation(split, number, days[split])} for number in range(count)]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write(Path(__file__).parent)
