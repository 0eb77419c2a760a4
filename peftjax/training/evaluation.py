"""The loss and the metrics of a model on held-out records."""

from collections.abc import Callable, Iterable
from functools import partial

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from peftjax import sharding
from peftjax.core import variables
from peftjax.core.errors import UserError
from peftjax.data.batches import Batches, HostBatch
from peftjax.tasks import Task
from peftjax.tasks.base import Outputs
from peftjax.totals import Batch, Totals
from peftjax.training.config import Config

EvalStep = Callable[[variables.FlatTree, variables.FlatTree, Batch], Outputs]


def make_eval_step(graph: nnx.GraphDef, task: Task, mesh: Mesh) -> EvalStep:
    """The jitted step (trainable, frozen, batch) -> `Outputs` of a model in evaluation mode.

    The batch has arrays [1, B, ...], as in training; the outputs are replicated.
    """
    everywhere = sharding.spec((), (), mesh)

    @partial(jax.jit, out_shardings=everywhere, compiler_options=sharding.compiler_options(mesh))
    def eval_step(trainable: variables.FlatTree, frozen: variables.FlatTree, batch: Batch) -> Outputs:
        model = variables.join(graph, trainable, frozen)
        return task.evaluate(model, {name: value[0] for name, value in batch.items()})

    return eval_step


def count_batches(config: Config, batches: Batches, limit: int = 0) -> int | None:
    """The number of batches of an evaluation, as far as it is known before they are read.

    Args:
      config: The config of the run.
      batches: Those of data.eval.
      limit: Their maximum number; 0: no limit.
    """
    if config.data.pack:  # how many records fit a row depends on their lengths
        return limit or None
    count = -(-batches.record_count() // config.train.batch_size)
    return min(limit or count, count)


def evaluate(
    eval_step: EvalStep,
    task: Task,
    trainable: variables.FlatTree,
    frozen: variables.FlatTree,
    batches: Iterable[HostBatch],
    mesh: Mesh,
) -> dict[str, float]:
    """The metrics of the task over all batches.

    Raises:
      UserError: The batches have nothing with a loss.
    """
    sums, labelled = np.zeros(3), []
    for batch in batches:
        outputs = jax.device_get(eval_step(trainable, frozen, sharding.shard_batch(batch.arrays, mesh)))
        sums += np.array(outputs.totals, float)
        if outputs.labelled is not None:
            logits, labels, weights = outputs.labelled
            labelled.append((logits[weights > 0], labels[weights > 0]))
    totals = Totals(*sums)
    if totals.tokens == 0:
        raise UserError("data.eval: no token or label of the held-out records counts in the loss")
    logits, labels = (np.concatenate(parts) for parts in zip(*labelled, strict=True)) if labelled else (None, None)
    return task.metrics(totals, logits, labels)
