"""What the model card of a trained adapter says about its training: data, steps, optimizer and scores."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftjax.io.model_card import TrainingSummary
from peftjax.log import METRICS, PLACE, is_amount, read_metrics
from peftjax.report.data import Part, count_trained
from peftjax.tasks import Task
from peftjax.training.config import Config
from peftjax.training.optim import CUSTOM


def training_summary(config: Config, task: Task, workdir: Path, step: int, parts: Sequence[Part]) -> TrainingSummary:
    """What the card says about the training of a run, whose workdir has metrics.jsonl, after `step` steps."""
    lines = read_metrics(workdir / METRICS, last=step)
    trained, base = count_trained(parts)
    return TrainingSummary(
        task=task.card_task,
        head=task.head_options(config.model.new_head),
        facts={"Trainable parameters": f"{trained:,} ({trained / base:.2%} of the base)"} | _facts(config, task, step),
        scores=_scores(lines),
        data=_sources(config.data.eval),
    )


def _facts(config: Config, task: Task, step: int) -> dict[str, str]:
    optim, model, data = config.optim, config.model, config.data
    rows, size = ("sequences", f", at most {data.max_length:,} tokens each") if task.texts else (task.unit, "")
    custom = optim.name == CUSTOM  # an optax transformation, which the section does not describe
    schedule = f"{optim.schedule} schedule" + (
        f", {optim.warmup_steps:,} warmup step{'s' * (optim.warmup_steps > 1)}" if optim.warmup_steps else ""
    )
    facts = {
        "Task": f"`{config.task.kind}`",
        "Training data": _sources(data.train),
        "Training": f"{step:,} step{'s' * (step != 1)} of {config.train.batch_size:,} {rows}{size}; seed {config.seed}",
        "Optimizer": "custom" if custom else f"{optim.name}, learning rate {optim.learning_rate:g}, {schedule}",
        "Precision": model.dtype + (f", base in {model.quantize}" if model.quantize else ""),
    }
    return facts | ({"Started from": f"`{Path(config.start_from).name}`"} if config.start_from else {})


def _sources(sources: Sequence[str]) -> str:
    """Data sources, without local parent directories."""
    return ", ".join(f"`{_shown(source)}`" for source in sources)


def _shown(source: str) -> str:
    kind, colon, place = source.rpartition(":")
    local = kind in ("", "images") or place.startswith(("/", "~", "."))
    return kind + colon + (Path(place).name if local else place)


def _scores(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """The metrics of the last evaluation, with their values before the first step."""
    found = [line for line in lines if line["kind"] == "eval"]
    if not found or found[-1]["step"] == 0:
        return []
    before: Mapping[str, Any] = found[0] if found[0]["step"] == 0 else {}
    last = {name: value for name, value in found[-1].items() if name not in PLACE and not is_amount(name)}
    return [(name.removeprefix("eval_"), before.get(name, math.nan), value) for name, value in last.items()]
