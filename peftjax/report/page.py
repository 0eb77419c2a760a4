"""report.html: one run on one self-contained page.

It is made from the files of the workdir: config.json, metrics.jsonl, and report.json (`ReportData`), which holds everything
else. The page itself is run.html.j2.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftjax.core.config import flat_fields
from peftjax.core.errors import UserError
from peftjax.core.files import write_atomically
from peftjax.core.workdir import MARK
from peftjax.log import METRICS, read_metrics
from peftjax.report.cards import make_cards
from peftjax.report.charts import make_charts
from peftjax.report.data import DATA, PAGE, Answer, ReportData, read_recorded_object
from peftjax.report.html import render_page
from peftjax.report.outcome import concerns
from peftjax.report.tables import confusion_matrix, data_rows, most_confused
from peftjax.tasks.best import of_result, out_of_patience

_CONFIG = "config.json"


def write_report(workdir: Path) -> Path:
    """Write report.html into a run's directory and return its path. Files that are missing are left out of the report.

    Raises:
        UserError: The directory holds none of the files, or only the config.json of something else, such as a model; or one
            of them cannot be read.
    """
    if not any((workdir / name).exists() for name in (_CONFIG, METRICS, DATA)):
        raise UserError(
            f"--workdir={workdir} holds none of {_CONFIG}, {METRICS} and {DATA}, so it is not the workdir of a run; check the path"
        )
    marked = any((workdir / name).exists() for name in (MARK, METRICS, DATA))
    if not marked and not isinstance(read_recorded_object(workdir / _CONFIG).get("method"), dict):
        raise UserError(f"--workdir={workdir}: its {_CONFIG} does not belong to a run; check the path")
    write_atomically(workdir / PAGE, _render(workdir))
    return workdir / PAGE


def _render(workdir: Path) -> str:
    config = flat_fields(read_recorded_object(workdir / _CONFIG)) if (workdir / _CONFIG).exists() else {}
    lines = read_metrics(workdir / METRICS) if (workdir / METRICS).exists() else []
    data = ReportData.load(workdir)
    score = config.get("checkpoint.best_score", "eval_loss")
    result = of_result(lines, score, config.get("checkpoint.export", "last"))
    train = [line for line in lines if line["kind"] == "train"]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    return render_page(
        "run.html.j2",
        title=workdir.resolve().name,
        data=data,
        config=config,
        changed=_changed(config, flat_fields(data.default_config)),
        step=train[-1]["step"] if train else 0,
        stopped=lines[-1]["step"] if out_of_patience(lines, score, config.get("train.patience", 0)) else 0,
        result_step=result[-1]["step"] if result is not lines else None,
        concerns=concerns(result, data.classes),
        cards=make_cards(train, evaluations, [line for line in result if line["kind"] == "eval"], data),
        charts=make_charts(train, evaluations, data.loss_unit),
        peak_bytes=max((line.get("peak_memory_bytes", 0) for line in train), default=0),
        matrix=confusion_matrix(data.classes),
        confused=most_confused(data.classes),
        rows=data_rows(data, config),
        samples=_paired(data),
    )


def _paired(data: ReportData) -> list[tuple[Answer, Answer | None, Answer | None]]:
    """For each prompt, one sample of it, its answer before training and its answer after training."""
    before, after = ({(sample.record, sample.prompt): sample for sample in side} for side in (data.before, data.after))
    return [(sample, before.get(key), after.get(key)) for key, sample in (before | after).items()]


def _changed(config: Mapping[str, Any], default: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The fields that differ from their defaults, as (name, value, default); none if the defaults are not known."""
    return [(key, config[key], default.get(key)) for key in config if default and config[key] != default.get(key)]
