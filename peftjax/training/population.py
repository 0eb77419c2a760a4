"""Runs side by side in one program: gradients under vmap over one frozen base, then each run's own update."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from peftjax import sharding
from peftjax.core import distributed, output, variables
from peftjax.core import workdir as workdirs
from peftjax.core.errors import NotFiniteError
from peftjax.core.preemption import Preemption, stopped
from peftjax.core.progress import EVALUATING, Progress
from peftjax.core.units import format_clocks
from peftjax.data.batches import Batches
from peftjax.data.padding import pad_alike
from peftjax.io.checkpoint import Checkpoints
from peftjax.log import Log
from peftjax.models.base import Model
from peftjax.report.data import ReportData
from peftjax.totals import Batch
from peftjax.training.abstract import abstract_batch
from peftjax.training.alike import align_dropout, structure, unite
from peftjax.training.answers import Answer, answer_each
from peftjax.training.compile_ahead import CompileAhead
from peftjax.training.config import Config
from peftjax.training.evaluation import EvalStep
from peftjax.training.halving import Halving
from peftjax.training.hooks import NO_HOOKS
from peftjax.training.population_evaluation import (
    PopulationEvalStep,
    evaluate_population,
    make_population_eval_step,
)
from peftjax.training.run import Measured, Run
from peftjax.training.setup import attach_method, base_fingerprint, open_checkpoints, open_data, resolve_config
from peftjax.training.split import Parts, split
from peftjax.training.step import Metrics, TrainState, accumulate, apply, init_state, mesh_of, shardings, summary


@dataclasses.dataclass
class Member:
    """One run of a sweep.

    Attributes:
      values: The swept fields and their values.
      config: The whole configuration.
      workdir: The directory of the run.
      trial: In random search, the seed, the index of the draw and the drawn values as text.
      failed: Why the run failed; empty if it did not.
      stopped: The step at which successive halving stopped the run; 0 if it did not.
    """

    values: dict[str, Any]
    config: Config
    workdir: Path
    trial: dict[str, Any] | None = None
    failed: str = ""
    stopped: int = 0

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.workdir.name


@dataclasses.dataclass
class Training:
    """A member under way. `loss` is that of the last step.

    The members of a group share `united`, a model with the adapters of all of them (see `alike.unite`), `united_parts`, what
    its step is made of, and `eval_step`, which evaluates any of them.
    """

    member: Member
    run: Run
    parts: Parts
    state: TrainState
    checkpoints: Checkpoints
    united: Model
    log: Log = dataclasses.field(init=False)
    loss: jax.Array = dataclasses.field(init=False)
    united_parts: Parts = dataclasses.field(init=False)
    eval_step: PopulationEvalStep = dataclasses.field(init=False)

    @property
    def steps(self) -> int:
        """The number of steps of the run."""
        return self.run.config.train.steps

    @property
    def own_frozen(self) -> variables.FlatTree:
        """The frozen leaves that came with the method; zeros for adapters that only other members have."""
        united = own_leaves(self.united, self.united_parts.frozen)
        return variables.filled(own_leaves(self.run.model, self.run.frozen), united)

    @property
    def own(self) -> variables.FlatTree:
        """`own_frozen` and the trainable leaves, with such zeros."""
        return {**variables.filled(self.state.trainable, self.united_parts.trainable), **self.own_frozen}


PopulationStep = Callable[..., list[tuple[TrainState, Metrics]]]


def make_population_step(
    united: Parts, txs: Sequence[optax.GradientTransformation], states: Sequence[TrainState]
) -> PopulationStep:
    """The jitted step (states, shared, own, batches) -> [(state, metrics), ...] of runs that differ in their leaves alone.

    Leaves of different shapes, such as those of LoRAs of different ranks, are padded with zeros where the gradients are
    computed, and leaves that some runs lack are zero in these runs, there and only there: each state, update and moment has
    the leaves and the shapes that it has in a separate run.

    Args:
      united: What a step of the model with the adapters of all runs is made of. Its optimizer is not used.
      txs: The optimizer of each run.
      states: States with the shardings of those that the step gets. They are donated.

    The step's argument `shared` has the frozen leaves of all runs, such as the base, which is held, read and decoded once;
    `own` has the other frozen leaves of each run.
    """
    options = {"compiler_options": sharding.compiler_options(mesh_of(states[0]).devices.flat)}

    @partial(jax.jit, donate_argnums=0, out_shardings=[(shardings(state), None) for state in states], **options)
    def population_step(
        states: Sequence[TrainState],
        shared: variables.FlatTree,
        own: Sequence[variables.FlatTree],
        batches: Sequence[Batch],
    ) -> list[tuple[TrainState, Metrics]]:
        def gradients(state: TrainState, own: variables.FlatTree, batch: Batch) -> Any:
            return accumulate(united.objective, state, {**shared, **own}, batch)

        without_moments = [
            state._replace(optimizer=(), trainable=variables.filled(state.trainable, united.trainable))
            for state in states
        ]
        together = jax.vmap(gradients)(variables.stack(without_moments), variables.stack(own), variables.stack(batches))
        results = []
        for index, (tx, state) in enumerate(zip(txs, states, strict=True)):
            padded, totals = jax.tree.map(lambda leaf, index=index: leaf[index], together)
            gradient = variables.cut(padded, state.trainable)
            results.append((apply(tx, state, gradient), summary(gradient, totals)))
        return results

    return population_step


def train_population(population: Sequence[Member], preemption: Preemption, halving: Halving | None = None) -> None:
    """Train the members to their end or until `halving` stops them, each from its newest checkpoint if it has one."""
    preemption.begin()
    mesh = sharding.make_mesh(population[0].config.mesh.sizes)
    with jax.set_mesh(mesh), contextlib.ExitStack() as opened:
        groups = set_up(population, mesh, opened)
        if len(groups) > 1:
            names = "; ".join(" | ".join(one.member.name for one in group) for group in groups)
            say(f"the runs differ in structure or step and are trained by {len(groups)} separate programs: {names}")
        for group in groups:
            train_side_by_side(group, preemption, halving)


def set_up(population: Sequence[Member], mesh: Mesh, opened: contextlib.ExitStack) -> list[list[Training]]:
    """Load the base once and attach each member's adapters to a model that shares it.

    Returns:
      Groups of members at the same step that one program can train. Steps differ if a sweep was killed when only some
      members had saved. One program cannot train models that differ in structure, for example because an `init` of LoRA has
      a nonzero initial update.
    """
    for member in population:
        opened.enter_context(workdirs.claim(member.workdir, member.config.model.path))
    prepared = []
    for member in population:
        task, batches = open_data(member.config, mesh)
        checkpoints = opened.enter_context(open_checkpoints(member.config, member.workdir))
        config, source = resolve_config(member.config, task, batches, member.workdir, checkpoints)
        prepared.append((member, config, source, task, batches, checkpoints))
    _, config, _, task, *_ = prepared[0]
    shared = task.load_model(config.model, task.directory, mesh, config.seed)
    base = base_fingerprint(shared)
    models: list[Model] = [nnx.clone(shared) for _ in prepared]
    attached = [
        attach_method(config, task, model, mesh, source)
        for model, (_, config, source, task, _, _) in zip(models, prepared, strict=True)
    ]
    align_dropout(models)
    groups: list[list[Training]] = []
    for model, method, (member, config, _, task, batches, checkpoints) in zip(models, attached, prepared, strict=True):
        sharding.place(model, mesh)
        parts = split(config, task, model, method)
        run = Run(config, member.workdir, mesh, task, batches, method, model, parts, base, NO_HOOKS)
        run.report = ReportData(sweep=True)
        state = run.resume(init_state(parts.trainable, parts.tx, config.seed), checkpoints)
        join(Training(member, run, parts, state, checkpoints, model), groups)
    return groups


def join(one: Training, groups: list[list[Training]]) -> None:
    """Add a member to the first group that it can be trained with, or to a new one."""
    for group in groups:
        united = unite(group[0].united, one.united) if group[0].state.step == one.state.step else None
        if united is not None:
            group.append(one)
            for each in group:
                each.united = united
            return
    groups.append([one])


def train_side_by_side(group: Sequence[Training], preemption: Preemption, halving: Halving | None = None) -> None:
    """Train members of a group, all at the same step, to their last steps, and write their results.

    A member with fewer steps leaves when it is finished, or when `halving` stops it; the others continue in a program
    without it.
    """
    rungs = halving.rungs if halving else ()
    start, total = int(group[0].state.step), max(one.steps for one in group)
    first = jax.process_index() == 0
    with contextlib.ExitStack() as opened:
        progress = opened.enter_context(Progress(total, start, enabled=first))
        for one in group:
            log = Log(
                one.run.workdir,
                total_steps=one.steps,
                resume_step=start,
                enabled=first,
                tracking=one.run.tracking(sweep=True),
                quiet=True,
                progress=progress,
            )
            one.log = opened.enter_context(log)
        share(group, total - start)
        for one in group:
            one.run.introduce(one.state, one.log)
        going, done = list(group), start
        while going := stop_worst(going, done, halving) if halving and done in rungs else going:
            end = min([*(one.steps for one in going), *(rung for rung in rungs if rung > done)])
            going = train_until(end, going, done, total, preemption, progress)
            for one in going:
                if one.steps == end:
                    one.checkpoints.wait()
                    one.run.finish(one.state, one.log)
                    one.log.close()  # this run is finished, even if an error ends the others
            going, done = [one for one in going if one.steps > end], end


def train_until(
    end: int, group: Sequence[Training], done: int, total: int, preemption: Preemption, progress: Progress
) -> list[Training]:
    """Train members from step `done` to step `end`; returns those that have not failed.

    Raises:
      Preempted: The process was told to stop; all members are saved.
    """
    going = list(group)
    with make_advance(group, progress) as advance:
        if not done:
            evaluate(group)
        for one in group:
            one.run.window.reopen()
        for step in range(done + 1, end + 1):
            advance(step)
            stop = preemption.reached()
            for one in group:
                log_step(one, step, stop)
            saving = [one for one in _without_failed(group) if one.run.save_is_due(step) or stop]
            if saving:
                save(saving, step)
                for one in _without_failed(group):
                    one.run.window.reopen()  # no run's speed counts the time that others took to save
            if not (going := _without_failed(group)):
                return []
            if any(one.run.due.log(step) for one in going):
                _report(going, step, total, progress)
            if stop and step < total:
                for one in going:
                    one.checkpoints.wait()
                raise stopped(step, total, going[0].run.workdir.parent)
    return going


def stop_worst(group: Sequence[Training], step: int, halving: Halving) -> list[Training]:
    """End the members that are not among the best at a step; returns the others."""
    distributed.meet("the metrics of this step are written")
    losses = list(halving.losses(step))
    best = losses[: halving.count(len(losses))]
    for one in group:
        if one.member.name not in best:
            one.checkpoints.wait()
            one.log.close("stopped")
            one.member.stopped = step
            say(f"{one.member.name} stopped at step {step}: not among the best {len(best)} of {len(losses)} runs")
    halving.record()
    return [one for one in group if not one.member.stopped]


def save(group: Sequence[Training], step: int) -> None:
    """Save a checkpoint of each member. Members for which an evaluation is due are evaluated first."""
    scores = evaluate([one for one in group if one.run.due.eval(step)])
    for one in _without_failed(group):
        one.run.save(one.state, step, scores.get(one.member.name, {}), one.log, one.checkpoints)
        if jax.process_count() > 1:
            one.checkpoints.wait()  # the barriers of orbax have the same names in all saves: two at once would collide


def share(group: Sequence[Training], steps: int) -> None:
    """Share the base and the steps of the united model among all, the eval step of a single member among those of the same
    structure, and one stream of batches among those of a seed."""
    first, united = group[0].run, group[0].united
    shared = shared_leaves(first.model, first.frozen)
    parts = split(first.config, first.task, united, first.method)
    eval_step = make_population_eval_step(variables.flat(united)[0], first.task, first.mesh)
    streams: dict[int, Batches] = {}
    alone: dict[nnx.GraphDef, EvalStep] = {}
    for one in group:
        one.run.frozen = {**shared, **own_leaves(one.run.model, one.run.frozen)}
        one.run.eval_step = alone.setdefault(structure(one.run.model), one.run.eval_step)
        one.united_parts, one.eval_step = parts, eval_step
        one.run.batches = streams.setdefault(one.run.config.seed, one.run.batches)
    for stream in streams.values():
        if steps and not stream.ahead:
            stream.preview(steps)


def _without_failed(group: Sequence[Training]) -> list[Training]:
    return [one for one in group if not one.member.failed]


@contextlib.contextmanager
def make_advance(group: Sequence[Training], progress: Progress) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes all members to the step with the given number, compiled ahead in the `with` block."""
    first = group[0].run
    own = [one.own_frozen for one in group]
    shared = shared_leaves(first.model, first.frozen)
    streams = {one.run.config.seed: one.run.batches for one in group}
    empty, states = first.task.empty_row(), [one.state for one in group]
    population_step = make_population_step(group[0].united_parts, [one.parts.tx for one in group], states)

    def advance(step: int) -> None:
        batches = {seed: next(stream) for seed, stream in streams.items()}
        alike = pad_alike([batch.arrays for batch in batches.values()], empty)
        placed = {
            seed: first.shard(dataclasses.replace(batch, arrays=arrays))
            for (seed, batch), arrays in zip(batches.items(), alike, strict=True)
        }
        seeds = [one.run.config.seed for one in group]
        results = step_ahead([one.state for one in group], shared, own, [placed[seed] for seed in seeds])
        for one, seed, (state, metrics) in zip(group, seeds, results, strict=True):
            one.state, one.loss = state, metrics["loss"]
            if not one.member.failed:
                one.run.window.add(step, metrics, batches[seed])

    ahead = [[batch] * len(group) for batch in _batches_ahead(first, streams.values())]
    with CompileAhead(population_step, first.mesh, (states, shared, own), ahead, progress) as step_ahead:
        yield advance


def _batches_ahead(run: Run, streams: Iterable[Batches]) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """The shapes of the next batches. At each step, all streams have the length of the longest of their batches."""
    together = zip(*(stream.ahead for stream in streams), strict=False)
    longest = [{name: max((row[name] for row in rows), key=np.size) for name in rows[0]} for rows in together]
    return [abstract_batch(run.config, row, run.mesh) for row in longest]


def log_step(one: Training, step: int, stopping: bool) -> None:
    """`Run.log_step`; a loss that is not finite ends this member alone."""
    if one.member.failed:
        return
    try:
        one.run.log_step(step, one.log, stopping=stopping)
    except NotFiniteError as error:
        fail(one, error)


def evaluate(group: Sequence[Training]) -> dict[str, dict[str, float]]:
    """`Run.evaluate` of each member, by name. If logits are not finite, only that member fails."""
    scores = {}
    for one, measured in zip(group, measure(group), strict=True):
        try:
            scores[one.member.name] = one.run.evaluate(one.state, one.log, measured)
        except NotFiniteError as error:
            fail(one, error)
    return scores


def measure(group: Sequence[Training]) -> Sequence[Measured | None]:
    """The evaluation and the answers of each member, all found together; None where a member is evaluated alone."""
    if len(group) < 2 or not group[0].run.config.data.eval:
        return [None] * len(group)
    first, run, started = group[0], group[0].run, time.perf_counter()
    own = [one.own for one in group]
    shared = shared_leaves(run.model, run.frozen)
    with first.log.progress.phase(EVALUATING):
        batches, accumulate = run.held_out_batches(first.log), run.config.train.accumulate
        found = evaluate_population(first.eval_step, run.task, own, shared, batches, run.mesh, accumulate)
        answered: list[list[Answer] | NotFiniteError] = [[] for _ in group]
        if prompts := run.prompts():
            limit = run.config.eval.max_new_tokens
            answered = answer_each(first.united, own, shared, prompts, run.task.tokenizer, limit, first.log.progress)
    for one in group:
        one.run.timings["evaluation"] += (time.perf_counter() - started) / len(group)
    return [Measured(*both) for both in zip(found, answered, strict=True)]


def fail(one: Training, error: NotFiniteError) -> None:
    """End a member; the others go on."""
    one.member.failed = str(error)
    one.log.close("failed")
    say(f"{one.member.name} failed: {error}")


def say(text: str) -> None:
    """Print a line, from one process."""
    if jax.process_index() == 0:
        output.say(text)


def own_leaves(model: Model, frozen: variables.FlatTree) -> variables.FlatTree:
    """The frozen leaves that came with the method, such as LoRA's scales."""
    kinds = variables.flat(model)[1]
    return {path: leaf for path, leaf in frozen.items() if isinstance(kinds[path], variables.PeftConstant)}


def shared_leaves(model: Model, frozen: variables.FlatTree) -> variables.FlatTree:
    """The other frozen leaves, such as the base."""
    own = own_leaves(model, frozen)
    present = {path: leaf for path, leaf in frozen.items() if not isinstance(leaf, optax.MaskedNode)}
    return {path: leaf for path, leaf in present.items() if path not in own}


def _report(going: Sequence[Training], step: int, total: int, progress: Progress) -> None:
    """Print the lowest and the highest loss, and the remaining time."""
    ranked = sorted((float(one.loss), one.member.name) for one in going)
    ends = [f"{loss:.4g} {name}" for loss, name in dict.fromkeys((ranked[0], ranked[-1]))]
    loss = f"loss {' to '.join(ends)}"
    clock = format_clocks(time.perf_counter() - progress.began, progress.left.after(step))
    progress.report(loss, "  ".join([f"step {step:>{len(str(total))}}/{total}", loss, clock]))
