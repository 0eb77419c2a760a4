"""The largest batch, sequence length, rank or number of members that fits."""

import sys
from collections.abc import Callable, Iterator

from peftjax.core.config import flat_fields
from peftjax.core.errors import UserError
from peftjax.plan.plan import Plan
from peftjax.training.config import Config, changed, to_dict

Probe = Callable[[Config, int], Plan]  # the plan of a config, for a number of members


def search(
    kind: str, config: Config, parts: int, probe: Probe, members: int = 1, most: int | None = None
) -> Iterator[tuple[int, Plan | UserError]]:
    """Yield plans of ever larger or smaller values until the largest that fits is among them.

    The search starts at the config's own value, doubles it while it fits or halves it until it does, and then bisects
    until the largest value that fits and the smallest that does not are within an eighth, or one step, of each other.

    Args:
        kind: "batch", "length", "rank" or "members". Batches grow in steps that all devices and microbatches share
            equally, lengths in steps of 64 positions, the others in steps of 1.
        config: The training config.
        parts: The number of devices that split a batch.
        probe: Makes the plan of a config.
        members: Number of runs that the step trains together.
        most: The largest value to try; None: no limit.

    Yields:
        A value, and its plan or the error that rejects it, such as a rank that is larger than a layer.

    Raises:
        UserError: The config's method has no rank.
    """
    field, step = {
        "batch": ("train.batch_size", parts * config.train.accumulate),
        "length": ("data.max_length", 64),
        "rank": ("method.rank", 1),
        "members": ("", 1),
    }[kind]
    start = flat_fields(to_dict(config)).get(field) if field else members
    if start is None:
        raise UserError(f"--search=rank: method.name={config.method.method!r} has no rank; search for batch or length")

    def plan_of(value: int) -> tuple[bool, Plan | UserError]:
        try:
            plan = probe(changed(config, {field: value}), members) if field else probe(config, value)
        except UserError as error:
            return False, error
        return plan.fits, plan

    most = most or sys.maxsize  # the only value that need not be a multiple of `step`
    low, high, value = 0, 0, min(max(start // step, 1) * step, most)
    while not (low and high and high - low <= max(step, low // 8)):
        fits, found = plan_of(value)
        yield value, found
        low, high = (value, high) if fits else (low, value)
        if low == most:
            return
        if not high:
            value = min(2 * low, most)
        elif not low:
            if high <= step:
                return
            value = max(high // 2 // step, 1) * step
        else:
            value = max((low + high) // 2 // step, low // step + 1) * step  # never `low` again
