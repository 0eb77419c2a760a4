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
import functools
from collections.abc import Hashable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from peftjax import sharding
from peftjax.core import cli, distributed
from peftjax.core import workdir as workdirs
from peftjax.core.distributed import say_once
from peftjax.core.errors import UserError
from peftjax.core.listing import enumerate_some
from peftjax.core.preemption import Preemption
from peftjax.core.terminal import make_console
from peftjax.io.hf_files import find_model
from peftjax.io.json_files import read_json_if_any
from peftjax.report.data import PAGE
from peftjax.report.sweep_page import RESULTS, SWEEP_PAGE
from peftjax.report.wall_time import WallTime
from peftjax.training import agreement, alike, duration, resume, setup, space, start_from
from peftjax.training.alike import separating_fields
from peftjax.training.concurrency import concurrent_groups
from peftjax.training.config import Config
from peftjax.training.halving import Halving, find_rungs
from peftjax.training.member import Member
from peftjax.training.population import train_population
from peftjax.training.sweep_members import members
from peftjax.training.sweep_part import SweepPart, parse_part
from peftjax.training.sweep_results import best_result, read_entries, write_results
from peftjax.training.sweep_table import make_table
from peftjax.training.trained import stopped_early


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
        most: Maximum number of concurrent runs; 0: no limit; None: as many as fit the memory, see
            `concurrency.concurrent_groups`.
        reduction: The R of successive halving (see `training.halving`); 0: every run is trained to its end.
        part: The runs to train. Other jobs may train the other parts in the same workdir at the same time.

    Returns:
        The entries of sweep.json, one for each run, as `sweep_results.outcome` makes them; the best first, stopped runs
        last.

    Raises:
        UserError: As for `train`, for any of the runs; every run failed; or there are more parts than runs.
    """
    agreement.check_same_configs({member.name: member.config for member in runs})
    mine = part.of(populations(runs))
    with Preemption() as preemption, workdirs.claim(workdir, runs[0].config.model.path, shared=part.count > 1):
        for member in mine:
            workdirs.check(member.workdir, member.config.model.path)
        resolve_configs(mine)
        halving = None
        if reduction:
            rungs = find_rungs([member.config for member in runs], reduction)
            halving = Halving([member.workdir for member in runs], reduction, rungs)
            stops = {entry["run"]: entry.get("stopped", 0) for entry in read_entries(workdir)}
            for member in runs:
                member.stopped = stops.get(member.name, 0)
        waiting = [member for member in mine if not (member.stopped or finished(member))]
        if len(waiting) < len(mine):
            say_once(f"{len(mine) - len(waiting)} of {len(mine)} runs have already ended")
        clock = WallTime(workdir, shared=part.count > 1)
        waiting_alike = populations(waiting)
        for population in waiting_alike:
            for member in {one.config.method: one for one in reversed(population)}.values():  # the first of each method
                check_member(member)
        if separating := list(
            dict.fromkeys(name for one in waiting for name in separating_fields(waiting[0].config, one.config))
        ):
            say_once(f"runs with different values of {enumerate_some(separating, 4)} are trained by separate programs")
        groups = [group for population in waiting_alike for group in concurrent_groups(population, most)]

        def record() -> list[dict[str, Any]]:
            clock.save()
            return write_results(runs, workdir, mine)

        record()  # the reports of the runs link to the page
        try:
            for number, (population, width) in enumerate(groups, 1):
                title = f"population {number} of {len(groups)}"
                if width < len(population):
                    title += f", {len(population)} runs, {width} at a time"
                elif width > 1:
                    title += f", {width} side by side"
                say_once("\n  ".join([f"{title}:", *(one.name for one in population)]))
                train_population(population, preemption, width, halving, record)
                distributed.meet("all runs of the population have ended")
        finally:
            clock.save()
        found = record()
    if all(member.failed for member in mine):
        runs_of = "the sweep" if part.count == 1 else f"part {part}"
        raise UserError(f"every run of {runs_of} failed; the first: {mine[0].failed}")
    return found


def resolve_configs(runs: Iterable[Member]) -> None:
    """Complete the runs' configs so that they can be compared: lengths in steps, the dtype, and the options of
    method.start_from."""
    counted: dict[Hashable, int] = {}  # data of runs that differ elsewhere is opened once
    base_fields = functools.cache(lambda path, revision: read_json_if_any(find_model(path, revision) / "config.json"))

    def rows(config: Config) -> int:
        key = (config.model.path, config.model.revision, config.task, config.data)
        if key not in counted:
            task, data = setup.open_data(config, sharding.make_mesh(config.mesh.sizes))
            with contextlib.closing(data):
                counted[key] = duration.rows_of_epoch(config, task, data)
        return counted[key]

    for member in runs:
        config, model = member.config, member.config.model
        try:
            with resume.open_checkpoints(config, member.workdir) as checkpoints:
                fields = partial(base_fields, model.path, model.revision)
                config = resume.complete_config(config, checkpoints, partial(rows, config), fields)
                member.config, _ = start_from.resolve_options(config, member.workdir, checkpoints)
        except UserError as error:
            raise UserError(f"{member.name}: {error}") from None


def check_member(member: Member) -> None:
    """Check a run before any weights are read, as `check_fit` does; a message names the run."""
    mesh = sharding.make_mesh(member.config.mesh.sizes)
    try:
        task, data = setup.open_data(member.config, mesh)
        with contextlib.closing(data), resume.open_checkpoints(member.config, member.workdir) as checkpoints:
            config, _ = resume.resolve_config(member.config, task, data, member.workdir, checkpoints)
            setup.check_fit(config, task, data, mesh)
    except UserError as error:
        raise UserError(f"{member.name}: {error}") from None


def finished(member: Member) -> bool:
    """Whether the run is finished. Raises a UserError if its directory holds a run with another configuration."""
    with resume.open_checkpoints(member.config, member.workdir) as checkpoints:
        resume.check_workdir(member.config, member.workdir, checkpoints)
        latest = checkpoints.latest_step()
    if not latest or not (member.workdir / PAGE).exists():
        return False
    return latest == member.config.train.steps or stopped_early(member.config, member.workdir, latest)


def populations(runs: Iterable[Member]) -> list[list[Member]]:
    """The runs in groups that one program can train."""
    return alike.populations(runs, lambda member: member.config)


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
    fields, rest = space.split_arguments(argv)
    options = cli.parse_command(rest, "sweep", summary, options=add_options)
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
        if best := best_result(found, workdir):
            print(f"best {best.name}: {best}")


if __name__ == "__main__":
    cli.run(main)
