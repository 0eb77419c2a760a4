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
from peftjax.core.progress import Progress
from peftjax.data.batches import Batches, HostBatch
from peftjax.tasks import Task
from peftjax.tasks.base import Outputs
from peftjax.totals import Batch, Totals


class Evaluation(NamedTuple):
    """What an evaluation finds.

    Attributes:
      scores: The metrics.
      logits: The logits of all labels that count; None where the metrics follow from sums.
      labels: These labels.
      records: The names of the records, one for each label; empty if a record has several, or with several processes.
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

    @partial(jax.jit, out_shardings=everywhere, compiler_options=sharding.compiler_options(mesh.devices.flat))
    def eval_step(trainable: variables.FlatTree, frozen: variables.FlatTree, batch: Batch) -> Outputs:
        model = variables.join(graph, trainable, frozen)
        return task.evaluate(model, {name: value[0] for name, value in batch.items()})

    return eval_step


def counted(batches: Batches, limit: int, progress: Progress) -> Iterator[HostBatch]:
    """At most `limit` batches (0: all), with a bar that counts them; without a limit it counts their records."""
    if limit:
        return progress.track(itertools.islice(batches, limit), "batches", limit)
    return progress.track(batches, "records", batches.record_count(), lambda batch: len(batch.records))


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
      UserError: The batches have nothing with a loss.
    """
    sums, labelled, records = np.zeros(3), [], list[str]()
    for batch in batches:
        outputs = jax.device_get(eval_step(trainable, frozen, sharding.shard_batch(batch.arrays, mesh)))
        sums += np.array(outputs.totals[:3], float)  # training alone has a balance
        if outputs.labelled is not None:
            logits, labels, weights = outputs.labelled
            labelled.append((logits[weights > 0], labels[weights > 0]))
            if weights.ndim == 1 and jax.process_count() == 1:  # the rows of several processes may be in another order
                records += batch.records
    totals = Totals(*sums)
    if totals.tokens == 0:
        raise UserError("data.eval: no token or label of the held-out records counts in the loss")
    logits, labels = (np.concatenate(parts) for parts in zip(*labelled, strict=True)) if labelled else (None, None)
    return Evaluation(task.metrics(totals, logits, labels), logits, labels, records)
