"""FourierFT: y = x (W + s Re(F^-1 S)) + b, with a spectrum S [in, out] that is zero except for n trained coefficients.

Gao et al. 2024 (arXiv:2405.03003), section 3.1. F^-1 is the two-dimensional inverse discrete Fourier transform. As in
peft it divides by in * out, which the paper's equation does not say. The coefficients have random places, the same in all
layers of one shape. The file holds only the coefficients: their places are the first n entries of the permutation that
torch draws from `random_loc_seed`, which peftjax reproduces.
"""

import dataclasses
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import DeltaAdapter, HfLeaf, LayerMask
from peftjax.adapters.biases import WithBiases
from peftjax.adapters.options import pattern, positive, positive_integer, seed
from peftjax.adapters.ranks import within
from peftjax.adapters.selection import Chosen, check_table
from peftjax.adapters.sites import Site
from peftjax.adapters.torch_random import TorchGenerator
from peftjax.core.errors import UserError
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.nn.dropout import Dropout
from peftjax.nn.slot import Base

LARGEST = (2**32 - 1) // 20  # from this size on, torch uses another algorithm for permutations


@dataclasses.dataclass(frozen=True, kw_only=True)
class FourierFT(WithBiases):
    """Options of FourierFT.

    Attributes:
        n_frequency (int, default 1000): Number n of coefficients per layer.
        scaling (float, default 150.0): Scale s of the update.
        random_loc_seed (int, default 777): Seed of the places of the coefficients.
        n_frequency_pattern (mapping, default none): Numbers of coefficients of some modules, by name.
        init_weights (bool, default False): Initialize the coefficients to 0. Otherwise they are normal with standard
            deviation 1, as in the paper, and a new adapter changes the model.
    """

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    n_frequency_pattern: tuple[tuple[str, int], ...] = ()
    init_weights: bool = False

    method: ClassVar[str] = "fourierft"
    peft_type: ClassVar[str] = "FOURIERFT"
    tables: ClassVar = ("n_frequency_pattern",)
    hf_fields: ClassVar = WithBiases.hf_fields | {
        "n_frequency": ("n_frequency", 1000),
        "scaling": ("scaling", 150.0),
        "random_loc_seed": ("random_loc_seed", 777),
        "n_frequency_pattern": ("n_frequency_pattern", {}),
        "init_weights": ("init_weights", False),
    }
    hf_constants: ClassVar = {"fan_in_fan_out": False}
    traced_options: ClassVar = WithBiases.traced_options | {
        "n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed", "init_weights",
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self._replace(n_frequency_pattern=pattern("n_frequency_pattern", self.n_frequency_pattern))
        for number in (self.n_frequency, *dict(self.n_frequency_pattern).values()):
            positive_integer(n_frequency=number)
        positive(scaling=self.scaling)
        seed(64, random_loc_seed=self.random_loc_seed)

    @property
    def neutral(self) -> bool:
        return self.init_weights

    def chosen(self, model: nnx.Module) -> Chosen:
        chosen = super().chosen(model)
        check_table("n_frequency_pattern", self.n_frequency_pattern, chosen)
        return chosen

    def adapter(self, site: Site, mask: np.ndarray, rngs: nnx.Rngs) -> "FourierLinear":
        counts = np.where(mask, [self._frequencies(name) for name in site.names], 0)
        size = site.module.in_features * site.module.out_features
        if counts.max() > size:
            raise UserError(f"method.n_frequency={counts.max()} is more than the {size} weights of {site.names[0]}")
        if size >= LARGEST:
            raise UserError(
                f"method.targets: {site.names[0]} has {size} weights; for {LARGEST} or more, torch draws the "
                "positions of FourierFT's coefficients with an algorithm that is not reproduced here, so peft could not read the "
                "adapter. Leave it out"
            )
        return FourierLinear(site, counts, self, rngs)

    def _frequencies(self, name: str) -> int:
        """By peft's rule, which differs from rank_pattern's: an ending takes precedence over the exact name."""
        table = dict(self.n_frequency_pattern)
        ending = next((key for key in table if re.match(rf".*\.{key}$", name)), name)
        return table.get(ending, self.n_frequency)


def places(size: int, count: int, seed: int) -> np.ndarray:
    """The first `count` numbers of torch.randperm(size, generator=torch.Generator().manual_seed(seed)), int64.

    A Fisher-Yates shuffle from the front, which swaps place i with place i + (32 bits of MT19937 modulo size - i).
    """
    bits = TorchGenerator(seed).bits(count)
    moved: dict[int, int] = {}  # the numbers that are no longer at their own place
    found = []
    for index in range(count):
        other = index + int(bits[index]) % (size - index)
        found.append(moved.get(other, other))
        moved[other] = moved.get(index, index)
    return np.array(found, np.int64)


class FourierLinear(DeltaAdapter):
    """x W + x Re(F^-1 S) scale.

    N is the largest number of coefficients in the stack.

    Attributes:
        counts: The number of coefficients of each layer, 0 in a layer without the adapter.
        spectrum: The coefficients, [*stack, N].
        scale: s, [*stack, N]; 0 beyond a layer's own number of coefficients.
        place: Their rows and columns in S, int32 [2, N].
    """

    zero_is_identity: ClassVar = True

    def __init__(self, site: Site, counts: np.ndarray, method: FourierFT, rngs: nnx.Rngs) -> None:
        self.counts = tuple(int(count) for count in counts)
        self.layers = LayerMask(counts > 0)
        self.shape = (site.module.in_features, site.module.out_features)
        found = places(self.shape[0] * self.shape[1], max(self.counts), method.random_loc_seed)
        columns, rows = np.divmod(found, self.shape[0])  # torch's weight is [out, in]
        self.place = PeftConstant(jnp.asarray(np.stack([rows, columns]), jnp.int32), axes=(None, None))
        active = within(counts, site.stack)
        self.scale = PeftConstant(jnp.asarray(active * method.scaling), axes=site.lead(None))
        drawn = jax.random.normal(rngs.params(), active.shape, jnp.float32) * active
        self.spectrum = PeftParam(jnp.zeros_like(drawn) if method.init_weights else drawn, axes=site.lead(None))
        self.dropout = Dropout(0.0, site.stack)

    def delta(self) -> jax.Array:
        """s Re(F^-1 S)."""
        rows, columns = self.place.get_value()
        coefficients = self.spectrum.get_value() * self.scale.get_value()
        dense = jnp.zeros(self.shape, jnp.float32).at[rows, columns].add(coefficients)
        return jnp.fft.ifft2(dense).real

    def apply(self, base: Base, x: jax.Array) -> jax.Array:
        return base(x) + self.update(x)  # in this order, unlike in DeltaAdapter

    def forget_layers(self) -> None:
        super().forget_layers()
        self.counts = (1,) * len(self.counts)

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        count = self.counts[layer or 0]
        return {"fourierft_spectrum": HfLeaf("spectrum", window=(slice(count),))} if count else {}
