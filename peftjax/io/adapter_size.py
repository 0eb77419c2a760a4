"""The size of the files of an adapter, from shapes alone."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from peftjax.io import adapter_hub
from peftjax.io.adapter_base import base_record, placeholder_fingerprints
from peftjax.io.adapter_experts_save import requires_single_experts, shapes_of_single_experts
from peftjax.io.adapter_save import saved_method, without_head
from peftjax.io.adapter_tensors import adapter_tensors
from peftjax.io.safetensors_files import DTYPES
from peftjax.methods.bottleneck import Bottleneck
from peftjax.models.base import Model


def weights_bytes(model: nnx.Module, name: str = "default") -> int:
    """Return the size in bytes of the safetensors files that `save_adapter` would write; the model may be abstract.

    Raises:
        UserError: As `save_adapter`.
    """
    method = saved_method(model, name)
    tensors = _placeholders(model, name)
    if isinstance(model, Model) and requires_single_experts(model, name):
        tensors = shapes_of_single_experts(model, name, method, tensors)
    metadata = base_record(model, name, placeholder_fingerprints(model, name))
    if not isinstance(method, Bottleneck):
        return _file_bytes(tensors, metadata)
    rest, head = without_head(tensors)
    size = _file_bytes(adapter_hub.with_both_names(rest, method), metadata)
    return size + (_file_bytes(head, {}) if head else 0)


def _placeholders(model: nnx.Module, name: str) -> dict[str, Any]:
    """Arrays of zeros that take no memory, in place of the tensors that the files hold.

    Only what computes tensors is traced. Tracing the thousands of cuts into the tensors of single experts would take long.
    """
    tensors: dict[str, Any] = {}
    graph, state = nnx.split(model)

    def record(state: nnx.State) -> None:
        zeros = lambda value: np.broadcast_to(np.zeros((), value.dtype), value.shape)  # noqa: E731
        tensors.update(adapter_tensors(nnx.merge(graph, state), name, read=zeros))

    jax.eval_shape(record, state)
    return tensors


def _file_bytes(tensors: Mapping[str, jax.ShapeDtypeStruct], metadata: Mapping[str, str]) -> int:
    """The size of the file that `save_adapter` makes of tensors of these shapes.

    The file holds the length of the header in 8 bytes, the header, and the tensors, the widest dtype first.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for key, value in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        begin, end = end, end + value.size * value.dtype.itemsize
        header[key] = {"dtype": DTYPES[value.dtype.name], "shape": list(value.shape), "data_offsets": [begin, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + length + -length % 8 + end
