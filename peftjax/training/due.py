"""At which steps a run logs, evaluates and saves."""

import dataclasses

from peftjax.training.config import Config


@dataclasses.dataclass(frozen=True)
class Due:
    """What is due after a step. All of it is due after the last one."""

    config: Config

    def log(self, step: int) -> bool:
        """Whether a line of metrics is."""
        return self._last(step) or _every(step, self.config.train.log_every)

    def eval(self, step: int) -> bool:
        """Whether an evaluation is."""
        return self._last(step) or _every(step, self.config.train.eval_every)

    def save(self, step: int) -> bool:
        """Whether a checkpoint is: also after every evaluation."""
        return self.eval(step) or _every(step, self.config.checkpoint.every)

    def _last(self, step: int) -> bool:
        return step == self.config.train.steps


def _every(step: int, count: int) -> bool:
    return count > 0 and step % count == 0
