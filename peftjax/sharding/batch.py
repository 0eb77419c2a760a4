"""The rows of a batch: which of them a process loads, and on which devices they are."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from peftjax.core.errors import UserError
from peftjax.sharding.mesh import MEMBERS
from peftjax.sharding.table import spec


def batch_share(mesh: Mesh) -> dict[str, Any]:
    """Return which rows of a batch this process loads: those that its devices compute.

    Processes between which only features or members are sharded load the same rows.

    Returns:
        `parts` and `own`, arguments of `data.Batching`: the number of equal parts of the rows, and the indices of the parts
        that this process loads. One part if every process loads all rows.
    """
    devices = mesh.devices.reshape(mesh.shape.get(MEMBERS, 1), mesh.shape["data"] * mesh.shape["fsdp"], -1)
    rows = devices.swapaxes(0, 1).reshape(devices.shape[1], -1)  # [rows, members and features]
    processes = [{device.process_index for device in part} for part in rows]
    if all(each == processes[0] for each in processes):
        return {"parts": 1, "own": (0,)}
    return {"parts": len(rows), "own": tuple(i for i, each in enumerate(processes) if jax.process_index() in each)}


def uneven_rows(rows: int, shape: Mapping[str, int]) -> str:
    """Return a warning if a mesh of this shape does not divide the rows of a microbatch; else an empty string."""
    split = shape.get("data", 1) * shape.get("fsdp", 1)
    if rows % split == 0:
        return ""
    return (
        f"a microbatch of {rows} rows cannot be split over data x fsdp = {split} devices, so each of them computes all "
        f"rows; make train.batch_size / train.accumulate a multiple of {split}"
    )


def check_even_rows(rows: int, mesh: Mesh) -> None:
    """Raises a UserError if several processes cannot share the rows of a microbatch evenly among their devices."""
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % split and batch_share(mesh)["parts"] > 1:
        raise UserError(
            f"a batch of {rows} rows on data x fsdp = {split} devices of several processes: train.batch_size / "
            f"train.accumulate must be a multiple of {split}"
        )


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, microbatches: int = 1) -> dict[str, jax.Array]:
    """Make the global batch from this process's rows, split into microbatches.

    Args:
        batch: This process's rows, each array [b, T], [b], or with more dimensions.
        mesh: The mesh.
        microbatches: Number of microbatches, A.

    Returns:
        Sharded arrays [A, B / A, T].

    Raises:
        UserError: With several processes, the devices cannot share the rows evenly.
    """
    placed, share = {}, batch_share(mesh)
    for name, rows in batch.items():
        local = rows.reshape(microbatches, -1, *rows.shape[1:])
        shape = (microbatches, local.shape[1] * share["parts"] // len(share["own"]), *rows.shape[1:])
        check_even_rows(shape[1], mesh)
        where = spec(batch_axes(rows.ndim - 1), shape, mesh)
        placed[name] = jax.make_array_from_process_local_data(where, local, shape)
    return placed


def batch_axes(ndim: int) -> tuple[str | None, ...]:
    """Return the logical axes of microbatches [A, B / A, ...] whose rows have `ndim` dimensions."""
    return (None, "batch", "length") if ndim == 1 else (None, "batch", *(None,) * ndim)
