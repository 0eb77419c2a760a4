"""FourierFT: y = x (W + s Re(F^-1 S)) + b, with a spectrum S [in, out] that is zero but at n places, which are trained.

Gao et al. 2024 (arXiv:2405.03003), section 3.1. F^-1 is the inverse discrete Fourier transform in two dimensions; it
divides by in * out, as peft's does and the paper's equation does not say. The places are the same in all layers of one
shape and random. The file holds the n coefficients alone: their places are the first n of the permutation that torch
draws from `random_loc_seed`, and `places` draws the same.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.adapter import DeltaAdapter, HfLeaf, LayerMask
from peftjax.adapters.method import positive
from peftjax.adapters.sites import Chosen, Site, check_table
from peftjax.adapters.targeted import Targeted
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.nn.dropout import Dropout

LARGEST = (2**32 - 1) // 20  # torch permutes as many numbers as this in another way


@dataclasses.dataclass(frozen=True, kw_only=True)
class FourierFT(Targeted):
    """Options of FourierFT, beside those of `Targeted`.

    n_frequency: how many coefficients are trained; n_frequency_pattern: exceptions by module name. scaling: s above.
    random_loc_seed: of the places. init_weights: coefficients that are 0 at the start; else they are normal with
    standard deviation 1, as in the paper, and the adapter changes the model at once.
    """

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    n_frequency_pattern: tuple[tuple[str, int], ...] = ()
    init_weights: bool = False

    method: ClassVar[str] = "fourierft"
    peft_type: ClassVar[str] = "FOURIERFT"
    hf_fields: ClassVar = Targeted.hf_fields | {
        "n_frequency": ("n_frequency", 1000),
        "scaling": ("scaling", 150.0),
        "random_loc_seed": ("random_loc_seed", 777),
        "n_frequency_pattern": ("n_frequency_pattern", None),
        "init_weights": ("init_weights", False),
    }
    hf_constants: ClassVar = {"bias": "none", "fan_in_fan_out": False}

    @property
    def neutral(self) -> bool:
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        pattern = self.n_frequency_pattern
        items = pattern.items() if isinstance(pattern, Mapping) else pattern
        object.__setattr__(self, "n_frequency_pattern", tuple((str(key), number) for key, number in items))
        for number in (self.n_frequency, *dict(self.n_frequency_pattern).values()):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"method.n_frequency must be a whole number of at least 1, it is {number!r}")
        positive(scaling=self.scaling)
        if not isinstance(self.random_loc_seed, int) or not 0 <= self.random_loc_seed < 2**64:
            raise ValueError(
                f"method.random_loc_seed must be a whole number of at least 0, it is {self.random_loc_seed!r}"
            )

    def chosen(self, model: nnx.Module) -> Chosen:
        chosen = super().chosen(model)
        check_table("n_frequency_pattern", self.n_frequency_pattern, chosen)
        return chosen

    def adapter(self, site: Site, mask: np.ndarray, rngs: nnx.Rngs) -> "FourierLinear":
        counts = np.where(mask, [self._frequencies(name) for name in site.names], 0)
        size = site.module.in_features * site.module.out_features
        if counts.max() > size:
            raise ValueError(f"method.n_frequency={counts.max()} is more than {site.names[0]} has, which is {size}")
        if size >= LARGEST:
            raise ValueError(
                f"method.targets: {site.names[0]} has {size} weights; from {LARGEST} on torch draws the places of "
                "FourierFT in a way that is not repeated here, so an adapter of it could not be exchanged. Leave it out"
            )
        return FourierLinear(site, counts, self, rngs)

    def to_hf(self, model: nnx.Module, name: str) -> dict[str, Any]:
        return super().to_hf(model, name) | {"n_frequency_pattern": dict(self.n_frequency_pattern)}

    def _frequencies(self, name: str) -> int:
        """By peft's rule, which here is another than for rank_pattern: an ending goes before the exact name."""
        table = dict(self.n_frequency_pattern)
        ending = next((key for key in table if re.match(rf".*\.{key}$", name)), name)
        return table.get(ending, self.n_frequency)


def places(size: int, count: int, seed: int) -> np.ndarray:
    """The first `count` numbers of torch.randperm(size, generator=torch.Generator().manual_seed(seed)), int64.

    A Fisher-Yates shuffle from the front, which swaps place i with place i + (32 bits of MT19937 modulo size - i).
    """
    bits = np.random.RandomState(seed % 2**32).randint(0, 2**32, count, np.uint32)
    moved: dict[int, int] = {}  # what is no longer at its own place
    found = []
    for index in range(count):
        other = index + int(bits[index]) % (size - index)
        found.append(moved.get(other, other))
        moved[other] = moved.get(index, index)
    return np.array(found, np.int64)


class FourierLinear(DeltaAdapter):
    """x Re(F^-1 S) * scale. spectrum: [*stack, N], scale: [*stack, N], place: int32 [2, N], rows and columns of S.

    N is the largest number of coefficients in the stack; scale is 0 beyond a layer's own, and in a layer that is left
    out everywhere.
    """

    names: ClassVar = {"fourierft_spectrum": HfLeaf("spectrum")}

    def __init__(self, site: Site, counts: np.ndarray, method: FourierFT, rngs: nnx.Rngs) -> None:
        self.counts = tuple(int(count) for count in counts)  # one for each layer, 0 where there is none
        self.layers = LayerMask(tuple(count > 0 for count in self.counts))
        stack, most = site.stack, max(self.counts)
        self.shape = (site.module.in_features, site.module.out_features)
        found = places(self.shape[0] * self.shape[1], most, method.random_loc_seed)
        columns, rows = np.divmod(found, self.shape[0])  # torch's weight is [out, in]
        self.place = PeftConstant(jnp.asarray(np.stack([rows, columns]), jnp.int32), axes=(None, None))
        active = jnp.asarray(np.arange(most) < counts[:, None], jnp.float32).reshape(*stack, most)
        self.scale = PeftConstant(active * method.scaling, axes=site.lead(None))
        drawn = jax.random.normal(rngs.params(), active.shape, jnp.float32) * active
        self.spectrum = PeftParam(jnp.zeros_like(drawn) if method.init_weights else drawn, axes=site.lead(None))
        self.dropout = Dropout(0.0, stack)

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        own = (slice(self.counts[layer or 0]),)
        return {key: dataclasses.replace(leaf, window=own) for key, leaf in super().hf_leaves(layer).items()}

    def delta(self) -> jax.Array:
        """s Re(F^-1 S)."""
        rows, columns = self.place.get_value()
        coefficients = self.spectrum.get_value() * self.scale.get_value()
        dense = jnp.zeros(self.shape, jnp.float32).at[rows, columns].set(coefficients, unique_indices=True)
        return jnp.fft.ifft2(dense).real
