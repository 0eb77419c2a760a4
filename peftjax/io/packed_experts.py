"""Experts in NF4 as bitsandbytes stores them for transformers 4: every projection of every expert is a separate kernel.

The parameter is one kernel per expert, [in, P out], whose codes are its P projections' side by side. Its absmax has
one offset per expert, but each projection is stored with its own. With double quantization and P > 1 the absmax are therefore
decoded, which is exact and takes 0.37 bits more per weight.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from peftjax.core.errors import UserError
from peftjax.io.bitsandbytes import Packed, PackedKernel, Unpack, tensors
from peftjax.quant.nf4 import BLOCK, GROUP, Nf4


@dataclasses.dataclass(frozen=True)
class UnpackExperts(Unpack):
    """A function from the arrays of the kernels of E experts, as `PackedExperts.read` returns them, to an `Nf4`.

    Attributes:
        experts: E.
    """

    experts: int

    @property
    def inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            part: jax.ShapeDtypeStruct((self.experts, *array.shape), array.dtype)
            for part, array in super().inputs.items()
        }

    def __call__(self, stored: Mapping[str, jax.Array]) -> Nf4:
        made: Nf4 = jax.vmap(super().__call__)(stored)
        return made


@dataclasses.dataclass(frozen=True)
class PackedExperts(Packed):
    """The stored kernels of all experts of a layer, [E, P out, in].

    Attributes:
        kernels: The kernels of every expert, E tuples of P.
    """

    kernels: tuple[tuple[PackedKernel, ...], ...]

    @property
    def unpack(self) -> UnpackExperts:
        one, projections = self.kernels[0][0].unpack, len(self.kernels[0])
        inputs, outputs = one.features
        nested = one.nested and projections == 1
        return UnpackExperts((inputs, outputs * projections), one.dtype, nested, len(self.kernels))

    def faults(self) -> tuple[list[str], list[str], list[str]]:
        result: tuple[list[str], list[str], list[str]] = ([], [], [])
        for kernel in (kernel for of_one in self.kernels for kernel in of_one):
            for found, more in zip(result, kernel.faults(), strict=True):
                found += more
        return result

    def reader(self, part: str) -> Callable[[Any], np.ndarray]:
        return partial(self._read, part)

    def _read(self, part: str, index: tuple[slice, ...]) -> np.ndarray:
        experts, *within = index
        return np.stack([self._of_one(kernels, part, within) for kernels in self.kernels[experts]])

    def _of_one(self, kernels: Sequence[PackedKernel], part: str, within: Sequence[slice]) -> np.ndarray:
        """A slice of an array of one expert."""
        if len(kernels) == 1:
            return kernels[0].reader(part)(tuple(within))
        rows, *rest = within
        every = (slice(None), *rest)
        if part == "absmax":
            return np.concatenate([kernel.block_absmax()[every] for kernel in kernels])[rows]
        return np.concatenate([kernel.reader(part)(every) for kernel in kernels])[rows]


def join_kernels(name: str, kernels: Sequence[Sequence[PackedKernel]]) -> PackedExperts:
    """Combine the stored kernels of experts, E sequences of P, into one under the name of all.

    Raises:
        UserError: They differ in shape or format, or blocks of one continue in the next.
    """
    first = kernels[0][0]
    for kernel in (kernel for of_one in kernels for kernel in of_one):
        if kernel.unpack != first.unpack:
            one, other = (
                f"{which.name} is {which.unpack.format} of {which.decoded} {list(which.shape)}"
                for which in (kernel, first)
            )
            raise UserError(f"{one}, and {other}: all experts of a layer must have one format and shape")
    outputs, inputs = first.shape
    projections = len(kernels[0])
    if projections > 1 and inputs * outputs % BLOCK:
        raise UserError(
            f"{first.name} is stored in NF4 with {inputs * outputs} weights, which is not a multiple of {BLOCK}; load the "
            'directory of the original model with quantize="nf4"'
        )
    shape = (len(kernels), projections * outputs, inputs)
    return PackedExperts(name, shape, first.decoded, tuple(tuple(of_one) for of_one in kernels))


def can_split(kernel: Nf4, projections: int) -> bool:
    """Whether the kernels of experts, [..., in, P out], can be divided into P kernels with the same bits.

    With double quantization, groups of absmax must not continue from one projection in the next.
    """
    inputs, outputs = kernel.features
    unit = BLOCK if kernel.scales is None else BLOCK * GROUP
    return projections == 1 or inputs * outputs // projections % unit == 0


def split_kernels(
    names: Sequence[Sequence[str]], arrays: Mapping[str, np.ndarray], kernel: Nf4
) -> dict[str, np.ndarray]:
    """Return the tensors of the kernels of all experts of a layer, by name.

    Args:
        names: The names of the weights of every expert, E sequences of P.
        arrays: What `bitsandbytes.pack_kernel` made of every expert, [E, ...].
        kernel: The kernels, which `can_split` divides.
    """
    inputs, outputs = kernel.features
    count = len(names[0])
    one = dataclasses.replace(kernel, features=(inputs, outputs // count))
    result: dict[str, np.ndarray] = {}
    for expert, of_one in enumerate(names):
        pieces = {
            part: [array[expert]] * count if part == "offset" else np.split(array[expert], count)
            for part, array in arrays.items()
        }
        for i, name in enumerate(of_one):
            result |= tensors(name, {part: piece[i] for part, piece in pieces.items()}, one)
    return result
