"""Members evaluated in one pass over the held-out records have the predictions and metrics of each alone."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from peftjax import sharding
from peftjax.core import variables
from peftjax.data.batches import HostBatch
from peftjax.tasks.base import Outputs
from peftjax.totals import Batch, Totals
from peftjax.training.evaluation import evaluate, make_eval_step
from peftjax.training.population_evaluation import evaluate_population, make_population_eval_step


class Scorer:
    """A task whose loss is the sum of the logits of the rows that count."""

    def evaluate(self, model: Any, batch: Batch) -> Outputs:
        logits = (batch["inputs"] @ model.down.kernel[...]) @ model.up.kernel[...]
        weights = batch["weights"]
        loss = jnp.sum(logits * weights[:, None])
        return Outputs(Totals(loss, jnp.sum(weights), jnp.sum(weights)), (logits, batch["labels"], weights))

    def metrics(self, totals: Totals, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return {
            "eval_loss": float(totals.loss / totals.tokens),
            "accuracy": float(np.mean(logits.argmax(-1) == labels)),
        }


class Network(nnx.Module):
    def __init__(self, rank: int, seed: int) -> None:
        self.down = nnx.Linear(3, rank, use_bias=False, rngs=nnx.Rngs(seed))
        self.up = nnx.Linear(rank, 2, use_bias=False, rngs=nnx.Rngs(seed + 1))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_members_of_different_ranks_have_the_predictions_of_each_alone(accumulate: int) -> None:
    rng, mesh, task = np.random.default_rng(0), sharding.make_mesh(), Scorer()
    weights = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], np.float32)
    batches = [
        HostBatch(
            {
                "inputs": rng.normal(size=(4, 3)).astype(np.float32),
                "labels": rng.integers(2, size=4, dtype=np.int32),
                "weights": counts,
            },
            [f"record {number}:{row}" for row in np.flatnonzero(counts)],
            real_tokens=4,
        )
        for number, counts in enumerate(weights)
    ]
    networks = [Network(rank, seed) for rank, seed in ((1, 0), (3, 5))]
    leaves = [{path: leaf.get_value() for path, leaf in variables.flat(network)[1].items()} for network in networks]
    graph = variables.flat(networks[0])[0]
    padded = [variables.filled(each, leaves[1]) for each in leaves]
    together = evaluate_population(
        make_population_eval_step(graph, task, mesh), task, padded, {}, batches, mesh, accumulate
    )
    for one, found in zip(leaves, together, strict=True):
        alone = evaluate(make_eval_step(graph, task, mesh), task, one, {}, batches, mesh)
        inputs = np.concatenate([batch.arrays["inputs"] for batch in batches])[:7]
        np.testing.assert_allclose(found.logits, inputs @ one["down.kernel"] @ one["up.kernel"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.logits, alone.logits, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found.labels, alone.labels)
        assert found.records == alone.records == [*batches[0].records, *batches[1].records]
        assert found.scores == pytest.approx(alone.scores, rel=1e-5)
