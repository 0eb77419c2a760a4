"""Evaluation of runs side by side: one pass over the held-out records for all members of a population."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from peftjax import sharding
from peftjax.core import variables
from peftjax.core.one_cpu import compiler_options
from peftjax.data.batches import HostBatch
from peftjax.tasks import Task
from peftjax.tasks.base import Outputs
from peftjax.totals import Batch
from peftjax.training.evaluation import Collected, Evaluation

PopulationEvalStep = Callable[[Sequence[variables.FlatTree], variables.FlatTree, Batch], Outputs]


def make_population_eval_step(graph: nnx.GraphDef, task: Task, mesh: Mesh) -> PopulationEvalStep:
    """The jitted step (own, shared, batch) -> `Outputs` [M, ...] of M members in evaluation mode.

    The batch has arrays [A, B, ...] of A microbatches, which are evaluated one after the other, so that members have as many
    rows at a time as in training. `own` has the leaves of each member that are not in `shared`, trainable and frozen, padded to
    the same shapes.
    """
    everywhere = sharding.spec((), (), mesh)

    @partial(jax.jit, out_shardings=everywhere, compiler_options=compiler_options(mesh.devices.flat))
    def eval_step(own: Sequence[variables.FlatTree], shared: variables.FlatTree, batch: Batch) -> Outputs:
        def member(own: variables.FlatTree) -> Outputs:
            model = variables.join(graph, own, shared)
            totals, labelled = jax.lax.map(lambda part: task.evaluate(model, part), dict(batch))
            return Outputs(
                jax.tree.map(jnp.sum, totals), jax.tree.map(lambda rows: rows.reshape(-1, *rows.shape[2:]), labelled)
            )

        return jax.vmap(member, spmd_axis_name=sharding.members_axis(len(own)))(variables.stack(own))

    return eval_step


def evaluate_population(
    eval_step: PopulationEvalStep,
    task: Task,
    own: Sequence[variables.FlatTree],
    shared: variables.FlatTree,
    batches: Iterable[HostBatch],
    mesh: Mesh,
    accumulate: int,
) -> list[Evaluation]:
    """The metrics of each member over all batches, which are split into `accumulate` microbatches.

    Raises:
        UserError: No token or label of the batches counts in the loss.
    """
    found = [Collected() for _ in own]
    for batch in batches:
        outputs = jax.device_get(eval_step(own, shared, sharding.shard_batch(batch.arrays, mesh, accumulate)))
        for index, collected in enumerate(found):
            collected.add(jax.tree.map(lambda leaf, index=index: leaf[index], outputs), batch.records)
    return [collected.evaluation(task) for collected in found]
