"""NF4 with double quantization (Dettmers et al. 2023, arXiv:2305.14314, section 3), bit-compatible with bitsandbytes.

A kernel is divided into blocks of 64 weights along its input dimension. Each block stores absmax = max |w|, and each weight
stores the index of the entry of `CODEBOOK`, 16 quantiles of a normal distribution, nearest to w / absmax. The absmax are
quantized again: their mean is subtracted, the rest is divided into groups of 256 with one float32 scale each, and stored as
indices of the nearest entries of `DYNAMIC_MAP` (Dettmers et al. 2022, arXiv:2110.02861, section 2).

    w  =  CODEBOOK[code] * absmax,      absmax  =  DYNAMIC_MAP[index] * scale + offset

A weight takes 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits.
"""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from peftjax.quant.base import Quantized
from peftjax.quant.products import dot, dot_transposed

BLOCK, GROUP = 64, 256

# QLoRA, appendix E; in float32 equal to bitsandbytes' values.
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
    """0, 1, and for each decade 10^-6 ... 10^0 the centers of 2^i equal parts of its interval [0.1, 1], with both signs.

    The ends of the parts are rounded as by a fused multiply-add, computed from both ends of the interval to its middle.
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
    """The index of the nearest entry of `DYNAMIC_MAP` for 65536 numbers evenly spaced from -1 to 1, uint8."""
    grid = np.arange(65536) / 65535 * 2 - 1
    middle = (DYNAMIC_MAP[1:].astype(np.float64) + DYNAMIC_MAP[:-1]) / 2
    return np.searchsorted(middle, grid).astype(np.uint8)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nf4(Quantized):
    """A kernel [*stack, in, out] in NF4.

    If `in` is not a multiple of 64, blocks continue from one output to the next, as in bitsandbytes, and the last one is
    padded with zeros: codes [*stack, 64 n], absmax [*stack, n] with n = ceil(in * out / 64).

    Codes are signed because tensorstore does not support uint4. The block axis comes before the outputs because the TPU
    compiler then fuses decoding into the product; with a reshape in between it writes the decoded kernel to memory.

    Attributes:
        codes: int4 [*stack, in/64, 64, out], index in the codebook minus 8.
        absmax: uint8 [*stack, in/64, out], index in the dynamic map; without double quantization the absmax itself, float32.
        scales: float32 [*stack, ceil(in/64 * out / 256)], of groups of 256 absmax in bitsandbytes' order, in which the block
            index varies faster than the output index; None without double quantization.
        offset: float32 [*stack], the mean of the absmax; None without double quantization.
        features: (in, out).
        dtype: The dtype that it decodes to.
    """

    codes: jax.Array
    absmax: jax.Array
    scales: jax.Array | None
    offset: jax.Array | None
    features: tuple[int, int] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    @property
    def format(self) -> str:
        return "nf4_single" if self.scales is None else "nf4"

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[: -3 if self._even else -1], *self.features)

    @property
    def _even(self) -> bool:
        return self.features[0] % BLOCK == 0

    def astype(self, dtype: DTypeLike) -> jax.Array:
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
            return dot(x, self.astype(x.dtype)).astype(x.dtype)
        return self._product(x, transposed=False)

    def dot_transposed(self, y: jax.Array) -> jax.Array:
        if not self._even:
            return dot_transposed(y, self.astype(y.dtype)).astype(y.dtype)
        y, kernel = _after(y, self)
        return kernel._product(y, transposed=True)

    def _product(self, x: jax.Array, *, transposed: bool) -> jax.Array:
        """The product, in the dtype of x."""
        forms = {"tpu": partial(_fused, transposed), "cpu": partial(_unfused, 2, transposed)}
        return jax.lax.platform_dependent(x, self, default=partial(_unfused, 1, transposed), **forms)

    def _decoded(self, dtype: DTypeLike) -> jax.Array:
        """The decoded values in the layout of the codes."""
        values = _looked_up(self.codes, self.absmax if self.offset is None else self.offset)
        absmax = self.block_absmax()
        if self._even:
            values = values * absmax[..., :, None, :]
        else:
            values = (values.reshape(*absmax.shape, BLOCK) * absmax[..., None]).reshape(values.shape)
        return (values if dtype == self.dtype else _rounded(values, self.dtype)).astype(dtype)

    def tabulated_absmax(self) -> jax.Array:
        """`block_absmax()`, bit-identical, looked up in a table of the 256 possible values of every group.

        The lookup is its last operation. XLA's CPU backend stores the result of a lookup; it would fuse any later operation
        into the decoding of the kernel and compute it once per weight.
        """
        if not self._even or self.scales is None or self.offset is None:
            return self.block_absmax()
        scales = self.scales[:, None]
        tables = jnp.clip(jnp.asarray(DYNAMIC_MAP)[None] * scales, -scales, scales) + self.offset  # [groups, 256]
        blocks, outputs = self.absmax.shape
        index = jax.lax.broadcasted_iota(jnp.int32, (blocks, outputs), 1) * blocks
        index = index + jax.lax.broadcasted_iota(jnp.int32, (blocks, outputs), 0)
        return tables.at[index // GROUP, self.absmax.astype(jnp.int32)].get(mode="promise_in_bounds")

    def block_absmax(self) -> jax.Array:
        """Return the absmax of every block, float32, in the layout of `absmax`."""
        if self.scales is None or self.offset is None:
            return self.absmax
        blocks = self.absmax.shape[-2] * self.absmax.shape[-1] if self._even else self.absmax.shape[-1]
        scales = jnp.repeat(self.scales, GROUP, axis=-1)[..., :blocks]
        if self._even:
            scales = scales.reshape(*scales.shape[:-1], self.absmax.shape[-1], -1).swapaxes(-1, -2)
        table = jnp.asarray(DYNAMIC_MAP)
        centred = table.at[self.absmax.astype(jnp.int32)].get(mode="promise_in_bounds") * scales
        # Always within these bounds. Without them the compiler would fuse the product and the sum into a multiply-add,
        # which rounds once where bitsandbytes rounds twice.
        centred = jnp.clip(centred, -scales, scales)
        offset = self.offset[..., None, None] if self._even else self.offset[..., None]
        return centred + jnp.broadcast_to(offset, centred.shape)


def _fused(transposed: bool, x: jax.Array, kernel: Nf4) -> jax.Array:
    """The product on a TPU, whose compiler fuses decoding into it, so that no decoded kernel is in memory.

    It accumulates in float32 anyway; if asked to return float32, the compiler would decode some kernels separately.

    On one device this is a convolution over the blocks, with a window of all blocks. The compiler would turn an einsum into
    a convolution itself, but in a layer with adapters over the axis of 64, for which it copies the codes to another layout
    and decodes them separately. On several devices it is an einsum, because around convolutions the compiler copies whole
    stacks of codes to another layout.
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


def _unfused(parts: int, transposed: bool, x: jax.Array, kernel: Nf4) -> jax.Array:
    """The product on other devices: decode the kernel once x is available, not all kernels of a layer at once.

    CPUs compute it in two parts, the even and the odd columns. Each byte holds one code of both: XLA's CPU backend can
    vectorize a loop over bytes, but not over 4-bit codes.
    """
    x, kernel = _after(x, kernel)
    columns = [part.astype(x.dtype) for part in _columns(kernel, parts)]
    if transposed:
        y = x.reshape(*x.shape[:-1], -1, len(columns))
        products = (dot_transposed(y[..., i], values) for i, values in enumerate(columns))
        return functools.reduce(jnp.add, products).astype(x.dtype)
    y = jnp.stack([dot(x, values).astype(x.dtype) for values in columns], axis=-1)
    return y.reshape(*x.shape[:-1], -1)


def _columns(kernel: Nf4, parts: int) -> list[Nf4]:
    """Split a kernel into `parts` kernels of every `parts`-th column; into one if `parts` does not divide their number.

    Their absmax are decoded.
    """
    parts = parts if kernel.shape[-1] % parts == 0 else 1
    codes, absmax = (x.reshape(*x.shape[:-1], -1, parts) for x in (kernel.codes, kernel.tabulated_absmax()))
    features = (kernel.features[0], kernel.features[1] // parts)
    return [Nf4(codes[..., i], absmax[..., i], None, None, features, kernel.dtype) for i in range(parts)]


def _after(x: jax.Array, kernel: Nf4) -> tuple[jax.Array, Nf4]:
    """Make decoding the kernel depend on x.

    Otherwise the compiler may decode at any time, and keep what it decoded in the recomputed forward pass until the backward
    pass.
    """
    if kernel.offset is None:
        x, absmax = jax.lax.optimization_barrier((x, kernel.absmax))
        return x, dataclasses.replace(kernel, absmax=absmax)
    x, offset = jax.lax.optimization_barrier((x, kernel.offset))
    return x, dataclasses.replace(kernel, offset=offset)


def _looked_up(codes: jax.Array, beside: jax.Array) -> jax.Array:
    """The codebook entries of codes from -8 to 7, float32, selected in four steps, one for each bit.

    The TPU compiler fuses this into the product; it would write the result of a gather to memory.

    Args:
        codes: int4 [...].
        beside: Any array that is not a constant. The barrier makes the codebook depend on it. As a constant, it would be
            broadcast and hoisted out of a scan over layers as arrays of the kernel's size.
    """
    table, _ = jax.lax.optimization_barrier((jnp.asarray(CODEBOOK), beside))
    index = codes.astype(jnp.int32) + 8
    values = [table[entry] for entry in range(len(CODEBOOK))]
    for bit in range(4):
        odd = (index >> bit) & 1 == 1
        values = [jnp.where(odd, values[i + 1], values[i]) for i in range(0, len(values), 2)]
    return values[0]


def quantize(kernel: jax.Array, *, nested: bool = True) -> Nf4:
    """Quantize a kernel to NF4.

    Bit-identical to bitsandbytes (its CPU build, which rounds an absmax to a grid of 65536 values before it looks up the
    nearest entry of the map), except for the last bits of the offset: theirs is a sum whose order depends on the machine,
    ours is the same on every mesh.

    Args:
        kernel: [in, out], float32, bfloat16 or float16.
        nested: Whether to quantize the absmax too (double quantization).
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
    """Quantize the absmax of a kernel without double quantization; offset: float32 [], their mean."""
    absmax = kernel.absmax.T.reshape(-1)  # in the order of bitsandbytes
    centred = jnp.pad(absmax - offset, (0, -absmax.size % GROUP)).reshape(-1, GROUP)
    scales = jnp.max(jnp.abs(centred), axis=1)
    scaled = jnp.clip(centred * (1 / jnp.maximum(scales, jnp.finfo(jnp.float32).tiny))[:, None], -1, 1)
    index = ((scaled + 1) * 0.5 * 65535 + 0.5).astype(jnp.int32)
    codes = jnp.where(scales[:, None] > 0, jnp.asarray(_nearest())[index], 0).reshape(-1)[: absmax.size]
    codes = codes.astype(jnp.uint8).reshape(kernel.absmax.T.shape).T
    return dataclasses.replace(kernel, absmax=codes, scales=scales, offset=offset)


def mean(x: jax.Array) -> jax.Array:
    """The mean of nonnegative numbers, float32, to about one unit in the last place.

    Its bits do not depend on the order of the sum, because digits are added as integers.
    """
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


def _rounded(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Round float32 values to a dtype; the compiler would remove a conversion there and back."""
    if dtype == jnp.float32:
        return x
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)
