"""sweep.json and sweep.html: the outcomes of a sweep's runs."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from peftjax.core import workdir as workdirs
from peftjax.core.files import write_atomically
from peftjax.core.json_numbers import to_json
from peftjax.log import METRICS, PLACE, is_amount, read_metrics
from peftjax.report.data import read_recorded
from peftjax.report.ranking import rank, ranking_score
from peftjax.report.sweep_page import RESULTS, write_sweep_page
from peftjax.tasks.best import of_result
from peftjax.training.member import Member
from peftjax.training.sections import CheckpointConfig


def write_results(runs: Sequence[Member], workdir: Path, mine: Sequence[Member] | None = None) -> list[dict[str, Any]]:
    """Write sweep.json and sweep.html, from one process; returns the entries of sweep.json.

    `mine` are the runs that this job trains (default: all). The failures of the other runs are read from sweep.json.
    """
    own = {member.name for member in (runs if mine is None else mine)}
    others = [member for member in runs if member.name not in own]
    with workdirs.turn(workdir) if others and jax.process_index() == 0 else contextlib.nullcontext():
        failed = {entry["run"]: entry.get("failed", "") for entry in read_entries(workdir)} if others else {}
        for member in others:
            member.failed = failed.get(member.name, "")
        found = sort_entries(list(map(outcome, runs)))
        if jax.process_index() == 0:
            write_atomically(workdir / RESULTS, to_json(found, indent=2) + "\n")
            write_sweep_page(workdir)
    return found


def sort_entries(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of sweep.json, the best run first (see `ranking_score`). Runs without this score come after those with it,
    and stopped runs last."""
    by = ranking_score(entries)
    return sorted(entries, key=lambda entry: ("stopped" in entry, rank(entry["scores"], by)))


def outcome(member: Member) -> dict[str, Any]:
    """The entry of a run in sweep.json: its values, its last scores and amounts of data, and why it failed if it did.

    A run that has not started has no scores. `best_score` is in the entry if it was set in the config.
    """
    found: dict[str, float] = {}
    checkpoint = member.config.checkpoint
    if not member.failed and (member.workdir / METRICS).exists():
        lines = read_metrics(member.workdir / METRICS)
        for line in of_result(lines, checkpoint.best_score, checkpoint.export):
            names = ("loss",) if line["kind"] == "train" else [name for name in line if name not in PLACE]
            found |= {name: line[name] for name in names}
    scores, amounts = (
        {name: value for name, value in found.items() if is_amount(name) == amount} for amount in (False, True)
    )
    entry = {"run": member.name, "values": member.values, "scores": scores, "amounts": amounts}
    chosen = checkpoint.best_score if checkpoint.best_score != CheckpointConfig().best_score else ""
    special = {"failed": member.failed, "stopped": member.stopped, "trial": member.trial, "best_score": chosen}
    return entry | {name: value for name, value in special.items() if value}


def read_entries(workdir: Path) -> list[dict[str, Any]]:
    """The entries of sweep.json; none if it has not been written yet."""
    file = workdir / RESULTS
    return read_recorded(file) if file.exists() else []


def best_result(found: Sequence[Mapping[str, Any]], workdir: Path) -> Path | None:
    """The adapter, or in full fine-tuning the model, of the best run that has one; None if no run has."""
    results = (workdir / entry["run"] / name for entry in found for name in ("adapter", "model"))
    return next((path for path in results if path.exists()), None)
