"""The remaining time of a run, estimated from the steps and the evaluations that have been measured."""

import bisect
import time
from collections.abc import Sequence


class TimeLeft:
    """Estimate of the seconds until a run ends.

    Steps are dispatched before they are computed, so that their time is known only where the run waits for the device.
    Evaluations are measured apart from the steps between them: those to come are expected to take as long as the last.
    """

    def __init__(self, total: int) -> None:
        """Start the estimate of a run of `total` steps."""
        self._total = total
        self._evaluations: Sequence[int] = ()
        self._origin: tuple[int, float] | None = None  # a step, and the time at which the steps after it began
        self._step_seconds: float | None = None
        self._evaluated = (0, 0.0)  # the step of the last evaluation, and its seconds
        self._apart = 0.0  # seconds not spent on steps

    def expect(self, total: int, evaluations: Sequence[int]) -> None:
        """Set the number of steps of the run, and after which of them it is evaluated, in ascending order."""
        self._total, self._evaluations = total, evaluations

    def dispatched(self, step: int) -> None:
        """Note that a step has been dispatched; the first one ends the compilation, which is not measured."""
        self._origin = self._origin or (step - 1, self._now())

    def computed(self, step: int) -> None:
        """Note that a step and all before it have been computed."""
        self._origin = self._origin or (step, self._now())
        if step > self._origin[0]:
            self._step_seconds = (self._now() - self._origin[1]) / (step - self._origin[0])

    def evaluated(self, step: int, seconds: float) -> None:
        """Note how long an evaluation after a step took. In a sweep, the times of all runs after one step add up."""
        before = self._evaluated[1] if self._evaluated[0] == step else 0.0
        self._evaluated = step, before + seconds
        self.paused(seconds)

    def paused(self, seconds: float) -> None:
        """Note seconds that were not spent on steps."""
        self._apart += seconds

    def after(self, step: int) -> float | None:
        """Return the seconds left after a step; None before any step is known to be computed."""
        if self._step_seconds is None:
            return None
        done = bisect.bisect_right if self._evaluated[0] == step else bisect.bisect_left  # the one after this step
        evaluations = len(self._evaluations) - done(self._evaluations, step)
        return (self._total - step) * self._step_seconds + evaluations * self._evaluated[1]

    def _now(self) -> float:
        return time.perf_counter() - self._apart
