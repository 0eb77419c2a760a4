"""What VeRA and RandLoRA share: options of methods whose random, frozen projections are shared by all layers."""

import dataclasses
from typing import Any, ClassVar, Self

import numpy as np

from peftjax.adapters.biases import WithBiases
from peftjax.adapters.options import positive_integer, seed
from peftjax.adapters.selection import Chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projected(WithBiases):
    """Options of the random projections.

    Attributes:
        rank (int): Rank of the projections.
        dropout (float, default 0.0): Dropout rate of the adapter's input.
        projection_prng_key (int, default 0): Seed of the projections. The adapter file always contains them, because
            torch would draw others from the same seed.
    """

    rank: int = 256
    dropout: float = 0.0
    projection_prng_key: int = 0

    traced_options: ClassVar = WithBiases.traced_options | {"projection_prng_key"}
    hf_fields: ClassVar = {key: hf for key, hf in WithBiases.hf_fields.items() if key != "exclude"} | {
        "projection_prng_key": ("projection_prng_key", 0)
    }
    hf_constants: ClassVar = {"save_projection": True, "init_weights": True, "fan_in_fan_out": False}
    hf_training: ClassVar = {"init_weights": True}

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_integer(rank=self.rank)
        seed(32, projection_prng_key=self.projection_prng_key)

    def peft_projections(self, chosen: Chosen) -> dict[str, np.ndarray]:
        """Return the projections that peft draws from `projection_prng_key` for some targets, by the keys of its files."""
        raise NotImplementedError

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        # If the file lacks the projections, they are drawn when its tensors are read (io/adapter_load.py).
        return super().from_hf(config | {"save_projection": True})
