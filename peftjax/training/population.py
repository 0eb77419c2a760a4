"""Runs side by side in one program: gradients under vmap over one frozen base, then each run's own update."""

import collections
import contextlib
import dataclasses
import heapq
import math
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from peftjax import sharding
from peftjax.core import distributed, variables
from peftjax.core.distributed import say_once
from peftjax.core.errors import NotFiniteError
from peftjax.core.preemption import Preemption, stopped
from peftjax.core.progress import EVALUATING, Progress
from peftjax.core.units import format_clocks
from peftjax.data.batches import Batches
from peftjax.data.padding import pad_alike
from peftjax.log import Log
from peftjax.report.data import Answer
from peftjax.training.abstract import abstract_batch
from peftjax.training.answers import answer_each
from peftjax.training.compile_ahead import CompileAhead
from peftjax.training.halving import Halving
from peftjax.training.member import LiveMember, Member, without_failed
from peftjax.training.population_evaluation import evaluate_population
from peftjax.training.run import Measured
from peftjax.training.step import TrainState
from peftjax.training.united import United, unite_runs


def train_population(
    members: Sequence[Member], preemption: Preemption, width: int, halving: Halving | None, record: Callable[[], object]
) -> None:
    """Train runs to their end or until `halving` stops them, each from its newest checkpoint if it has one.

    `width` is the maximum number of concurrent runs; the others wait, and take the places of those that end. `record` is called
    after runs have ended.
    """
    preemption.begin()
    mesh = sharding.split_members(sharding.make_mesh(members[0].config.mesh.sizes), width)
    with jax.set_mesh(mesh):
        groups = unite_runs(members, mesh)
        if len(groups) > 1:
            names = "; ".join(" | ".join(member.name for member in united.members) for united in groups)
            say_once(f"the runs differ in structure and are trained by {len(groups)} separate programs: {names}")
        for united in groups:
            Population(united, width, halving, record).train(preemption)


class Population:
    """Runs that are trained side by side.

    Attributes:
        live: The runs that are being trained.
        waiting: The runs that take the places of those that end.
        width: The number of places in the program, a multiple of the number of devices that split the runs. If there
            are fewer live runs, the first one also fills the free places: compiling a smaller program would take
            longer.
    """

    def __init__(self, united: United, width: int, halving: Halving | None, record: Callable[[], object]) -> None:
        self.live: list[LiveMember] = []
        self.waiting = collections.deque(united.members)
        self._united, self._halving, self._record = united, halving, record
        self.width = self._divisible(min(width, len(self.waiting)))

    def train(self, preemption: Preemption) -> None:
        """Train all runs.

        Raises:
            Preempted: The process was told to stop; all live runs are saved.
        """
        with self.start():
            while self.live:
                self._step(preemption.reached)
                self._renew(self.live)

    @contextlib.contextmanager
    def start(self) -> Iterator[None]:
        """Open the first runs, up to the width, and evaluate those that start at step 0."""
        with contextlib.ExitStack() as self._opened:
            first = self._open()
            self._done = min(one.step for one in first)  # steps of the program; each run has its own step
            self._progress = Progress(self._done, self._done, enabled=jax.process_index() == 0)
            self._opened.enter_context(self._progress)
            self._begin(first, tracked=True)
            with self._compile_ahead() as self._gradients:
                self._renew(first)
                yield

    def _open(self) -> list[LiveMember]:
        """Give the free places to waiting runs."""
        opened = []
        while self.waiting and len(self.live) < self.width:
            one = self._united.open(self.waiting.popleft())
            self._opened.push(one.opened)
            opened.append(one)
            self.live.append(one)
        return opened

    def _begin(self, opened: Sequence[LiveMember], *, tracked: bool) -> None:
        """Start runs: open their logs, and evaluate those at step 0. Runs of the same seed and step share their batches.

        A tracker that cannot start a run ends the sweep if `tracked`; otherwise this run is not logged to it.
        """
        streams: dict[tuple[int, int], Batches] = {}
        for one in opened:
            config = one.run.config
            stream = streams.setdefault((config.seed, one.step), one.run.batches)
            if stream is not one.run.batches:
                one.run.batches.close()
            one.run.batches = stream
            if one.step < one.last and not stream.ahead:
                stream.preview(one.last - one.step)
            log = Log(
                one.run.workdir,
                total_steps=one.last,
                resume_step=one.step,
                enabled=jax.process_index() == 0,
                tracking=one.run.tracking(sweep=True, required=tracked),
                quiet=True,
                progress=self._progress,
            )
            one.log = one.opened.enter_context(log)
            one.run.introduce(one.state, one.log)
        self._progress.expect(*self._expected())
        self._evaluate([one for one in opened if not one.step])
        for one in opened:
            one.run.window.reopen()

    def _compile_ahead(self) -> CompileAhead:
        """The jitted gradients, compiled ahead for the next batches of the members."""
        united, first = self._united, self.live[0].run
        together = zip(*(stream.ahead for stream in self._streams()), strict=False)
        # at each step, all batches are padded to the length of the longest
        longest = [{name: max((row[name] for row in rows), key=np.size) for name in rows[0]} for rows in together]
        ahead = [[abstract_batch(first.config, row, first.mesh)] * self.width for row in longest]
        return CompileAhead(united.gradients, first.mesh, self._inputs(), ahead, self._progress)

    def _inputs(self) -> tuple[list[TrainState], variables.FlatTree, list[variables.FlatTree]]:
        """The arguments of the gradients, except the batches."""
        places = repeated(self.live, self.width)
        return self._united.states(places), self._united.shared, self._united.own_frozen(places)

    def _streams(self) -> list[Batches]:
        return list(dict.fromkeys(one.run.batches for one in self.live))

    def _step(self, preempted: Callable[[], bool]) -> None:
        """Train each live run for one step, then log and save what is due."""
        self.advance()
        self._done += 1
        self._progress.advance(self._done)
        stop, logged = preempted(), [one for one in self.live if one.run.due.log(one.step)]
        for one in self.live:
            one.log_step(stopping=stop)
        if logged:
            self._progress.computed(self._done)
        if saving := [one for one in without_failed(self.live) if one.run.save_is_due(one.step) or stop]:
            self._save(saving)
            for one in without_failed(self.live):
                one.run.window.reopen()  # no run's speed counts the time that others took to save
        if going := without_failed(logged):
            self._report(going)
        going = without_failed(self.live)
        if stop and (self.waiting or not all(one.done for one in going)):
            for one in going:
                one.checkpoints.wait()
            raise stopped(self._done, self._expected()[0], self.live[0].run.workdir.parent)

    def advance(self) -> None:
        """Update each member."""
        first = self.live[0].run
        batches = {stream: next(stream) for stream in self._streams()}
        alike = pad_alike([batch.arrays for batch in batches.values()], first.task.empty_row())
        placed = {
            stream: first.shard(dataclasses.replace(batch, arrays=arrays))
            for (stream, batch), arrays in zip(batches.items(), alike, strict=True)
        }
        gradients = self._gradients(
            *self._inputs(), [placed[one.run.batches] for one in repeated(self.live, self.width)]
        )
        for index, one in enumerate(self.live):
            one.state, metrics = one.update(one.state, gradients, index, one.run.config.optim.learning_rate)
            one.loss, one.step = metrics["loss"], one.step + 1
            one.run.window.add(one.step, metrics, batches[one.run.batches])

    def _renew(self, reached: Sequence[LiveMember]) -> None:
        """End the runs that have finished, failed or been stopped, and let others take their places.

        `reached` are the runs whose step has changed.
        """
        while reached:
            before = len(self.live)
            self._end(without_failed(reached))
            if len(self.live) < before:
                distributed.meet("some runs have ended")
                self._record()
                self._progress.expect(*self._expected())
            if reached := self._open():
                self._begin(reached, tracked=False)
        if not self.waiting and 2 * len(self.live) <= self.width:
            self.width = self._divisible(len(self.live))

    def _divisible(self, count: int) -> int:
        """The number of places for `count` runs, rounded up to a multiple of the devices that split them."""
        split = self._united.mesh.shape.get(sharding.MEMBERS, 1)
        return -(-count // split) * split

    def _end(self, reached: Sequence[LiveMember]) -> None:
        """End those of some runs that have finished or that halving stops, and forget those that have failed."""
        for one in reached:
            if one.done:
                one.finish()
        if self._halving:
            for step in sorted({one.step for one in reached} & set(self._halving.rungs)):
                stop_worst([one for one in reached if one.step == step and not one.done], step, self._halving)
        streams = self._streams()
        self.live = [one for one in self.live if not (one.member.failed or one.member.stopped or one.done)]
        for stream in set(streams) - set(self._streams()):
            stream.close()

    def _save(self, members: Sequence[LiveMember]) -> None:
        """Save a checkpoint of each member. Members for which an evaluation is due are evaluated first."""
        scores = self._evaluate([one for one in members if one.run.due.eval(one.step)])
        for one in without_failed(members):
            one.run.save(one.state, one.step, scores.get(one.member.name, {}), one.log, one.checkpoints)
            if jax.process_count() > 1:
                one.checkpoints.wait()  # the barriers of orbax have the same names in all saves: two at once would collide

    def _evaluate(self, members: Sequence[LiveMember]) -> dict[str, dict[str, float]]:
        """`Run.evaluate` of each member, by name. If logits are not finite, only that member fails."""
        scores = {}
        for one, measured in zip(members, self._measure(members), strict=True):
            try:
                scores[one.member.name] = one.run.evaluate(one.state, one.log, measured)
            except NotFiniteError as error:
                one.fail(error)
        return scores

    def _measure(self, members: Sequence[LiveMember]) -> Sequence[Measured | None]:
        """The evaluation and the answers of each member, from one program; None if each is evaluated alone."""
        if not members or self.width == 1 or not members[0].run.config.data.eval:
            return [None] * len(members)
        united, run, started = self._united, members[0].run, time.perf_counter()
        # Rounded up to a power of two, so that few programs are compiled.
        size = self._divisible(min(self.width, 2 ** (len(members) - 1).bit_length()))
        own = united.own(repeated(members, size))
        with self._progress.phase(EVALUATING):
            batches, accumulate = run.held_out_batches(members[0].log), run.config.train.accumulate
            found = evaluate_population(united.eval_step, run.task, own, united.shared, batches, run.mesh, accumulate)
            answered: list[list[Answer] | NotFiniteError] = [[] for _ in own]
            if prompts := run.prompts():
                limit = run.config.eval.max_new_tokens
                answered = answer_each(
                    united.model, own, united.shared, prompts, run.task.tokenizer, limit, self._progress
                )
        for one in members:
            one.run.timings["evaluation"] += (time.perf_counter() - started) / len(members)
        return [Measured(found[index], answered[index]) for index in range(len(members))]

    def _expected(self) -> tuple[int, list[int]]:
        """The number of steps of the program if no run is stopped, and the steps after which runs are evaluated."""
        free, evaluated, last = [self._done] * self.width, set[int](), self._done
        live = [(one.run.config, one.step) for one in self.live]
        for config, done in [*live, *((one.config, 0) for one in self.waiting)]:
            steps, every = config.train.steps, config.train.eval_every
            assert isinstance(every, int)  # resolved by `duration.in_steps`
            start = heapq.heappop(free) - done
            heapq.heappush(free, start + steps)
            evaluations = range(every, steps, every) if every else ()
            evaluated |= {start + step for step in (*evaluations, steps) if step > done}
            last = max(last, start + steps)
        return last, sorted(evaluated)

    def _report(self, members: Sequence[LiveMember]) -> None:
        """Print the lowest and the highest loss, and the remaining time."""
        ranked = sorted((float(one.loss), one.member.name) for one in members)
        ends = [f"{loss:.4g} {name}" for loss, name in dict.fromkeys((ranked[0], ranked[-1]))]
        loss, total = f"loss {' to '.join(ends)}", self._progress.total
        clock = format_clocks(time.perf_counter() - self._progress.began, self._progress.left.after(self._done))
        place = f"step {self._done:>{len(str(total))}}/{total}"
        self._progress.report(loss, "  ".join([place, loss, clock]))


def repeated(members: Sequence[LiveMember], size: int) -> list[LiveMember]:
    """The members, with the first one repeated until there are `size`."""
    return [*members, *[members[0]] * (size - len(members))]


def stop_worst(members: Sequence[LiveMember], step: int, halving: Halving) -> None:
    """End the members that are not among the best at a step."""
    # The first process has written the metrics. On other hosts, a network file system may not show the last lines yet.
    losses = distributed.on_first(lambda: list(halving.losses(step)))
    best = losses[: math.ceil(len(losses) / halving.reduction)]
    for one in members:
        if one.member.name not in best:
            one.stop(f"not among the best {len(best)} of {len(losses)} runs")
