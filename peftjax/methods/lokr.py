"""LoKr: y = x (W + s (C kron D)) + b, the Kronecker product of a small matrix C and a larger one D = A B or full.

Edalati et al. 2022 (KronA, arXiv:2212.10650) and, with D of low rank, LyCORIS (Yeh et al. 2023, arXiv:2309.14859,
section 3). With in = m n and out = p q, C is [m, p] and D [n, q]: W[i n + i', o q + o'] gets s C[i, o] D[i', o']. With x
as a matrix [m, n], x (C kron D) is C^T x D as a vector, so no matrix [in, out] is formed.

As in peft, m and p are `decompose_factor` if it divides in and out, else the largest divisors up to the square root (and
up to decompose_factor, unless it is -1). D is full if rank >= max(n, q) / 2. C is full unless `decompose_both` is set
and rank < max(m, p) / 2. s = alpha / rank in each case, where LyCORIS has 1 if both are full. C, or its second factor, is
zero at initialization.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, transposed
from peftjax.adapters.lycoris import Lycoris, inverse_root, kaiming
from peftjax.adapters.ranks import RankedAdapter, within
from peftjax.adapters.sites import Site
from peftjax.core.errors import UserError
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.quant.matmul import matmul


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoKr(Lycoris):
    """Options of LoKr.

    Attributes:
        decompose_both (bool, default False): Use a low rank for C too.
        decompose_factor (int, default -1): Sizes m and p of C (see above); -1 takes sizes near the square root.
        rank_dropout_scale (bool, default False): Divide the outputs that rank_dropout keeps by their share.
    """

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False

    method: ClassVar[str] = "lokr"
    peft_type: ClassVar[str] = "LOKR"
    hf_fields: ClassVar = Lycoris.hf_fields | {
        "decompose_both": ("decompose_both", False),
        "decompose_factor": ("decompose_factor", -1),
        "rank_dropout_scale": ("rank_dropout_scale", False),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        factor = self.decompose_factor
        if not isinstance(factor, int) or (factor != -1 and factor < 1):
            raise UserError(f"method.decompose_factor must be -1 or a positive integer, got {factor!r}")

    def check(self, model: nnx.Module) -> None:
        """Accept every rank: a large one makes C and D full."""

    def adapter(self, site: Site, mask: np.ndarray, rngs: nnx.Rngs) -> "LoKrLinear":
        ranks, full = self.ranks(site, mask), self.forms(site, mask)
        if len(full) > 1:
            (m, n), (p, q) = self.sizes(site)
            raise UserError(
                f"method.rank_pattern: ranks {sorted({int(rank) for rank in ranks[mask]})} for the layers of "
                f"{site.names[0].rsplit('.', 1)[-1]} make some of its factors full and others not; choose ranks on one "
                f"side of {max(n, q) / 2:g}" + (f" and of {max(m, p) / 2:g}" if self.decompose_both else "")
            )
        return LoKrLinear(self, site, ranks, *full.pop(), rngs)

    def sizes(self, site: Site) -> tuple[tuple[int, int], tuple[int, int]]:
        """The numbers (m, n) of rows of C and D, and (p, q) of columns."""
        owner = site.module
        return factors(owner.in_features, self.decompose_factor), factors(owner.out_features, self.decompose_factor)

    def forms(self, site: Site, mask: np.ndarray) -> set[tuple[bool, bool]]:
        """The distinct forms of a site's layers: whether C is full, and whether D is. All layers of a stack need the same."""
        (m, n), (p, q) = self.sizes(site)
        ranks = self.ranks(site, mask)[mask]
        return {(bool(not self.decompose_both or rank >= max(m, p) / 2), bool(rank >= max(n, q) / 2)) for rank in ranks}

    def reconciled(
        self, model: nnx.Module, tensors: dict[str, np.ndarray], key_of: Callable[[str], str | None]
    ) -> tuple[Self, dict[str, np.ndarray]]:
        """Multiply the factors of C and D in layers of a stack whose other layers are not factored.

        The products get the rank of a full matrix, and an alpha that keeps the scale.
        """
        found, ranks, alphas = dict(tensors), [], []
        for site, mask in self.chosen(model):
            if len(self.forms(site, mask)) == 1:
                continue
            full = self._full_rank(site)
            layers = zip(site.names, mask, self.ranks(site, mask), self.alphas(site), strict=True)
            for name, used, rank, alpha in layers:
                if not used or rank >= full:
                    continue
                ranks.append((name, full))
                alphas.append((name, float(alpha * full / rank)))
                for matrix in ("lokr_w1", "lokr_w2"):
                    a, b = (key_of(f"{name}.{matrix}_{factor}") for factor in "ab")
                    if a is not None and b is not None:
                        product = found.pop(a).astype(np.float32) @ found.pop(b).astype(np.float32)
                        found[a.removesuffix("_a")] = product
        rank_pattern, alpha_pattern = (*ranks, *self.rank_pattern), (*alphas, *self.alpha_pattern)
        return dataclasses.replace(self, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern), found

    def _full_rank(self, site: Site) -> int:
        """The smallest rank with which C and D of a site are full."""
        rows, columns = self.sizes(site)
        return -(-max(*rows, *columns) // 2)


def factors(size: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is `size`, chosen by `decompose_factor`."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    first = max(number for number in range(1, limit + 1) if size % number == 0)
    return first, size // first


class LoKrLinear(RankedAdapter):
    """x W + x (C kron D) scale.

    R is the largest rank of the stack.

    Attributes:
        c: [*stack, m, p]; or c_a, [*stack, m, R], and c_b, [*stack, R, p].
        d: [*stack, n, q]; or d_a, [*stack, n, R], and d_b, [*stack, R, q].
        scale: alpha / rank, [*stack]; 0 in a layer without the adapter.
        active: 1 within the rank of each layer and 0 beyond, [*stack, R]; None if C and D are full.
    """

    def __init__(self, method: LoKr, site: Site, ranks: np.ndarray, full_c: bool, full_d: bool, rngs: nnx.Rngs) -> None:
        self.set_ranks(ranks)
        self.full_c, self.full_d = full_c, full_d
        self.update_dropout = method.update_dropout(site, rescale=method.rank_dropout_scale)
        (m, n), (p, q) = method.sizes(site)
        active, rank = within(ranks, site.stack), int(ranks.max())
        self.scale = PeftConstant(method.scales(site, ranks), axes=site.lead())
        self.active: Any = nnx.data(
            None if full_c and full_d else PeftConstant(jnp.asarray(active), axes=site.lead("rank"))
        )
        a, b, bound = active[..., None, :], active[..., :, None], inverse_root(ranks, site.stack)
        whole, first, second = site.lead(None, None), site.lead(None, "rank"), site.lead("rank", None)
        if full_c:
            self.c = PeftParam(jnp.zeros((*site.stack, m, p), jnp.float32), axes=whole)
        else:
            self.c_a = PeftParam(kaiming(site, m, rank, m**-0.5, rngs) * a, axes=first)
            self.c_b = PeftParam(jnp.zeros((*site.stack, rank, p), jnp.float32), axes=second)
        if full_d:
            self.d = PeftParam(kaiming(site, n, q, n**-0.5, rngs), axes=whole)
        else:
            self.d_a = PeftParam(kaiming(site, n, rank, n**-0.5, rngs) * a, axes=first)
            self.d_b = PeftParam(kaiming(site, rank, q, bound, rngs) * b, axes=second)

    def delta(self) -> jax.Array:
        """s (C kron D)."""
        return jnp.kron(*self.factors())

    def update(self, x: jax.Array) -> jax.Array:
        c, d = self.factors()
        (m, p), (n, q) = c.shape, d.shape
        y = matmul(x.reshape(*x.shape[:-1], m, n), d)  # [..., m, q]
        y = matmul(y.swapaxes(-1, -2), c).swapaxes(-1, -2)  # [..., p, q]
        return self.update_dropout(y.reshape(*x.shape[:-1], p * q))

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """s C [m, p] and D [n, q] of one layer."""
        c = self.c.get_value() if self.full_c else self._product(self.c_a, self.c_b)
        d = self.d.get_value() if self.full_d else self._product(self.d_a, self.d_b)
        return c * self.scale.get_value(), d

    def _product(self, a: PeftParam, b: PeftParam) -> jax.Array:
        return (a.get_value() * self.active.get_value()[None]) @ b.get_value()

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        rank = self.ranks[layer or 0]
        leaves = {}
        for suffix, leaf, full in (("lokr_w1", "c", self.full_c), ("lokr_w2", "d", self.full_d)):
            if rank and full:
                leaves[suffix] = transposed(leaf)
            elif rank:
                leaves[f"{suffix}_a"] = self.unpadded(transposed(f"{leaf}_b"), rank)
                leaves[f"{suffix}_b"] = self.unpadded(transposed(f"{leaf}_a"), rank)
        return leaves
