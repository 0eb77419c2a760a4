"""The outcomes of a sweep as a table that fits a terminal of 80 columns."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from peftjax.core.terminal import simple_table
from peftjax.report.comparison import compared_scores
from peftjax.report.ranking import rank, ranking_score
from peftjax.report.sweep_figures import SEED, varied_fields
from peftjax.report.text import format_spread, short_name, value_text

Outcome = Mapping[str, Any]  # an entry of sweep.json


def make_table(found: Sequence[Outcome]) -> Table:
    """The outcomes, the best first (see `ranking_score`): the fields that vary, the loss and the main score.

    Runs that differ only in their seeds share a row, with the mean of their scores and its standard deviation.
    """
    fields = dict.fromkeys(name for one in found for name in one["values"])
    varied = [name for name in varied_fields([one["values"] for one in found]) if name != SEED]
    groups: dict[str, list[Outcome]] = {}
    for one in found:
        groups.setdefault(repr([one["values"].get(name) for name in varied]), []).append(one)
    by = ranking_score(found)
    scores = list(dict.fromkeys([*compared_scores({name for one in found for name in one["scores"]}), by]))
    several = any(len(group) > 1 for group in groups.values())
    halved = any("stopped" in one for one in found)
    caption = "mean ± standard deviation over the seeds" if several else None
    table = simple_table(caption=caption)
    for name in [*(short_name(field, fields) for field in varied), *["seeds"] * several]:
        table.add_column(name, justify="right", overflow="fold")
    for name in scores:
        table.add_column(name.removeprefix("eval_").replace("_", " "), justify="right", no_wrap=True)
    if halved:
        table.add_column("stopped at", justify="right")
    for group in sorted(
        groups.values(), key=lambda group: (all("stopped" in one for one in group), rank(_means(group, scores), by))
    ):
        going = [one for one in group if "failed" not in one]
        count = str(len(group)) if len(going) == len(group) else f"{len(going)} of {len(group)}"
        cells = [format_spread(_values(group, name)) for name in scores] if going else ["not finite"]
        cells += [""] * (len(scores) - len(cells))
        if halved:
            cells.append(", ".join(dict.fromkeys(str(one["stopped"]) for one in group if "stopped" in one)))
        table.add_row(*(value_text(group[0]["values"].get(name, "")) for name in varied), *[count] * several, *cells)
    return table


def _values(group: Iterable[Outcome], name: str) -> list[float]:
    return [one["scores"][name] for one in group if name in one["scores"]]


def _means(group: Sequence[Outcome], names: Iterable[str]) -> dict[str, float]:
    """The means of the scores that runs of the group have."""
    return {name: statistics.fmean(values) for name in names if (values := _values(group, name))}
