"""report.html: one run on one page, a single file that needs nothing else.

It is made of what the workdir holds: config.json, metrics.jsonl, and report.json (`ReportData`) with what is in
neither. The page itself is template.html.j2.
"""

import functools
import importlib.resources
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftjax.core.errors import UserError
from peftjax.core.files import write_atomically
from peftjax.core.units import format_bytes
from peftjax.log import METRICS, SPEEDS, read_metrics
from peftjax.report.charts import Lines, charts, number, percent, scores, title
from peftjax.report.data import DATA, PAGE, ReportData, read_object


def write_report(workdir: Path) -> Path:
    """Write the workdir's report.html from what it holds; returns its path.

    Raises:
        UserError: there is nothing to report, or a file cannot be read.
    """
    import jinja2

    sources = [workdir / name for name in ("config.json", METRICS, DATA)]
    if not any(path.exists() for path in sources):
        raise UserError(
            f"--workdir={workdir} holds none of config.json, {METRICS} and {DATA}: no run has written there"
        )
    config = _flat(read_object(sources[0])) if sources[0].exists() else {}
    lines = read_metrics(sources[1]) if sources[1].exists() else []
    data = ReportData.load(workdir)
    train = [line for line in lines if line["kind"] == "train"]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    source = importlib.resources.files("peftjax.report").joinpath("template.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"bytes": format_bytes, "duration": format_duration, "visible": _visible}
    environment.filters["json"] = functools.partial(json.dumps, ensure_ascii=False)
    before, after = ({(sample.record, sample.prompt): sample for sample in side} for side in (data.before, data.after))
    default = _flat(data.default_config)
    page = environment.from_string(source).render(
        name=workdir.resolve().name,
        data=data,
        config=config,
        changed=[(key, config[key], default.get(key)) for key in config if default and config[key] != default.get(key)],
        step=train[-1]["step"] if train else 0,
        cards=_cards(train, evaluations, data),
        charts=charts(train, evaluations, config.get("task.kind", "causal_lm")),
        peak_bytes=max((line.get("peak_memory_bytes", 0) for line in train), default=0),
        samples=[(sample, before.get(key), after.get(key)) for key, sample in (before | after).items()],
    )
    write_atomically(workdir / PAGE, page)
    return workdir / PAGE


def _cards(train: Lines, evaluations: Lines, data: ReportData) -> list[tuple[str, str, str, str]]:
    """The headline numbers: (what, value, a line of explanation, value before training), the last two may be empty."""
    cards = []
    last = evaluations[-1] if evaluations else {}
    first = evaluations[0] if len(evaluations) > 1 and evaluations[0]["step"] == 0 else {}
    for score in scores(evaluations)[:1]:
        notes = [f"{100 * (last[score] - first[score]):+.1f} points"] if score in first else []
        notes += [f"{last['prompts']:,} held-out prompts"] if "prompts" in last else []
        before = percent(first[score]) if score in first else ""
        cards.append((title(score), percent(last[score]), " · ".join(notes), before))
    if "eval_loss" in last:
        both = " → ".join(number(line["perplexity"]) for line in (first, last) if "perplexity" in line)
        before = number(first["eval_loss"]) if "eval_loss" in first else ""
        cards.append(("Held-out loss", number(last["eval_loss"]), f"perplexity {both}" if both else "", before))
    base = sum(part.parameters for part in data.parts if not part.adapter)
    if data.parts:
        trained = sum(part.parameters for part in data.parts if part.trained)
        note = f"{trained / base:.2%} of the {base:,} in the base" if base else ""
        cards.append(("Trained parameters", f"{trained:,}", note, ""))
    if data.adapter_file_bytes:
        base_bytes = sum(part.bytes for part in data.parts if not part.adapter)
        note = f"beside a base of {format_bytes(base_bytes)}" if base else ""
        cards.append(("Adapter file", format_bytes(data.adapter_file_bytes), note, ""))
    if train:
        time = format_duration(max(line["seconds"] for line in [*train, *evaluations]))
        cards.append(("Wall time", time, f"{train[-1]['step']:,} steps, evaluation included", ""))
    for name in SPEEDS:
        if speeds := [line[name] for line in train if name in line]:
            cards.append((title(name), f"{statistics.median(speeds):,.0f}", "median over the run", ""))
    return cards


# Text


def format_duration(seconds: float) -> str:
    """A duration for people: 0.8 s, 42 s, 2 min 31 s, 3 h 12 min."""
    if round(seconds) < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds) // 60
    return f"{minutes} min {round(seconds) % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _visible(text: str) -> str:
    """The text with control characters as \\x1b, and half characters as question marks."""
    escapes = {code: f"\\x{code:02x}" for code in (*range(32), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
    return text.translate(escapes).encode("utf-8", "replace").decode("utf-8")


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """{"section.field": value}"""
    sections = {name: fields if isinstance(fields, Mapping) else {"": fields} for name, fields in config.items()}
    return {f"{name}.{key}".rstrip("."): value for name, fields in sections.items() for key, value in fields.items()}
