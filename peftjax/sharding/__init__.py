"""Sharding: a mesh of devices, and one table from logical axes to mesh axes.

Models name the logical axes of their arrays. Only this package knows the axes of the mesh.
"""

from peftjax.sharding.batch import batch_axes, batch_share, check_even_rows, shard_batch, uneven_rows
from peftjax.sharding.current_mesh import (
    attention_partitions,
    constrain,
    constrain_looked_up,
    gathered,
    on_current_mesh,
    shard_count,
    whole_length,
)
from peftjax.sharding.mesh import MEMBERS, MESH_AXES, MeshConfig, make_mesh, members_axis, split_members
from peftjax.sharding.table import as_jit_returns, partition, place, placement, spec, undivided

__all__ = [
    "MEMBERS",
    "MESH_AXES",
    "MeshConfig",
    "as_jit_returns",
    "attention_partitions",
    "batch_axes",
    "batch_share",
    "check_even_rows",
    "constrain",
    "constrain_looked_up",
    "gathered",
    "make_mesh",
    "members_axis",
    "on_current_mesh",
    "partition",
    "place",
    "placement",
    "shard_batch",
    "shard_count",
    "spec",
    "split_members",
    "undivided",
    "uneven_rows",
    "whole_length",
]
