"""sweep.html: the plots of a sweep, its best run, and its runs with their values, scores and links to their reports.

It is made from sweep.json, which the sweep writes at its start and whenever runs have ended. The report of each run links back
to it.
"""

from pathlib import Path
from typing import Any
from urllib.parse import quote

from peftjax.core.errors import UserError
from peftjax.core.files import write_atomically
from peftjax.core.json_numbers import with_numbers
from peftjax.log import METRICS, is_amount, read_metrics
from peftjax.report.data import PAGE, ReportData, read_recorded
from peftjax.report.html import render_page
from peftjax.report.ranking import rank, ranking_score
from peftjax.report.sweep_figures import SweptRun, best_rows, cost_cards, make_figures, time_cards
from peftjax.report.wall_time import read_wall_time

RESULTS, SWEEP_PAGE = "sweep.json", "sweep.html"


def write_sweep_page(workdir: Path) -> Path:
    """Write sweep.html into the directory of a sweep and return its path.

    Raises:
        UserError: sweep.json is not what the sweep writes.
    """
    path = workdir / RESULTS
    entries = read_recorded(path)
    try:
        runs = [_run(workdir, **entry) for entry in entries]
    except TypeError as error:
        raise UserError(f"{path} is not the result of a sweep: {error}; run the sweep again") from None
    ranked_by = ranking_score(entries)
    runs.sort(key=lambda run: (run.stopped > 0, rank(run.scores, ranked_by)))
    page = render_page(
        "sweep.html.j2",
        title=workdir.resolve().name,
        runs=runs,
        ranked_by=ranked_by if any(ranked_by in run.scores for run in runs) else "",
        fields=list(dict.fromkeys(field for run in runs for field in run.values)),
        scores=list(dict.fromkeys(score for run in runs for score in run.scores if not is_amount(score))),
        cards=[*cost_cards(runs), *time_cards(runs, read_wall_time(workdir))],
        best=best_rows(runs, ranked_by, workdir),
        figures=make_figures(runs, ranked_by),
    )
    write_atomically(workdir / SWEEP_PAGE, page)
    return workdir / SWEEP_PAGE


def _run(
    workdir: Path,
    *,
    run: str,
    values: dict[str, Any],
    scores: dict[str, float],
    failed: str = "",
    stopped: int = 0,
    **_: Any,
) -> SweptRun:
    directory = workdir / run
    link = f"{quote(run)}/{PAGE}" if (directory / PAGE).exists() else ""
    lines = read_metrics(directory / METRICS) if (directory / METRICS).exists() else []
    counts = ReportData.load(directory).counts if link or failed or stopped else {}
    return SweptRun(run, values, with_numbers(scores), failed, link, lines, counts, stopped)
