"""NF4 with double quantization: Dettmers et al. 2023 (arXiv:2305.14314), section 3; the numbers are bitsandbytes' own.

A kernel is cut into blocks of 64 along its input dimension. Of a block, absmax = max |w| is kept, and of each weight the
index of the entry of `CODEBOOK`, 16 quantiles of a normal distribution, that is nearest to w / absmax. The absmax are
quantized again: their mean is taken off, and what is left is cut into groups of 256 with one float32 scale each, and is
kept as the index of the nearest entry of `DYNAMIC_MAP` (Dettmers et al. 2022, arXiv:2110.02861, section 2).

    w  =  CODEBOOK[code] * absmax,      absmax  =  DYNAMIC_MAP[index] * scale + offset

A parameter takes 4 bits + 8 / 64 + 32 / (64 * 256) = 4.127 bits.
"""

import dataclasses
import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.quant.base import Quantized, product

BLOCK, GROUP = 64, 256

# QLoRA, appendix E; as float32 the entries of bitsandbytes.
CODEBOOK = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
_MIDPOINTS = (CODEBOOK[1:] + CODEBOOK[:-1]) / np.float32(2)


def _dynamic_map() -> np.ndarray:
    """0, 1, and for every decade 10^-6 ... 10^0 the centres of 2^i equal parts of [0.1, 1] of it, with both signs.

    The ends of those parts are rounded as a fused multiply-add rounds them, from both ends of the interval to its middle.
    """
    values = [np.array([0, 1], np.float32)]
    for i in range(7):
        index, count = np.arange(2**i + 1), 2**i
        step = np.float64(np.float32(np.float32(1) - np.float32(0.1)) / np.float32(count))
        low, high = np.float64(np.float32(0.1)) + step * index, 1 - step * (count - index)
        ends = np.where(2 * index < count + 1, low, high).astype(np.float32)
        centres = np.float32(10.0 ** (i - 6)) * ((ends[1:] + ends[:-1]) / np.float32(2))
        values += [centres, -centres]
    return np.sort(np.concatenate(values))


DYNAMIC_MAP = _dynamic_map()  # float32 [256], sorted


@functools.cache
def _nearest() -> np.ndarray:
    """The index of the nearest entry of `DYNAMIC_MAP` for each of 65536 numbers evenly spaced from -1 to 1, uint8."""
    grid = np.arange(65536) / 65535 * 2 - 1
    middle = (DYNAMIC_MAP[1:].astype(np.float64) + DYNAMIC_MAP[:-1]) / 2
    return np.searchsorted(middle, grid).astype(np.uint8)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "absmax", "scales", "offset"],
    meta_fields=["features", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class Nf4(Quantized):
    """A kernel [*stack, in, out] in NF4; `features` is (in, out).

    codes   int4 [*stack, in/64, 64, out], the index in the codebook minus 8
    absmax  uint8 [*stack, in/64, out], an index in the dynamic map; float32, the absmax itself, without double quantization
    scales  float32 [*stack, ceil(in/64 * out / 256)], of groups of 256 absmax in the order of bitsandbytes, in which
            the block is counted faster than the output; None without double quantization
    offset  float32 [*stack], the mean of the absmax; None without double quantization

    Where `in` is no multiple of 64, the blocks run on from one output to the next, as in bitsandbytes, the last one filled
    up with zeros: codes [*stack, 64 n], absmax [*stack, n] with n = ceil(in * out / 64).

    Signed codes, since tensorstore refuses uint4. The blocks stand before the outputs, since the TPU's compiler then
    decodes within the product; with a reshape between the two it writes the decoded kernel to memory.
    """

    codes: jax.Array
    absmax: jax.Array
    scales: jax.Array | None
    offset: jax.Array | None
    features: tuple[int, int]
    dtype: Any

    @property
    def format(self) -> str:
        return "nf4_single" if self.scales is None else "nf4"

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[: -3 if self._even else -1], *self.features)

    @property
    def _even(self) -> bool:
        return self.features[0] % BLOCK == 0

    def astype(self, dtype: Any) -> jax.Array:
        inputs, outputs = self.features
        values = self._decoded(dtype)
        if self._even:
            return values.reshape(self.shape)
        return values[..., : inputs * outputs].reshape(*self.shape[:-2], outputs, inputs).swapaxes(-1, -2)

    def axes(self, kernel: tuple[str | None, ...]) -> list[tuple[str | None, ...]]:
        *stack, inputs, outputs = kernel
        axes = [(*stack, None), (*stack, None), (*stack, None), tuple(stack)]
        if self._even:
            axes[:2] = [(*stack, inputs, "block", outputs), (*stack, inputs, outputs)]
        return axes if self.scales is not None else axes[:2]

    def dot(self, x: jax.Array) -> jax.Array:
        if not self._even:
            return product("...i,io->...o", x, self.astype(x.dtype)).astype(x.dtype)
        return self._product(x, transposed=False)

    def dot_transposed(self, y: jax.Array) -> jax.Array:
        if not self._even:
            return product("...o,io->...i", y, self.astype(y.dtype)).astype(y.dtype)
        y, kernel = _after(y, self)
        return kernel._product(y, transposed=True)

    def _product(self, x: jax.Array, *, transposed: bool) -> jax.Array:
        """The product with the values in the layout of the codes, in the dtype of x."""
        within, apart = partial(_decoded_within, transposed), partial(_decoded_apart, transposed)
        return jax.lax.platform_dependent(x, self, tpu=within, default=apart)

    def _decoded(self, dtype: Any) -> jax.Array:
        """The values in the layout of the codes."""
        values = _looked_up(self.codes, self.absmax if self.offset is None else self.offset)
        absmax = self.block_absmax()
        if self._even:
            values = values * absmax[..., :, None, :]
        else:
            values = (values.reshape(*absmax.shape, BLOCK) * absmax[..., None]).reshape(values.shape)
        return _rounded(values, self.dtype).astype(dtype)

    def block_absmax(self) -> jax.Array:
        """The absmax of every block, float32, in the layout of `absmax`."""
        if self.scales is None or self.offset is None:
            return self.absmax
        blocks = self.absmax.shape[-2] * self.absmax.shape[-1] if self._even else self.absmax.shape[-1]
        scales = jnp.repeat(self.scales, GROUP, axis=-1)[..., :blocks]
        if self._even:
            scales = scales.reshape(*scales.shape[:-1], self.absmax.shape[-1], -1).swapaxes(-1, -2)
        table = jnp.asarray(DYNAMIC_MAP)
        centred = table.at[self.absmax.astype(jnp.int32)].get(mode="promise_in_bounds") * scales
        # It is within these bounds as it is; without them the compiler would make a fused multiply-add of the product and
        # the sum, which rounds once where bitsandbytes rounds twice.
        centred = jnp.clip(centred, -scales, scales)
        offset = self.offset[..., None, None] if self._even else self.offset[..., None]
        return centred + jnp.broadcast_to(offset, centred.shape)


def _decoded_within(transposed: bool, x: jax.Array, kernel: Nf4) -> jax.Array:
    """The product of a TPU, whose compiler decodes within it, without a decoded kernel in memory. It accumulates in float32
    as it is; asked to return that, it would decode some kernels apart.

    On one device a convolution over the blocks whose window is all of them. Of an einsum the compiler makes one itself, but
    in a layer with adapters over the axis of 64, for which it brings the codes into another layout and decodes them apart.
    On several devices the einsum: around convolutions the compiler copies whole stacks of codes into another layout.
    """
    values = kernel._decoded(x.dtype)
    mesh = jax.sharding.get_abstract_mesh()
    if not (mesh.empty or mesh.size == 1):
        if transposed:
            y = jnp.einsum("...o,gbo->...gb", x, values, preferred_element_type=x.dtype)
            return y.reshape(*x.shape[:-1], -1)
        blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
        return jnp.einsum("...gb,gbo->...o", blocks, values, preferred_element_type=x.dtype)
    if transposed:
        around, axes = [(len(values) - 1, len(values) - 1)], ("NHC", "HOI", "NHC")
        x, values = x[:, None], jax.lax.rev(values, (0,))
    else:
        around, axes = [(0, 0)], ("NHC", "HIO", "NHC")
        x = x.reshape(len(x), -1, BLOCK)
    y = jax.lax.conv_general_dilated(x, values, (1,), around, dimension_numbers=axes, preferred_element_type=x.dtype)
    return y.reshape(len(x), -1)


def _decoded_apart(transposed: bool, x: jax.Array, kernel: Nf4) -> jax.Array:
    """The product of a machine that decodes the kernel first: when x is there, not all kernels of a layer at once."""
    x, kernel = _after(x, kernel)
    values = kernel._decoded(x.dtype)
    if transposed:
        return product("...o,gbo->...gb", x, values).astype(x.dtype).reshape(*x.shape[:-1], -1)
    return product("...gb,gbo->...o", x.reshape(*x.shape[:-1], -1, BLOCK), values).astype(x.dtype)


def _after(x: jax.Array, kernel: Nf4) -> tuple[jax.Array, Nf4]:
    """x and the kernel, which cannot be decoded before x is there. To a compiler decoding depends on nothing: without this
    it may take what it decoded for the recomputed forward pass, and keep it until the backward pass."""
    part = "absmax" if kernel.offset is None else "offset"
    x, waited = jax.lax.optimization_barrier((x, getattr(kernel, part)))
    return x, dataclasses.replace(kernel, **{part: waited})


def _looked_up(codes: jax.Array, beside: jax.Array) -> jax.Array:
    """The entries of the codebook for codes from -8 to 7, float32: chosen in four steps, one for each bit.

    A TPU's compiler makes this a part of the product, where it would write what a gather gives to memory. beside: any
    array that is not a constant. Behind a barrier with it the codebook is none either: broadcast constants would be taken
    out of a scan over layers, as arrays of the kernel's size.
    """
    table, _ = jax.lax.optimization_barrier((jnp.asarray(CODEBOOK), beside))
    index = codes.astype(jnp.int32) + 8
    values = [table[entry] for entry in range(len(CODEBOOK))]
    for bit in range(4):
        odd = (index >> bit) & 1 == 1
        values = [jnp.where(odd, values[i + 1], values[i]) for i in range(0, len(values), 2)]
    return values[0]


def quantize(kernel: jax.Array, *, nested: bool = True) -> Nf4:
    """The kernel [in, out], float32, bfloat16 or float16, in NF4; nested: with double quantization.

    Equal to bitsandbytes bit for bit (its CPU build, which rounds an absmax to a grid of 65536 values before it looks for
    the nearest of the map), but for the offset's last bits: theirs is a sum whose order depends on the machine, ours is
    the same on every mesh.
    """
    inputs, outputs = kernel.shape
    size, even = inputs * outputs, inputs % BLOCK == 0
    values = kernel.astype(jnp.float32)
    in_order = values if even else jnp.pad(values.T.reshape(-1), (0, -size % BLOCK))
    blocks = in_order.reshape(-1, BLOCK, outputs if even else 1)  # [in/64, 64, out] or [n, 64, 1]
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    floor = jnp.finfo(jnp.float32).tiny
    scaled = blocks * (1 / jnp.maximum(absmax, floor))[:, None, :]
    if size % BLOCK:  # bitsandbytes divides here, and multiplies above
        scaled = scaled.at[-1].set(blocks[-1] / jnp.maximum(absmax[-1:], floor))
    codes = sum((jnp.clip(scaled, -1, 1) > middle).astype(jnp.int8) for middle in _MIDPOINTS) - 8
    codes = codes.astype(jnp.int4)
    if not even:
        codes, absmax = codes.reshape(-1), absmax.reshape(-1)
    made = Nf4(codes, absmax, None, None, (inputs, outputs), np.dtype(kernel.dtype))
    return nest(made, mean(absmax)) if nested else made


def nest(kernel: Nf4, offset: jax.Array) -> Nf4:
    """The kernel, which is without double quantization, with it; offset: float32 [], the mean of its absmax."""
    absmax = kernel.absmax.T.reshape(-1)  # in the order of bitsandbytes
    centred = jnp.pad(absmax - offset, (0, -absmax.size % GROUP)).reshape(-1, GROUP)
    scales = jnp.max(jnp.abs(centred), axis=1)
    scaled = jnp.clip(centred * (1 / jnp.maximum(scales, jnp.finfo(jnp.float32).tiny))[:, None], -1, 1)
    index = ((scaled + 1) * 0.5 * 65535 + 0.5).astype(jnp.int32)
    codes = jnp.where(scales[:, None] > 0, jnp.asarray(_nearest())[index], 0).reshape(-1)[: absmax.size]
    codes = codes.astype(jnp.uint8).reshape(kernel.absmax.T.shape).T
    return dataclasses.replace(kernel, absmax=codes, scales=scales, offset=offset)


def mean(x: jax.Array) -> jax.Array:
    """The mean of numbers of at least 0, float32, to about one unit in the last place; the same bits in whatever order
    they are added up, since their digits are added as integers."""
    exponent = jnp.frexp(jnp.max(x))[1]
    fixed = jnp.ldexp(x, 24 - exponent)  # < 2^24
    high = jnp.floor(fixed)
    low = jnp.floor((fixed - high) * 2.0**24)
    total, carry = jnp.float32(0), jnp.uint32(0)
    for part in (low, high):
        for shift in (0, 8, 16):
            carry = (carry >> 8) + jnp.sum((part.astype(jnp.uint32) >> shift) & 255, dtype=jnp.uint32)
            digit = (carry & 255).astype(jnp.float32)
            total = total / 256 + digit
    total = total + ((carry >> 8).astype(jnp.float32) * 256)  # in units of 2^16 of `fixed`
    return jnp.ldexp(total / x.size, exponent - 24 + 16)


def _rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """float32 values rounded to a dtype; a plain conversion there and back would be taken away by the compiler."""
    if dtype == jnp.float32:
        return x
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)
