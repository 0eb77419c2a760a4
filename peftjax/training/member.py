"""A run of a sweep, and its state while it is being trained."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from peftjax.core.distributed import say_once
from peftjax.core.errors import NotFiniteError
from peftjax.core.variables import FlatTree
from peftjax.io.checkpoint import Checkpoints
from peftjax.log import Log
from peftjax.training.config import Config
from peftjax.training.population_step import SharedUpdate
from peftjax.training.run import Run
from peftjax.training.step import TrainState


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
class LiveMember:
    """A member that is being trained.

    Attributes:
        member: The member.
        run: Its run. All members share the base; those of the same seed that started together share their batches.
        own: The frozen leaves that it does not share with others; see `own_leaves`.
        update: The jitted update of its state, whose last argument is the peak learning rate.
        state: Its state.
        step: The number of steps done.
        checkpoints: Its checkpoints.
        opened: Everything to close when the member ends.
        log: Its log.
        loss: The loss of the last step.
    """

    member: Member
    run: Run
    own: FlatTree
    update: SharedUpdate
    state: TrainState
    step: int
    checkpoints: Checkpoints
    opened: contextlib.ExitStack
    log: Log = dataclasses.field(init=False)
    loss: jax.Array = dataclasses.field(init=False)

    @property
    def last(self) -> int:
        """The last step of the run."""
        return self.run.config.train.steps

    @property
    def done(self) -> bool:
        """Whether the run has ended, at its last step or when out of patience."""
        return self.step == self.last or self.run.out_of_patience

    def log_step(self, *, stopping: bool) -> None:
        """`Run.log_step`; a loss that is not finite ends this member alone."""
        try:
            self.run.log_step(self.step, self.log, stopping=stopping)
        except NotFiniteError as error:
            self.fail(error)

    def finish(self) -> None:
        """Write the result of the finished run."""
        self.checkpoints.wait()
        if self.step < self.last:
            say_once(f"{self.member.name} {self.run.describe_stop(self.step)}")
        self.run.finish(self.state, self.log, self.checkpoints)
        self.opened.close()  # now, so that this run counts as finished even if an error ends the others

    def stop(self, why: str) -> None:
        """End the run before its last step."""
        self.checkpoints.wait()
        self.run.save_report()  # with the number of tokens so far
        self.log.close("stopped")
        self.opened.close()
        self.member.stopped = self.step
        say_once(f"{self.member.name} stopped at step {self.step}: {why}")

    def fail(self, error: NotFiniteError) -> None:
        """End the run; the others continue."""
        self.member.failed = str(error)
        self.run.save_report()  # with the number of tokens so far
        self.log.close("failed")
        self.opened.close()
        say_once(f"{self.member.name} failed: {error}")


def without_failed(members: Sequence[LiveMember]) -> list[LiveMember]:
    """The members that have not failed."""
    return [one for one in members if not one.member.failed]
