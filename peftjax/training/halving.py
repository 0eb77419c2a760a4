"""Successive halving: after 1/R, 1/R^2, ... of the steps, only the best 1/R of the runs continue.

Jamieson and Talwalkar 2016 (arXiv:1502.07943). A run is compared with all runs that have been evaluated at the same step so far.
If they are not all trained together, the first ones are compared with fewer runs, as in ASHA (Li et al. 2020, arXiv:1810.05934).
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from peftjax.core.errors import UserError
from peftjax.log import METRICS, read_metrics
from peftjax.training.config import Config


@dataclasses.dataclass(frozen=True)
class Halving:
    """The rule that decides which runs continue.

    Attributes:
        workdirs: The directories of all runs.
        reduction: R.
        rungs: The steps at which runs are compared.
    """

    workdirs: Sequence[Path]
    reduction: int
    rungs: Sequence[int]

    def losses(self, step: int) -> dict[str, float]:
        """The held-out losses of the runs that were evaluated at a step, by the names of their directories, lowest first."""
        found = {}
        for workdir in self.workdirs:
            for line in read_metrics(workdir / METRICS) if (workdir / METRICS).exists() else ():
                if line["kind"] == "eval" and line["step"] == step and math.isfinite(line["eval_loss"]):
                    found[workdir.name] = line["eval_loss"]
        return dict(sorted(found.items(), key=lambda item: item[1]))


def find_rungs(configs: Sequence[Config], reduction: int) -> list[int]:
    """The steps at which runs are compared: the first evaluation after each of 1/R, 1/R^2, ... of the steps.

    Raises:
        UserError: The runs are not evaluated, not at the same steps, or too rarely.
    """
    lengths = {(config.train.steps, config.train.eval_every) for config in configs}
    if len(lengths) > 1:
        raise UserError(
            "--halving compares runs at the same steps, so they need the same train.steps and train.eval_every; do not sweep "
            "these fields"
        )
    ((total, every),) = lengths
    assert isinstance(every, int)  # resolved by `duration.in_steps`
    if not every or not all(config.data.eval for config in configs):
        raise UserError("--halving compares held-out losses; set data.eval and train.eval_every")
    targets = [total / reduction**power for power in range(1, total.bit_length())]
    rungs = sorted({every * math.ceil(target / every) for target in targets if target >= every})
    rungs = [rung for rung in rungs if rung < total]
    if not rungs:
        raise UserError(
            f"--halving={reduction} compares runs after {total // reduction} of {total} steps, but train.eval_every={every}; "
            "evaluate more often"
        )
    return rungs
