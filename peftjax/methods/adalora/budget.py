"""AdaLoRA's budget: how many entries of E remain at each step, and which.

Zhang et al. 2023 (arXiv:2303.10512), sections 3.2 and 3.3.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

LEAVES = ("p", "singular_values", "q")


class Budget(NamedTuple):
    """The schedule of pruning, in steps.

    Attributes:
        start: The last step without pruning.
        end: The step of the last pruning.
        interval: Steps between prunings.
        target_rank: Mean rank of the targets at the end.
        beta1, beta2: Decays of the moving averages of importance and of its uncertainty.
    """

    start: int
    end: int
    interval: int
    target_rank: int
    beta1: float
    beta2: float


class Allocation(NamedTuple):
    """State of the optimizer.

    Attributes:
        updates: Number of updates so far, int32 [].
        sensitivity: Moving averages of importance, in the shapes of the parameters.
        uncertainty: Moving averages of their deviation, likewise.
        inner: State of the inner optimizer.
    """

    updates: jax.Array
    sensitivity: dict[str, jax.Array]
    uncertainty: dict[str, jax.Array]
    inner: Any


def allocate(
    inner: optax.GradientTransformation, budget: Budget, active: dict[str, np.ndarray]
) -> optax.GradientTransformation:
    """`inner`, followed by setting the least important entries of E to zero.

    Args:
        inner: The optimizer.
        budget: The schedule.
        active: The entries of E that exist, bool [*stack, R], by path of the adapter.
    """
    paths = [f"{path}.{leaf}" for path in active for leaf in LEAVES]
    start, end = budget.start, budget.end
    initial = sum(int(there.sum()) for there in active.values())
    targets = sum(int(there.any(axis=-1).sum()) for there in active.values())
    target = min(initial, budget.target_rank * targets)

    def init(params: Any) -> Allocation:
        zeros = {path: jnp.zeros(params[path].shape, jnp.float32) for path in paths}
        return Allocation(jnp.zeros((), jnp.int32), zeros, dict(zeros), inner.init(params))

    def scores(state: Allocation) -> dict[str, jax.Array]:
        """The importance of every triplet, [*stack, R], infinite where it does not exist."""
        by_path = {}
        for path, there in active.items():
            p, values, q = (
                state.sensitivity[f"{path}.{leaf}"] * state.uncertainty[f"{path}.{leaf}"] for leaf in LEAVES
            )
            by_path[path] = jnp.where(there, values + p.mean(axis=-2) + q.mean(axis=-1), jnp.inf)
        return by_path

    def update(gradients: Any, state: Allocation, params: Any = None, **extra: Any) -> tuple[Any, Allocation]:
        updates, inner_state = optax.with_extra_args_support(inner).update(gradients, state.inner, params, **extra)
        step = state.updates + 1
        sensitivity, uncertainty = {}, {}
        for path in paths:
            importance = jnp.abs((params[path] + updates[path]) * gradients[path])
            smooth = budget.beta1 * state.sensitivity[path] + (1 - budget.beta1) * importance
            spread = budget.beta2 * state.uncertainty[path] + (1 - budget.beta2) * jnp.abs(importance - smooth)
            sensitivity[path] = jnp.where(step < end, smooth, state.sensitivity[path])
            uncertainty[path] = jnp.where(step < end, spread, state.uncertainty[path])
        state = Allocation(step, sensitivity, uncertainty, inner_state)

        ranked = scores(state)
        left = 1 - (step - start) / (end - start)
        removed = initial - jnp.floor((initial - target) * left**3 + target).astype(jnp.int32)
        due = ((step > start) & (step < end) & (step % budget.interval == 0)) | (step == end)
        ordered = jnp.sort(jnp.concatenate([score.ravel() for score in ranked.values()]))
        threshold = jnp.where(due & (removed > 0), ordered[jnp.maximum(removed - 1, 0)], -jnp.inf)
        for path, score in ranked.items():
            values = params[f"{path}.singular_values"]
            drop = jnp.where(step > end, values == 0, score <= threshold)
            updates = updates | {
                f"{path}.singular_values": jnp.where(drop, -values, updates[f"{path}.singular_values"])
            }
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)
