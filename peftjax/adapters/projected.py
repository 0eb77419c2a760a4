"""What VeRA and RandLoRA share: options of methods whose random, frozen projections are shared by all layers."""

import dataclasses
from typing import Any, ClassVar, Self

from peftjax.adapters.options import positive_integer, seed
from peftjax.adapters.targeted import Targeted
from peftjax.core.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projected(Targeted):
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

    traced_options: ClassVar = Targeted.traced_options | {"projection_prng_key"}
    hf_fields: ClassVar = {key: hf for key, hf in Targeted.hf_fields.items() if key != "exclude"} | {
        "projection_prng_key": ("projection_prng_key", 0)
    }
    hf_constants: ClassVar = {"save_projection": True, "bias": "none", "init_weights": True, "fan_in_fan_out": False}
    hf_training: ClassVar = {"init_weights": True}

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_integer(rank=self.rank)
        seed(32, projection_prng_key=self.projection_prng_key)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        if config.get("save_projection") is False:
            raise UserError(
                "adapter_config.json: save_projection=False: the file lacks its random projections, and only torch can "
                "draw them again from projection_prng_key. Save it again from peft with save_projection=True"
            )
        return super().from_hf(config)
