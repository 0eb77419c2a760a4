"""Train one run for each combination of field values or for each random draw, side by side in one program where possible.

    peftjax sweep --config=configs/quickstart.py --workdir=runs/sweep \\
        --sweep.optim.learning_rate=1e-3,3e-3 --sweep.method.rank=4,8

Each run has its own directory in the workdir, with the files that `peftjax train` with these values would write, and the same
numbers up to rounding. The same command resumes an interrupted sweep. Runs that differ only in fields that `training.alike`
allows form a population: one program computes the gradients of all of them under vmap, so that the frozen base is stored,
read and dequantized once.
"""

import argparse
import contextlib
import json
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax

from peftjax import sharding
from peftjax.core import cli, distributed
from peftjax.core import workdir as workdirs
from peftjax.core.config import flat
from peftjax.core.errors import UserError
from peftjax.core.files import write_atomically
from peftjax.core.preemption import Preemption
from peftjax.core.terminal import make_console
from peftjax.io.hf_files import enumerate_some
from peftjax.log import METRICS, PLACE, is_amount, read_metrics
from peftjax.report.sweep_page import RESULTS, SWEEP_PAGE, write_sweep_page
from peftjax.report.text import short_name, value_text
from peftjax.training import alike, duration, precision, space, start_from
from peftjax.training import config as configs
from peftjax.training.alike import separating_fields
from peftjax.training.config import Config
from peftjax.training.halving import Halving, find_rungs
from peftjax.training.member import Member, say
from peftjax.training.packing import pack
from peftjax.training.population import train_population
from peftjax.training.setup import check_fit, check_workdir, open_checkpoints, open_data, resolve_config
from peftjax.training.sweep_part import SweepPart, parse_part
from peftjax.training.sweep_table import make_table


def members(
    path: str, overrides: Sequence[str], fields: Iterable[str], workdir: Path, trials: int = 0, seed: int = 0
) -> list[Member]:
    """The runs of a sweep over `fields`, strings "--sweep.optim.learning_rate=1e-3,3e-3"; see `space.parse`.

    They are added to the fields that `get_sweep()` of the config file returns, or replace their values. If it returns several
    search spaces, this is done in each of them.

    Without `trials`, there is one run for each combination of the values. Otherwise there are `trials` random draws. Draws
    that are recorded in the workdir's sweep.json are read from there. A draw that repeats an earlier one is left out.

    Raises:
      UserError: There are no fields, one is given twice or without a value, two runs are the same, a config is invalid, or
        sweep.json records draws from other fields or values.
    """
    spaces = space.read_spaces(path, fields)
    swept = list(dict.fromkeys(name for each in spaces for name in each))
    if not swept:
        raise UserError(
            "nothing to sweep; name a field and its values, for example --sweep.optim.learning_rate=1e-4,3e-4, or define "
            "get_sweep() in the config file"
        )
    chosen = space.chosen_values(path, overrides, spaces, trials, seed)
    if trials:
        chosen = _recorded(spaces, seed, workdir, chosen)
    found: dict[str, Member] = {}
    for index, texts in enumerate(chosen):
        config = space.load(path, overrides, texts)
        values = flat(configs.to_dict(config))
        fixed = {name: values[name] for name in texts}
        name = ",".join(f"{short_name(field, swept)}={value_text(value)}" for field, value in fixed.items())
        if name in found and not trials:
            raise UserError(f"two runs of the sweep are the same: {name}; remove one of the two values")
        trial = {"seed": seed, "index": index, "drawn": texts} if trials else None
        found.setdefault(name, Member(fixed, config, workdir / quote(name, safe=",=+ "), trial))
    return list(found.values())


def _recorded(
    spaces: Sequence[space.Space], seed: int, workdir: Path, drawn: list[dict[str, str]]
) -> list[dict[str, str]]:
    """Replace the draws that sweep.json has recorded for this seed by the recorded ones.

    Raises:
      UserError: A recorded draw has other fields, or a value outside the lists and ranges.
    """
    file = workdir / RESULTS
    for trial in (entry["trial"] for entry in _entries(workdir) if entry.get("trial", {}).get("seed") == seed):
        texts = trial["drawn"]
        accepting = next((each for each in spaces if space.accepts(each, texts)), None)
        if accepting is None:
            values = ", ".join(f"{name}={text}" for name, text in texts.items())
            raise UserError(
                f"{file} records a draw from other fields or values: {values}; choose another workdir or another "
                "--search_seed"
            )
        if trial["index"] < len(drawn):
            drawn[trial["index"]] = {name: texts[name] for name in accepting}
    return drawn


def sweep(
    runs: Sequence[Member],
    workdir: Path,
    most: int | None = None,
    reduction: int = 0,
    part: SweepPart = SweepPart(),  # noqa: B008  it is immutable
) -> list[dict[str, Any]]:
    """Train the unfinished runs of a part, and write sweep.json and sweep.html at the start and whenever runs have ended.

    A run whose loss is not finite fails; the others continue.

    Args:
      runs: All runs.
      workdir: The directory of the sweep.
      most: Maximum number of concurrent runs; 0: no limit; None: as many as fit the memory, see `packing.pack`.
      reduction: The R of successive halving (see `training.halving`); 0: every run is trained to its end.
      part: The runs to train. Other jobs may train the other parts in the same workdir at the same time.

    Returns:
      The entries of sweep.json, one for each run: see `outcome`; lowest loss first, stopped runs last.

    Raises:
      UserError: As for `train`, for any of the runs; every run failed; or there are more parts than runs.
    """
    mine = part.of(populations(runs))
    with Preemption() as preemption, workdirs.claim(workdir, runs[0].config.model.path, shared=part.count > 1):
        for member in mine:
            workdirs.check(member.workdir, member.config.model.path)
        resolve(mine)
        halving = None
        if reduction:
            rungs = find_rungs([member.config for member in runs], reduction)
            halving = Halving([member.workdir for member in runs], reduction, rungs)
            stops = {entry["run"]: entry.get("stopped", 0) for entry in _entries(workdir)}
            for member in runs:
                member.stopped = stops.get(member.name, 0)
        waiting = [member for member in mine if not (member.stopped or finished(member))]
        if len(waiting) < len(mine):
            say(f"{len(mine) - len(waiting)} of {len(mine)} runs have already ended")
        waiting_alike = populations(waiting)
        for population in waiting_alike:
            for member in {one.config.method: one for one in reversed(population)}.values():  # the first of each method
                check_member(member)
        if separating := list(
            dict.fromkeys(name for one in waiting for name in separating_fields(waiting[0].config, one.config))
        ):
            say(f"runs with different values of {enumerate_some(separating, 4)} are trained by separate programs")
        groups = [group for population in waiting_alike for group in pack(population, most)]
        record = partial(write_results, runs, workdir, mine)
        record()  # the reports of the runs link to the page
        for number, (population, width) in enumerate(groups, 1):
            title = f"population {number} of {len(groups)}"
            if width < len(population):
                title += f", {len(population)} runs, {width} at a time"
            elif width > 1:
                title += f", {width} side by side"
            say("\n  ".join([f"{title}:", *(one.name for one in population)]))
            train_population(population, preemption, width, halving, record)
            distributed.meet("all runs of the population have ended")
        found = record()
    if all(member.failed for member in mine):
        raise UserError(f"every run of the sweep failed; the first: {mine[0].failed}")
    return found


def write_results(runs: Sequence[Member], workdir: Path, mine: Sequence[Member] | None = None) -> list[dict[str, Any]]:
    """Write sweep.json and sweep.html, from one process; returns the entries of sweep.json.

    Args:
      runs: All runs.
      workdir: The directory of the sweep.
      mine: The runs that this job trains (default: all). The failures of other runs are read from sweep.json.
    """
    own = {member.name for member in (runs if mine is None else mine)}
    others = [member for member in runs if member.name not in own]
    with workdirs.turn(workdir) if others and jax.process_index() == 0 else contextlib.nullcontext():
        failed = {entry["run"]: entry.get("failed", "") for entry in _entries(workdir)} if others else {}
        for member in others:
            member.failed = failed.get(member.name, "")
        found = sorted(map(outcome, runs), key=_rank)
        if jax.process_index() == 0:
            write_atomically(workdir / RESULTS, json.dumps(found, indent=2) + "\n")
            write_sweep_page(workdir)
    return found


def _rank(entry: Mapping[str, Any]) -> tuple[bool, float]:
    """The sort key of an entry of sweep.json: stopped runs come last, and among the others those without a loss."""
    loss = entry["scores"].get("eval_loss", entry["scores"].get("loss", math.nan))
    return "stopped" in entry, math.inf if math.isnan(loss) else loss


def resolve(runs: Iterable[Member]) -> None:
    """Complete the runs' configs so that they can be compared: lengths in steps, the dtype of a started run, and the options of
    method.start_from."""
    counted: dict[Hashable, int] = {}  # data of runs that differ elsewhere is opened once

    def rows(config: Config) -> int:
        key = (config.model.path, config.model.revision, config.task, config.data)
        if key not in counted:
            task, data = open_data(config, sharding.make_mesh(config.mesh.sizes))
            with contextlib.closing(data):
                counted[key] = duration.rows_of_epoch(config, task, data)
        return counted[key]

    for member in runs:
        try:
            member.config = duration.in_steps(member.config, partial(rows, member.config))
            with open_checkpoints(member.config, member.workdir) as checkpoints:
                if (identity := checkpoints.identity()) is not None:
                    member.config = precision.as_stored(member.config, identity["config"])
                member.config, _ = start_from.resolve(member.config, member.workdir, checkpoints)
        except UserError as error:
            raise UserError(f"{member.name}: {error}") from None


def check_member(member: Member) -> None:
    """Check a run before any weights are read, as `check_fit` does; a message names the run."""
    mesh = sharding.make_mesh(member.config.mesh.sizes)
    try:
        task, data = open_data(member.config, mesh)
        with contextlib.closing(data), open_checkpoints(member.config, member.workdir) as checkpoints:
            config, _ = resolve_config(member.config, task, data, member.workdir, checkpoints)
            check_fit(config, task, data, mesh)
    except UserError as error:
        raise UserError(f"{member.name}: {error}") from None


def finished(member: Member) -> bool:
    """Whether the run is finished. Raises a UserError if its directory holds a run with another configuration."""
    with open_checkpoints(member.config, member.workdir) as checkpoints:
        check_workdir(member.config, member.workdir, checkpoints)
        done = checkpoints.latest_step() == member.config.train.steps
    return done and (member.workdir / "report.html").exists()


def populations(runs: Iterable[Member]) -> list[list[Member]]:
    """The runs in groups that one program can train."""
    return alike.populations(runs, lambda member: member.config)


def outcome(member: Member) -> dict[str, Any]:
    """The entry of a run in sweep.json: its values, its last scores and amounts of data, and why it failed if it did.

    A run that has not started has no scores.
    """
    found: dict[str, float] = {}
    if not member.failed and (member.workdir / METRICS).exists():
        for line in read_metrics(member.workdir / METRICS):
            names = ("loss",) if line["kind"] == "train" else [name for name in line if name not in PLACE]
            found |= {name: line[name] for name in names}
    scores, amounts = (
        {name: value for name, value in found.items() if is_amount(name) == amount} for amount in (False, True)
    )
    entry = {"run": member.name, "values": member.values, "scores": scores, "amounts": amounts}
    special = {"failed": member.failed, "stopped": member.stopped, "trial": member.trial}
    return entry | {name: value for name, value in special.items() if value}


def _entries(workdir: Path) -> list[dict[str, Any]]:
    """The entries of sweep.json; none if it has not been written yet."""
    file = workdir / RESULTS
    return json.loads(file.read_text()) if file.exists() else []


def best_result(found: Sequence[Mapping[str, Any]], workdir: Path) -> Path:
    """The adapter of the run with the lowest loss, or in full fine-tuning its model."""
    directory = workdir / found[0]["run"]
    return directory / ("adapter" if (directory / "adapter").exists() else "model")


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sweep")
    group.add_argument(
        "--sweep.FIELD",
        metavar="V,V",
        help="Config field to sweep and its values (separated by ; if they contain commas); with --trials also "
        "uniform(LOW,HIGH) or loguniform(LOW,HIGH)",
    )
    space.add_search_options(group)
    group.add_argument(
        "--together",
        type=int,
        metavar="N",
        help="Maximum number of concurrent runs; 0: no limit (default: as many as fit the memory of the devices)",
    )
    group.add_argument(
        "--halving",
        type=int,
        default=0,
        metavar="R",
        help="Successive halving: after 1/R, 1/R^2, ... of the steps, continue only the best 1/R of the runs (default: "
        "train all runs to their end)",
    )
    group.add_argument(
        "--part",
        metavar="I/N",
        default="1/1",
        help="Train only part I of N, from 1; other jobs train the other parts in the same workdir (default: all runs)",
    )
    distributed.add_options(parser)


def main(argv: list[str]) -> None:
    summary = "Train one run for each combination of field values, or for each draw of a random search."
    fields, rest = cli.config_fields(argv, "--sweep.")
    options = cli.parse(rest, "sweep", summary, configs.describe(), options=add_options)
    if (options.together or 0) < 0:
        raise UserError(f"--together={options.together} must be a number of runs, or 0 for no limit")
    space.check_search_options(options)
    if options.halving < 0 or options.halving == 1:
        raise UserError(f"--halving={options.halving} must be at least 2, or 0 to train all runs to their end")
    part = parse_part(options.part)
    if options.halving and part.count > 1:
        raise UserError(
            f"--part={part} cannot be combined with --halving={options.halving}, which compares all runs of a sweep; omit "
            "one of them"
        )
    workdir = Path(options.workdir)
    runs = members(options.config, options.overrides, fields, workdir, options.trials, options.search_seed)
    distributed.start(options)
    found = sweep(runs, workdir, options.together, options.halving, part)
    if jax.process_index() == 0:
        make_console().print(make_table(found))
        print(f"results: {workdir / RESULTS}")
        print(f"page: {workdir / SWEEP_PAGE}")
        best = best_result(found, workdir)
        print(f"best {best.name}: {best}")


if __name__ == "__main__":
    cli.run(main)
