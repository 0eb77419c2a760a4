"""The loss and the metrics of a model on held-out records."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from peftjax import sharding
from peftjax.core import variables
from peftjax.core.errors import UserError
from peftjax.core.one_cpu import compiler_options
from peftjax.core.progress import Progress
from peftjax.data.batches import Batches, HostBatch
from peftjax.tasks import Task
from peftjax.tasks.base import Outputs
from peftjax.totals import Batch, Totals


class Evaluation(NamedTuple):
    """The result of an evaluation.

    Attributes:
        scores: The metrics.
        logits: The logits of all labels with a loss; None if the metrics are computed from sums alone.
        labels: These labels.
        records: The name of each label's record; empty if a record has several labels, or with several processes.
    """

    scores: dict[str, float]
    logits: np.ndarray | None
    labels: np.ndarray | None
    records: list[str]


EvalStep = Callable[[variables.FlatTree, variables.FlatTree, Batch], Outputs]


def make_eval_step(graph: nnx.GraphDef, task: Task, mesh: Mesh) -> EvalStep:
    """The jitted step (trainable, frozen, batch) -> `Outputs` of a model in evaluation mode.

    The batch has arrays [1, B, ...], as in training; the outputs are replicated.
    """
    everywhere = sharding.spec((), (), mesh)

    @partial(jax.jit, out_shardings=everywhere, compiler_options=compiler_options(mesh.devices.flat))
    def eval_step(trainable: variables.FlatTree, frozen: variables.FlatTree, batch: Batch) -> Outputs:
        model = variables.join(graph, trainable, frozen)
        return task.evaluate(model, {name: value[0] for name, value in batch.items()})

    return eval_step


def counted(batches: Batches, limit: int, progress: Progress, *, reported: bool = False) -> Iterator[HostBatch]:
    """At most `limit` batches (0: all), with a progress bar of batches or, without a limit, of records.

    Records that were truncated or dropped are not fully scored. At the end, their number is printed, unless it was `reported`
    before.
    """
    if limit:
        yield from progress.track(itertools.islice(batches, limit), "batches", limit)
    else:
        yield from progress.track(batches, "records", batches.record_count(), lambda batch: batch.read)
    if batches.incomplete and not reported:
        progress.print(batches.summary_text())


class Collected:
    """The outputs of the eval step, collected on the host over batches."""

    def __init__(self) -> None:
        self._sums = np.zeros(3)
        self._labelled: list[tuple[np.ndarray, np.ndarray]] = []
        self._records: list[str] = []

    def add(self, outputs: Outputs, records: Iterable[str]) -> None:
        """Add the outputs of a batch, as NumPy arrays, and the names of its records."""
        self._sums += np.array(outputs.totals[:3], float)  # only training has a balance
        if outputs.labelled is not None:
            logits, labels, weights = map(np.asarray, outputs.labelled)
            self._labelled.append((logits[weights > 0], labels[weights > 0]))
            if weights.ndim == 1 and jax.process_count() == 1:  # several processes may order the rows differently
                self._records += records

    def evaluation(self, task: Task) -> Evaluation:
        """The metrics of the task over all batches.

        Raises:
            UserError: No token or label of the batches counts in the loss.
        """
        totals = Totals(*self._sums)
        if totals.tokens == 0:
            raise UserError("data.eval: no token or label of the held-out records counts in the loss")
        labelled = self._labelled
        logits, labels = (np.concatenate(parts) for parts in zip(*labelled, strict=True)) if labelled else (None, None)
        return Evaluation(task.metrics(totals, logits, labels), logits, labels, self._records)


def evaluate(
    eval_step: EvalStep,
    task: Task,
    trainable: variables.FlatTree,
    frozen: variables.FlatTree,
    batches: Iterable[HostBatch],
    mesh: Mesh,
) -> Evaluation:
    """The metrics of the task over all batches.

    Raises:
        UserError: No token or label of the batches counts in the loss.
    """
    found = Collected()
    for batch in batches:
        outputs = eval_step(trainable, frozen, sharding.shard_batch(batch.arrays, mesh))
        found.add(jax.device_get(outputs), batch.records)
    return found.evaluation(task)
