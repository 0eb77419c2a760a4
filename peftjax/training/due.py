"""At which steps a run logs, evaluates and saves."""

import time
from collections.abc import Callable

from peftjax.core import distributed
from peftjax.training.config import Config


class Due:
    """What is due after a step. After the last step, everything is.

    Args:
        config: A config whose lengths are in steps.
        clock: A clock in seconds. In a distributed run, process 0's clock decides.
    """

    def __init__(self, config: Config, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._saved = clock()

    def log(self, step: int) -> bool:
        """Whether a line of metrics is due."""
        return self._last(step) or _every(step, self._config.train.log_every)

    def eval(self, step: int) -> bool:
        """Whether an evaluation is due."""
        return self._last(step) or _every(step, self._config.train.eval_every)

    def save(self, step: int) -> bool:
        """Whether a checkpoint is due at this step, as it is after every evaluation."""
        return self.eval(step) or _every(step, self._config.checkpoint.every)

    def save_by_time(self, step: int) -> bool:
        """Whether a checkpoint is due because the last one is checkpoint.minutes old.

        This is checked only where a line of metrics is due, since the processes have to agree on the answer and have waited for
        the device there anyway. Every process must call this method after the same steps.
        """
        minutes = self._config.checkpoint.minutes
        if not minutes or not self.log(step):
            return False
        return any(distributed.gather(self._clock() - self._saved >= 60 * minutes)[:1])

    def saved(self) -> None:
        """Restart the clock of `save_by_time`."""
        self._saved = self._clock()

    def _last(self, step: int) -> bool:
        return step == self._config.train.steps


def _every(step: int, count: int | str) -> bool:
    assert isinstance(count, int)  # resolved by `duration.in_steps`
    return count > 0 and step % count == 0
