"""The headline numbers at the top of the page."""

import statistics
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from peftjax.core.units import format_bytes
from peftjax.log import speeds
from peftjax.report.charts import Lines, main_scores
from peftjax.report.data import ReportData, count_trained
from peftjax.report.text import field_title, format_duration, format_number, format_percent
from peftjax.tasks.metrics import OF_ANSWERS


class Card(NamedTuple):
    """One headline number.

    Attributes:
        label: What it is.
        value: Its value after training, or so far.
        note: A line of explanation; may be empty.
        before: Its value before training; may be empty.
    """

    label: str
    value: str
    note: str = ""
    before: str = ""


def make_cards(train: Lines, evaluations: Lines, of_result: Lines, data: ReportData) -> list[Card]:
    """Return the headline numbers for which there is data, from the training and the evaluation lines of metrics.jsonl.

    `of_result` are the evaluations up to the step whose weights are the run's result.
    """
    return [*_evaluation_cards(of_result), *_size_cards(data), *_speed_cards(train, evaluations)]


def _evaluation_cards(evaluations: Lines) -> Iterator[Card]:
    last: Mapping[str, Any] = evaluations[-1] if evaluations else {}
    first: Mapping[str, Any] = evaluations[0] if len(evaluations) > 1 and evaluations[0]["step"] == 0 else {}
    prompts = [f"{last['prompts']:,} held-out prompts"] if "prompts" in last else []
    for score in main_scores(evaluations)[:1]:
        notes = [f"{100 * (last[score] - first[score]):+.1f} points"] if score in first else []
        notes += prompts if score in OF_ANSWERS else []
        before = format_percent(first[score]) if score in first else ""
        yield Card(field_title(score), format_percent(last[score]), " · ".join(notes), before)
    if "bleu" in last:  # from 0 to 100, not a fraction
        note = "".join(prompts)
        yield Card("BLEU", format_number(last["bleu"]), note, format_number(first["bleu"]) if "bleu" in first else "")
    if "eval_loss" in last:
        both = " → ".join(format_number(line["perplexity"]) for line in (first, last) if "perplexity" in line)
        before = format_number(first["eval_loss"]) if "eval_loss" in first else ""
        yield Card("Held-out loss", format_number(last["eval_loss"]), f"perplexity {both}" if both else "", before)


def _size_cards(data: ReportData) -> Iterator[Card]:
    base = [part for part in data.parts if not part.adapter]
    trained, parameters = count_trained(data.parts)
    if data.parts:
        note = f"{trained / parameters:.2%} of the {parameters:,} in the base" if parameters else ""
        yield Card("Trainable parameters", f"{trained:,}", note)
    if data.adapter_file_bytes:
        note = f"for a base of {format_bytes(sum(part.bytes for part in base))}" if parameters else ""
        yield Card("Adapter file", format_bytes(data.adapter_file_bytes), note)


def _speed_cards(train: Lines, evaluations: Lines) -> Iterator[Card]:
    if train:
        time = format_duration(max(line["seconds"] for line in [*train, *evaluations]))
        yield Card("Wall time", time, f"{train[-1]['step']:,} steps, including evaluation")
    for name, values in speeds(train).items():
        yield Card(field_title(name), f"{statistics.median(values):,.0f}", "median over the run")
