"""Kernels in NF4 as bitsandbytes stores them in safetensors files.

A kernel [out, in] with n weights, in row-major order, is stored as

    weight                   the codes, two per byte, the first in the high half: uint8 [ceil(n/2), 1], or the same bytes
                             as floats (bnb_4bit_quant_storage)
    weight.absmax            uint8 [ceil(n/64)]; without double quantization the absmax itself, float32
    weight.quant_map         the codebook, float32 [16]
    weight.nested_absmax     the scales of the absmax, float32 [ceil(n/64/256)]; only with double quantization
    weight.nested_quant_map  the dynamic map, float32 [256]; only with double quantization
    weight.quant_state.bitsandbytes__nf4    the bytes of a JSON object: shape, dtype, block sizes, offset of the absmax
"""

import dataclasses
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Union, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from peftjax.core.errors import UserError
from peftjax.io import finite
from peftjax.io.json_files import parse_json
from peftjax.io.safetensors_files import DTYPES, StoredTensor, read_arrays
from peftjax.quant.nf4 import BLOCK, CODEBOOK, DYNAMIC_MAP, GROUP, Nf4

_STATE = ".quant_state.bitsandbytes__"
_NF4 = "bitsandbytes, nf4"
_DENSE = ("F64", "F32", "F16", "BF16")  # every quantized format has tensors of other dtypes
# Buffers of indices and masks in dense checkpoints; a mask is stored as bool or as uint8.
_BUFFER = r"(.*\.)?(position_ids|token_type_ids|(attn|attention)\.(bias|masked_bias))"
_MAPS = {"quant_map": CODEBOOK, "nested_quant_map": DYNAMIC_MAP}
_PARTS = ("weight", "absmax", "nested_absmax", *_MAPS)
_ZERO = int(np.argmin(np.abs(CODEBOOK))) - 8  # the code of 0, which pads the last block
# Bytes of a stored kernel besides the codes and the absmax.
OVERHEAD = 4 * (CODEBOOK.size + DYNAMIC_MAP.size) + 256

Stored = Union[StoredTensor, "Packed"]


# --- Reading ---


def check_config(quantization: Mapping[str, Any], directory: Path | str) -> None:
    """Check that the quantization_config of a directory's config.json describes NF4 of bitsandbytes.

    Raises:
        UserError: It describes another format.
    """
    if (claimed := _claimed(quantization)) != _NF4:
        raise UserError(
            f"{directory} is quantized ({claimed}); the only supported format is nf4 of bitsandbytes. Use the model it "
            'was quantized from, with quantize="nf4" or "int8" to quantize it again'
        )


def is_packed(stored: Mapping[str, StoredTensor], quantization: Mapping[str, Any], directory: Path) -> bool:
    """Whether the kernels of a checkpoint are stored in NF4: the tensors decide, with a warning if config.json disagrees.

    `quantization` is its quantization_config; empty if there is none.

    Raises:
        UserError: The tensors are quantized in another format.
    """
    packed = bool(packed_names(stored))
    claimed = _claimed(quantization) if quantization else ""
    dense = all(tensor.dtype in _DENSE or re.fullmatch(_BUFFER, name) for name, tensor in stored.items())
    if not (packed or dense) and claimed not in ("", _NF4):
        check_config(quantization, directory)
    if packed and claimed != _NF4:
        says = f"its quantization_config says {claimed}" if claimed else "it has no quantization_config"
        warnings.warn(
            f"{directory}/config.json: {says}, but the tensors are in nf4 and are loaded as such", stacklevel=3
        )
    if claimed and not packed:
        warnings.warn(
            f"{directory}/config.json: ignoring quantization_config ({claimed}), because no tensor is quantized",
            stacklevel=3,
        )
    return packed


def packed_names(stored: Iterable[str]) -> list[str]:
    """Return the names of the weights of kernels in NF4, from the names of all tensors of a checkpoint."""
    return [name.partition(_STATE)[0] for name in stored if _STATE in name]


def _claimed(quantization: Mapping[str, Any]) -> str:
    """The format that a quantization_config describes."""
    method = str(quantization.get("quant_method"))
    if method != "bitsandbytes":
        return method
    four = quantization.get("load_in_4bit")
    return f"{method}, {quantization.get('bnb_4bit_quant_type', 'fp4') if four else 'load_in_8bit'}"


def with_packed_kernels(stored: Mapping[str, StoredTensor], quantize: str | None) -> dict[str, Stored]:
    """Combine the stored tensors of each NF4 kernel into a `Packed` under the name of its weight; keep all other tensors.

    Raises:
        UserError: A kernel is in another format than NF4 with bitsandbytes' default block sizes, or than `quantize`, if that
            is given.
    """
    result: dict[str, Stored] = dict(stored)
    states = {name: tensor for name, tensor in stored.items() if _STATE in name}
    maps = tuple(f".{map_}" for map_ in _MAPS)
    wanted = {name: tensor for name, tensor in stored.items() if name in states or name.endswith(maps)}
    arrays = read_arrays(wanted.values())
    small = {name: arrays[tensor.name] for name, tensor in wanted.items()}  # a part of a file may be renamed
    for name in states:
        weight, _, kind = name.partition(_STATE)
        state = _read_state(name, small[name])
        _check_state(weight, kind, state)
        for part, expected in _MAPS.items():
            if (key := f"{weight}.{part}") in small:
                _check_map(key, small[key], expected)
        parts = {part: stored[key] for part in _PARTS if (key := _name(weight, part)) in stored}
        for key in (name, *(_name(weight, part) for part in parts)):
            del result[key]
        offset = float(state["nested_offset"]) if "nested_blocksize" in state else None
        packed = PackedKernel(weight, tuple(state["shape"]), state["dtype"], offset, parts)
        if quantize and quantize != packed.unpack.format:
            raise UserError(
                f"{weight} is stored in {packed.unpack.format}, but quantize={quantize!r} asks for another format; leave out "
                "quantize, or give the model that this one was quantized from"
            )
        result[weight] = packed
    return result


@dataclasses.dataclass(frozen=True)
class Unpack:
    """A function from the arrays of a stored kernel, as `Packed.read` returns them, to an `Nf4`.

    Attributes:
        features: (in, out).
        dtype: The dtype that the kernel decodes to.
        nested: Whether the absmax is quantized too (double quantization).
    """

    features: tuple[int, int]
    dtype: str
    nested: bool

    @property
    def format(self) -> str:
        """The key of `quant.FORMATS`."""
        return "nf4" if self.nested else "nf4_single"

    @property
    def even(self) -> bool:
        """Whether every row consists of whole blocks."""
        return self.features[0] % BLOCK == 0

    @property
    def inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays that it is called with, in the order of the file; if `even`, codes and absmax are split into rows."""
        inputs, outputs = self.features
        count = -(-inputs * outputs // BLOCK)
        blocks = (outputs, inputs // BLOCK) if self.even else (count,)
        codes = (*blocks, BLOCK // 2) if self.even else (-(-inputs * outputs // 2),)
        arrays = {"weight": (codes, np.uint8), "absmax": (blocks, np.uint8 if self.nested else np.float32)}
        if self.nested:
            arrays |= {"nested_absmax": ((-(-count // GROUP),), np.float32), "offset": ((), np.float32)}
        return {part: jax.ShapeDtypeStruct(*array) for part, array in arrays.items()}

    def __call__(self, stored: Mapping[str, jax.Array]) -> Nf4:
        pairs, absmax = stored["weight"], stored["absmax"]
        codes = jnp.stack([pairs >> 4, pairs & 15], axis=-1).astype(jnp.int8) - 8
        if self.even:
            codes, absmax = codes.reshape(*absmax.shape, BLOCK).transpose(1, 2, 0), absmax.T
        else:
            size = math.prod(self.features)
            codes = jnp.pad(codes.reshape(-1)[:size], (0, -size % BLOCK), constant_values=_ZERO)
        scales, offset = stored.get("nested_absmax"), stored.get("offset")
        return Nf4(codes.astype(jnp.int4), absmax, scales, offset, self.features, np.dtype(self.dtype))


@dataclasses.dataclass(frozen=True)
class Packed:
    """A stored kernel, or the kernels of all experts of a layer, that have not been read.

    Attributes:
        name: The name of its weight.
        shape: (out, in), or (E, out, in).
        decoded: The dtype that it decodes to.
    """

    name: str
    shape: tuple[int, ...]
    decoded: str

    @property
    def dtype(self) -> str:
        """The dtype that it decodes to, as safetensors calls it."""
        return DTYPES[self.decoded]

    @property
    def unpack(self) -> Unpack:
        """The function that makes an `Nf4` of what `read` returns."""
        raise NotImplementedError

    def faults(self) -> tuple[list[str], list[str], list[str]]:
        """Return the names of missing parts, the names of unexpected parts, and messages about wrong ones."""
        raise NotImplementedError

    def reader(self, part: str) -> Callable[[Any], np.ndarray]:
        """Return a function that reads a slice of one of the arrays for `unpack`. Floats must be finite."""
        raise NotImplementedError

    def read(self, placed: Nf4) -> dict[str, jax.Array]:
        """Read the arrays for `unpack`, sharded as `placed`, an `Nf4` of shardings. Each process reads what its devices hold."""
        even, inputs, sharding = self.unpack.even, self.unpack.inputs, cast(NamedSharding, placed.absmax)
        of_absmax = sharding.spec[-len(inputs["absmax"].shape) :]  # without the layers
        *experts, blocks, outputs = of_absmax if even else (*of_absmax, None)
        arrays: dict[str, jax.Array] = {}
        for part, array in inputs.items():
            within = (outputs, blocks) if even and part in ("weight", "absmax") else ()
            where = NamedSharding(sharding.mesh, PartitionSpec(*experts, *within))
            arrays[part] = jax.make_array_from_callback(array.shape, where, self.reader(part))
        return arrays


@dataclasses.dataclass(frozen=True)
class PackedKernel(Packed):
    """A stored kernel [out, in].

    Attributes:
        offset: The offset of the absmax; None without double quantization.
        parts: Its tensors, by the suffix of their names ("weight" for the codes).
    """

    offset: float | None
    parts: Mapping[str, StoredTensor]

    @property
    def unpack(self) -> Unpack:
        outputs, inputs = self.shape
        return Unpack((inputs, outputs), self.decoded, self.offset is not None)

    def faults(self) -> tuple[list[str], list[str], list[str]]:
        inputs = {part: array for part, array in self.unpack.inputs.items() if part != "offset"}
        maps = tuple(_MAPS) if self.offset is not None else ("quant_map",)
        wanted = (*inputs, *maps)
        missing = [_name(self.name, part) for part in wanted if part not in self.parts]
        unexpected = [tensor.name for part, tensor in self.parts.items() if part not in wanted]
        wrong = []
        for part, array in inputs.items():
            if (tensor := self.parts.get(part)) is None:
                continue
            bytes_ = math.prod(array.shape) * array.dtype.itemsize
            kind = {"uint8": "U8", "float32": "F32"}[array.dtype.name]
            if tensor.nbytes != bytes_ or (part != "weight" and tensor.dtype != kind):
                wrong.append(
                    f"{tensor.name} is stored as {tensor.dtype} {list(tensor.shape)}; a kernel {list(self.shape)} needs "
                    f"{bytes_} bytes" + (f" of {kind}" if part != "weight" else "")
                )
        return missing, unexpected, wrong

    def reader(self, part: str) -> Callable[[Any], np.ndarray]:
        array = self.unpack.inputs[part]
        if part == "offset":
            stored = np.asarray(self.offset, np.float32)
        else:
            stored = self.parts[part].mapped().view(array.dtype).reshape(array.shape)
        if array.dtype == np.float32:  # the absmax, its scales and their offset
            file = self.parts["weight"].file
            return lambda index: finite.converted(stored[index], stored.dtype, _name(self.name, part), file)
        return lambda index: np.asarray(stored[index], order="C")

    def block_absmax(self) -> np.ndarray:
        """Read the absmax of every block, float32, in the order of the file; bit-identical to `Nf4.block_absmax`."""
        absmax = self.reader("absmax")(...)
        if self.offset is None:
            return absmax
        scales = np.repeat(self.reader("nested_absmax")(...), GROUP)[: absmax.size].reshape(absmax.shape)
        return DYNAMIC_MAP[absmax] * scales + self.reader("offset")(...)


def _name(weight: str, part: str) -> str:
    return weight if part == "weight" else f"{weight}.{part}"


def _read_state(name: str, stored: np.ndarray) -> dict[str, Any]:
    state = parse_json(stored.tobytes().decode("utf-8", "replace"), name)
    if not isinstance(state, dict):
        raise UserError(f"{name} must hold a JSON object, not a {type(state).__name__}")
    needed = ["blocksize", "dtype", "shape"]
    needed += ["nested_blocksize", "nested_offset"] if {"nested_blocksize", "nested_offset"} & {*state} else []
    if absent := [field for field in needed if field not in state]:
        raise UserError(f"{name} lacks the fields {', '.join(absent)}")
    return state


def _check_state(weight: str, kind: str, state: Mapping[str, Any]) -> None:
    if kind != "nf4":
        raise UserError(f"{weight} is stored in {kind}; the only supported 4-bit format is nf4")
    for field, needed in (("blocksize", BLOCK), ("nested_blocksize", GROUP)):
        if state.get(field, needed) != needed:
            raise UserError(f"{weight} is stored with {field}={state[field]}; only {needed} is supported")
    if state["dtype"] not in DTYPES:
        raise UserError(f"{weight} decodes to {state['dtype']}; only {', '.join(DTYPES)} are supported")
    if not isinstance(state["shape"], list) or len(state["shape"]) != 2:
        raise UserError(f"{weight} is stored in nf4 with the shape {state['shape']}; a kernel has two dimensions")


def _check_map(name: str, found: np.ndarray, expected: np.ndarray) -> None:
    # torch computes the dynamic map, and its last bit depends on the machine that wrote the file.
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-6, atol=0):
        raise UserError(f"{name} is not the table of values of bitsandbytes' nf4; other codes are not supported")


# --- Writing ---


def pack_kernel(kernel: Nf4) -> dict[str, jax.Array]:
    """Return the arrays of one layer's kernel as they are stored; the inverse of `Unpack`."""
    codes, absmax = (kernel.codes.astype(jnp.int8) + 8).astype(jnp.uint8), kernel.absmax
    if codes.ndim == 3:
        codes, absmax = codes.transpose(2, 0, 1), absmax.T
    size = math.prod(kernel.features)
    pairs = codes.reshape(-1)[: size + size % 2].reshape(-1, 2)
    arrays = {"weight": pairs[:, :1] << 4 | pairs[:, 1:], "absmax": absmax.reshape(-1)}
    if kernel.scales is not None and kernel.offset is not None:
        arrays |= {"nested_absmax": kernel.scales, "offset": kernel.offset}
    return arrays


def tensors(weight: str, arrays: Mapping[str, np.ndarray], kernel: Nf4) -> dict[str, np.ndarray]:
    """Return the tensors of one layer's kernel by name, from what `pack_kernel` made of it; `kernel` may be stacked."""
    inputs, outputs = kernel.features
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": np.dtype(kernel.dtype).name, "shape": [outputs, inputs]}
    stored = {_name(weight, part): array for part, array in arrays.items()}
    stored[f"{weight}.quant_map"] = CODEBOOK
    if "offset" in arrays:
        offset = float(stored.pop(f"{weight}.offset"))
        state |= {"nested_blocksize": GROUP, "nested_dtype": "float32", "nested_offset": offset}
        stored[f"{weight}.nested_quant_map"] = DYNAMIC_MAP
    stored[f"{weight}{_STATE}nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return stored


def quantization_config(nested: bool, dense: Iterable[str], dtype: str) -> dict[str, Any]:
    """Return the quantization_config of config.json; `dense` are the linear modules that are not quantized."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(dense),
    }
