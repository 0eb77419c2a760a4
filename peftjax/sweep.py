"""Runs of one config that differ in some fields, side by side where one program can train them.

    python -m peftjax.sweep --config=configs/quickstart.py --workdir=runs/sweep \\
        --sweep.optim.learning_rate=1e-3,3e-3 --sweep.method.rank=4,8

trains one run for each combination, in a directory of its own in the workdir, where it leaves what
`python -m peftjax.train` with these values would: the same files, and the same numbers up to rounding. Run again, it
goes on with what is not finished. Runs that differ in nothing but `TOGETHER` are a population: one program computes the
gradients of all under vmap, so that the frozen base is in memory, read and decoded once for all of them.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
from flax import nnx
from jax.sharding import Mesh
from rich import box
from rich.console import Console
from rich.table import Table

from peftjax import adapters, methods, sharding, train
from peftjax import log as metrics
from peftjax.core import cli, distributed, variables
from peftjax.core import config as configs
from peftjax.core.errors import UserError
from peftjax.core.files import write_atomically
from peftjax.core.units import format_clock
from peftjax.data.rows import load_rows
from peftjax.io.checkpoint import Checkpoints
from peftjax.io.hf_files import resolve
from peftjax.tasks import base as tasks
from peftjax.training.step import TrainState, jitted_together

RESULTS = "sweep.json"
_PLACE = ("step", "kind", "seconds")  # of a line of metrics.jsonl, beside the scores
# Sections and fields that may differ within a population: they leave the structure of the model as it is, and the data.
TOGETHER = ("seed:", "optim.", "method.alpha:", "method.lr_ratio:")


@dataclasses.dataclass
class Member:
    """One run of a sweep: what it has in place of the config's own values, and how it failed, if it did."""

    values: dict[str, Any]
    config: Any
    workdir: Path
    failed: str = ""

    @property
    def name(self) -> str:
        return self.workdir.name


@dataclasses.dataclass
class Training:
    """A member under way."""

    member: Member
    run: train.Run
    state: TrainState
    checkpoints: Checkpoints
    log: metrics.Log = dataclasses.field(init=False)
    loss: jax.Array = dataclasses.field(init=False)  # of the last step


def members(path: str, overrides: Iterable[str], fields: Iterable[str], workdir: Path) -> list[Member]:
    """One for each combination of the values of `fields`, strings "--sweep.optim.learning_rate=1e-3,3e-3".

    Commas part the values; those of a field that has commas itself are parted by semicolons.

    Raises:
        UserError: there are no fields, one is given twice or without a value, two runs are the same, or a config is not
            valid.
    """
    swept: dict[str, list[str]] = {}
    for item in fields:
        name, _, text = item.removeprefix("--sweep.").partition("=")
        texts = [value.strip() for value in text.split(";" if ";" in text else ",")]
        if not all(texts):
            raise UserError(f"{item}: a field to sweep has values, --sweep.{name}=VALUE,VALUE,...")
        if name in swept:
            raise UserError(f"{item}: {name} is swept already; give all of its values at once, parted by commas")
        swept[name] = texts
    if not swept:
        raise UserError("nothing to sweep: name a field and its values, such as --sweep.optim.learning_rate=1e-4,3e-4")
    found: dict[str, Member] = {}
    for combination in itertools.product(*swept.values()):
        own = [f"--config.{name}={text}" for name, text in zip(swept, combination, strict=True)]
        config = configs.load(path, [*overrides, *own], method_defaults=methods.method_defaults)
        values = {name: _value(config, name) for name in swept}
        name = ",".join(f"{_short(field, swept)}={_told(value)}" for field, value in values.items())
        if name in found:
            raise UserError(f"two runs of the sweep are the same: {name}; take one of the two values away")
        found[name] = Member(values, config, workdir / quote(name, safe=",=+ "))
    return list(found.values())


def sweep(runs: Sequence[Member], workdir: Path, most: int = 0) -> list[dict[str, Any]]:
    """Train what is not finished, at most so many (0: any number) at a time, and write sweep.json.

    A run whose loss is not finite any more ends there, and the others go on.

    Returns what sweep.json holds: of each run its values and scores, or how it failed; the lowest loss first.

    Raises:
        ValueError: as `train.train`, of any of the runs; or every run has failed.
    """
    train.check_workdir(workdir)
    for member in runs:
        tasks.check(member.config)
    waiting = [member for member in runs if not finished(member)]
    if len(waiting) < len(runs):
        say(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished already")
    groups = populations(waiting, most)
    with distributed.Preemption() as preemption:
        for number, population in enumerate(groups, 1):
            several = f", {len(population)} side by side" if len(population) > 1 else ""
            say(f"population {number} of {len(groups)}{several}: {'; '.join(member.name for member in population)}")
            train_population(population, preemption)
    distributed.meet("all runs of the sweep have ended")
    found = sorted(
        map(outcome, runs), key=lambda one: one["scores"].get("eval_loss", one["scores"].get("loss", math.inf))
    )
    if jax.process_index() == 0:
        write_atomically(workdir / RESULTS, json.dumps(found, indent=2) + "\n")
    if all("failed" in one for one in found):
        raise ValueError(f"every run of the sweep failed; the first: {found[0]['failed']}")
    return found


def finished(member: Member) -> bool:
    """Whether the run has ended. Raises a ValueError where its directory holds a run with another configuration."""
    with train.make_checkpoints(member.config, member.workdir) as checkpoints:
        train.require_same_config(member.config, member.workdir, checkpoints)
        done = checkpoints.latest_step() == member.config.train.steps
    return done and (member.workdir / "report.html").exists()


def populations(runs: Sequence[Member], most: int = 0) -> list[list[Member]]:
    """The runs in groups of at most so many (0: any number) that one program can train."""
    groups: list[list[Member]] = []
    for member in runs:
        group = next((group for group in groups if _alike(group[0].config, member.config)), None)
        if group is None or len(group) == most:
            group = []
            groups.insert(0, group)  # the next one alike joins the newest
        group.append(member)
    return groups[::-1]


def train_population(population: Sequence[Member], preemption: distributed.Preemption) -> None:
    """Train the members to their end, from their newest checkpoints if there are any."""
    mesh = sharding.make_mesh(population[0].config.mesh)
    with jax.set_mesh(mesh), contextlib.ExitStack() as opened:
        for group in set_up(population, mesh, opened):
            train_side_by_side(group, preemption)


def set_up(population: Sequence[Member], mesh: Mesh, opened: contextlib.ExitStack) -> list[list[Training]]:
    """Load the base once and attach each member's adapters to a model that shares it; then parted, if need be: some may
    have been killed when others had saved already, and a method may have alpha in its structure."""
    config = population[0].config
    directory = resolve(config.model.path, config.model.revision)
    base = tasks.load_base(config, directory, load_rows(config, directory).labels, mesh)
    groups: dict[Any, list[Training]] = {}
    for member in population:
        run, state = train.setup(member.config, member.workdir, mesh, nnx.clone(base))
        checkpoints = opened.enter_context(train.make_checkpoints(member.config, member.workdir))
        state = train.resume(run, state, checkpoints)
        structure = nnx.split(adapters.active_view(run.model))[0]
        groups.setdefault((int(state.step), structure), []).append(Training(member, run, state, checkpoints))
    return list(groups.values())


def train_side_by_side(group: Sequence[Training], preemption: distributed.Preemption) -> None:
    """Train models of one structure, which are at the same step, to their end, and write the result of each."""
    config = group[0].run.config
    start, total = int(group[0].state.step), config.train.steps
    advance = make_advance(group)
    with contextlib.ExitStack() as opened:
        for one in group:
            options = {"total_steps": total, "resume_step": start, "enabled": jax.process_index() == 0, "quiet": True}
            one.log = opened.enter_context(metrics.Log(one.run.workdir, **options))
            train.introduce(one.run, one.state, one.log)
            if not start:
                train.evaluate(one.run, one.state, one.log)
        for one in group:
            one.run.window.reopen()
        began = time.perf_counter()
        for step in range(start + 1, total + 1):
            advance(step)
            stopping = preemption.reached()
            for one in group:
                log_step(one, step, stopping)
            going = [one for one in group if not one.member.failed]
            if not going:
                return
            for one in going:
                train.keep(one.run, one.state, step, one.log, one.checkpoints, stopping=stopping)
            if train.saving(config, step, stopping):
                for one in going:
                    one.run.window.reopen()  # nobody's speed counts the time that others took to save
            if train.logging(config, step):
                say(_progress(going, step, start, total, time.perf_counter() - began))
            if stopping and step < total:
                for one in going:
                    one.checkpoints.wait()
                raise train.preempted(step, total)
        for one in going:
            one.checkpoints.wait()
            train.finish(one.run, one.state, one.log)


def make_advance(group: Sequence[Training]) -> Callable[[int], None]:
    """A function that takes all of them a step further, whose number it is told."""
    first = group[0].run
    own = [_own_leaves(one.run) for one in group]
    shared = {path: leaf for path, leaf in first.frozen.items() if path not in own[0]}
    streams: dict[int, Any] = {}  # of a seed, one for all its members
    for one, leaves in zip(group, own, strict=True):
        one.run.frozen, one.run.eval_step = {**shared, **leaves}, first.eval_step
        one.run.batches = streams.setdefault(one.run.config.seed, one.run.batches)
    train_step = jitted_together([one.run.train_step for one in group], [one.state for one in group])

    def advance(step: int) -> None:
        batches = {seed: next(stream) for seed, stream in streams.items()}
        placed = {seed: train.shard(first, batch) for seed, batch in batches.items()}
        seeds = [one.run.config.seed for one in group]
        results = train_step([one.state for one in group], shared, own, [placed[seed] for seed in seeds])
        for one, seed, (state, measured) in zip(group, seeds, results, strict=True):
            one.state, one.loss = state, measured["loss"]
            if not one.member.failed:
                one.run.window.add(step, measured, batches[seed])

    return advance


def log_step(one: Training, step: int, stopping: bool) -> None:
    """`train.log_step`; a loss that is not finite any more is the end of this member alone."""
    if one.member.failed:
        return
    try:
        train.log_step(one.run, step, one.log, stopping=stopping)
    except train.NotFiniteError as error:
        one.member.failed = str(error)
        say(f"{one.member.name} ends here: {error}")


def outcome(member: Member) -> dict[str, Any]:
    """What became of a run: its values, and the scores of its last evaluation with its last loss, or how it failed."""
    scores: dict[str, float] = {}
    if not member.failed:
        for line in metrics.read_metrics(member.workdir / metrics.METRICS):
            names = ("loss",) if line["kind"] == "train" else [name for name in line if name not in _PLACE]
            scores |= {name: line[name] for name in names}
    failed = {"failed": member.failed} if member.failed else {}
    return {"run": member.name, "values": member.values, "scores": scores, **failed}


def table(found: Sequence[Mapping[str, Any]]) -> Table:
    """The outcomes as a table, a line a run."""
    made = Table(box=box.SIMPLE)
    fields = list(found[0]["values"])
    scores = list(dict.fromkeys(name for one in found for name in one["scores"]))
    for name in [_short(field, fields) for field in fields] + scores:
        made.add_column(name, justify="right")
    for one in found:
        values = [_told(value) for value in one["values"].values()]
        numbers = [f"{one['scores'][name]:.4g}" if name in one["scores"] else "" for name in scores]
        made.add_row(*values, *(["not finite"] + [""] * (len(scores) - 1) if "failed" in one else numbers))
    return made


def say(text: str) -> None:
    """Print a line, from one process."""
    if jax.process_index() == 0:
        print(text, flush=True)


def _alike(one: Any, other: Any) -> bool:
    """Whether runs with these configs can be of one population."""
    made = tasks.of(one).head is not None or one.model.init == "random"  # a part of the base is drawn from the seed
    free = tuple(field for field in TOGETHER if not (made and field == "seed:"))
    return all(line.startswith(free) for line in configs.differences(one, other))


def _own_leaves(run: train.Run) -> variables.FlatTree:
    """The frozen leaves that came with the method, such as LoRA's scales."""
    kinds = variables.flat(run.model)[1]
    return {path: leaf for path, leaf in run.frozen.items() if isinstance(kinds[path], variables.PeftConstant)}


def _progress(going: Sequence[Training], step: int, start: int, total: int, seconds: float) -> str:
    """The best and the worst loss, and the time left if it goes on as in these seconds."""
    ranked = sorted((float(one.loss), one.member.name) for one in going)
    ends = [f"{loss:.4g} {name}" for loss, name in dict.fromkeys((ranked[0], ranked[-1]))]
    clock = f"{format_clock(seconds)}, {format_clock(seconds / (step - start) * (total - step))} left"
    return "  ".join([f"step {step:>{len(str(total))}}/{total}", f"loss {' to '.join(ends)}", clock])


def _value(config: Any, field: str) -> Any:
    section, _, leaf = field.rpartition(".")
    return (config[section] if section else config)[leaf]


def _short(field: str, fields: Iterable[str]) -> str:
    """The field without its section, where this is clear."""
    leaf = field.rpartition(".")[2]
    return leaf if [other.rpartition(".")[2] for other in fields].count(leaf) == 1 else field


def _told(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the sweep")
    group.add_argument(
        "--sweep.FIELD", metavar="V,V", help="a field of the config and its values (parted by ; if they have commas)"
    )
    group.add_argument(
        "--together",
        type=int,
        default=0,
        metavar="N",
        help="at most so many runs side by side (default: all that can be)",
    )
    distributed.add_options(parser)


def main(argv: list[str]) -> None:
    summary = "Train a run for each combination of the values of some fields."
    fields = [argument for argument in argv if argument.startswith("--sweep.")]
    rest = [argument for argument in argv if argument not in fields]
    options = cli.parse(rest, "sweep", summary, options=add_options)
    if options.together < 0:
        raise UserError(f"--together={options.together} must be a number of runs, or 0 for all that can be")
    workdir = Path(options.workdir)
    runs = members(options.config, options.overrides, fields, workdir)
    distributed.start(options)
    found = sweep(runs, workdir, options.together)
    if jax.process_index() == 0:
        Console(width=None if sys.stdout.isatty() else 200).print(table(found))
        print(workdir / RESULTS)


if __name__ == "__main__":
    cli.run(main)
