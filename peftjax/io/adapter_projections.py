"""The random projections of a VeRA or RandLoRA whose file lacks them (save_projection=False)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from peftjax.adapters.method import Method
from peftjax.adapters.projected import Projected
from peftjax.core.errors import UserError
from peftjax.io.adapter_tensors import CONFIG
from peftjax.models.base import Model
from peftjax.nn.experts import ExpertLinear


def drawn_projections(method: Method, model: nnx.Module, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the projections that peft draws from the seed in the config, by key; empty if the file has them.

    Raises:
        UserError: Their sizes also depend on modules that this model lacks.
    """
    if config.get("save_projection") is not False or not isinstance(method, Projected):
        return {}
    chosen = method.chosen(model)
    if (isinstance(model, Model) and model.hf_part) or any(isinstance(site.module, ExpertLinear) for site, _ in chosen):
        raise UserError(
            f"{CONFIG}: save_projection=False: the file lacks its random projections, and their sizes depend on modules of "
            "other parts of this model. Save it again from peft with save_projection=True"
        )
    return method.peft_projections(chosen)
