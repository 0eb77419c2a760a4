"""sweep.html: the runs of a sweep with their swept values and scores, and links to their reports.

It is made from sweep.json, which the sweep writes at its start and after each population. The report of each run links back
to it.
"""

from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from peftjax.core.errors import UserError
from peftjax.core.files import write_atomically
from peftjax.log import is_amount
from peftjax.report.data import PAGE, read_json
from peftjax.report.html import render

RESULTS, SWEEP_PAGE = "sweep.json", "sweep.html"


class SweptRun(NamedTuple):
    """One row of the page.

    Attributes:
        name: The name of the run's directory.
        values: The swept fields and their values.
        scores: The metrics.
        failed: Why the run failed; empty if it did not.
        stopped: The step at which successive halving stopped the run; 0 if it did not.
        link: The relative link to its report; empty if it has none.
    """

    name: str
    values: dict[str, Any]
    scores: dict[str, float]
    failed: str
    stopped: int
    link: str


def write_sweep_page(workdir: Path) -> Path:
    """Write sweep.html into the directory of a sweep and return its path.

    Raises:
        UserError: sweep.json is not what the sweep writes.
    """
    path = workdir / RESULTS
    try:
        runs = [_run(workdir, **entry) for entry in read_json(path)]
    except TypeError as error:
        raise UserError(f"{path} is not the result of a sweep: {error}; run the sweep again") from None
    page = render(
        "sweep.html.j2",
        title=workdir.resolve().name,
        runs=runs,
        ranked_by=next((name for run in runs for name in ("eval_loss", "loss") if name in run.scores), ""),
        fields=list(dict.fromkeys(field for run in runs for field in run.values)),
        scores=[
            score for score in dict.fromkeys(score for run in runs for score in run.scores) if not is_amount(score)
        ],
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
    **more: Any,
) -> SweptRun:
    del more
    there = (workdir / run / PAGE).exists()
    return SweptRun(run, values, scores, failed, stopped, f"{quote(run)}/{PAGE}" if there else "")
