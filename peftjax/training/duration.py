"""How long a run is and how often it evaluates and saves: epochs, percentages and fractions as numbers of steps."""

import dataclasses
import functools
import math
from collections.abc import Callable

from peftjax.core.config import Interval
from peftjax.core.errors import UserError
from peftjax.data.batches import Batches
from peftjax.data.epoch import count_rows
from peftjax.tasks import Task
from peftjax.training.config import Config

COUNTED = 20_000  # records that are tokenized to count the packed rows of an epoch; more would delay the start
GLANCED = 256  # the same, for a message


def in_steps(config: Config, rows: Callable[[], int]) -> Config:
    """The config with all lengths in steps: train.steps, train.eval_every, checkpoint.every and optim.warmup_steps.

    Options of the method that depend on the number of steps are set too.

    A length of E epochs has E * rows / train.batch_size steps; `rows` counts the rows of an epoch, and is called only then.
    Lengths are rounded up, as in transformers. A config whose lengths are in steps is returned as it is.

    Raises:
        UserError: `rows` raises it, or the warmup is longer than the run.
    """
    train, optim, checkpoint = config.train, config.optim, config.checkpoint
    epoch = functools.cache(lambda: rows() / train.batch_size)
    steps = _whole(train.epochs * epoch()) if train.epochs else train.steps

    def interval(value: int | str) -> int:
        if isinstance(value, int):
            return value
        parsed = Interval.parse(value)
        assert parsed is not None  # validated
        return _whole(parsed.amount * (steps if parsed.of_run else epoch()))

    return dataclasses.replace(
        config,
        method=config.method.in_steps(steps),
        train=dataclasses.replace(train, steps=steps, epochs=0.0, eval_every=interval(train.eval_every)),
        optim=dataclasses.replace(optim, warmup_steps=optim.warmup(steps), warmup_fraction=0.0),
        checkpoint=dataclasses.replace(checkpoint, every=interval(checkpoint.every)),
    )


def rows_of_epoch(config: Config, task: Task, batches: Batches) -> int:
    """The rows of one epoch; with packing, estimated if there are more than `COUNTED` records.

    Raises:
        UserError: The data is a mixture with weights, or a record cannot be read.
    """
    if batches.source is None:
        raise UserError(
            f"data.train={', '.join(config.data.train)} is a mixture with weights, which has no epochs; give "
            "train.steps, train.eval_every and checkpoint.every in steps"
        )
    return count_rows(batches.source, config.data, task, COUNTED)[0]


def describe_length(config: Config, task: Task, batches: Batches) -> str:
    """The length of a run as a sentence: "40 steps of 8 examples: 2.5 epochs of 128 examples"."""
    unit = "rows" if config.data.too_long == "split" else "examples" if task.texts else task.unit
    unit = "packed rows" if config.data.pack else unit
    size, steps = config.train.batch_size, config.train.steps
    text = f"{steps:,} {'step' if steps == 1 else 'steps'} of {size:,} {unit if size > 1 else unit[:-1]}"
    if batches.source is None:
        return f"{text} from a mixture"
    try:
        rows, exact = count_rows(batches.source, config.data, task, GLANCED)
    except UserError:  # reported when the record is read
        return text
    if not rows:
        return text
    epochs = f"{steps * size / rows:.3g}"
    about = "" if exact else "about "
    return f"{text}: {about}{epochs} {'epoch' if epochs == '1' else 'epochs'} of {rows:,} {unit if rows > 1 else unit[:-1]}"


def _whole(steps: float) -> int:
    """The number of steps rounded up, at least 1; a rounding error of the division does not count."""
    return max(1, math.ceil(round(steps, 6)))
