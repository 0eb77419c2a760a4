"""PEFT methods, one per file, and the registry of their names.

A file holds a method's equation, its options and its adapter. A package holds a method of several files. What methods
share is in `peftjax.adapters`.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from peftjax.adapters.method import Method, no_such_option
from peftjax.core.errors import UserError
from peftjax.core.paths import suggest
from peftjax.methods.adalora import AdaLora
from peftjax.methods.bitfit import BitFit
from peftjax.methods.boft import Boft
from peftjax.methods.bottleneck import Houlsby, ParallelAdapter, Pfeiffer
from peftjax.methods.fourierft import FourierFT
from peftjax.methods.full import Full
from peftjax.methods.hra import Hra
from peftjax.methods.ia3 import Ia3
from peftjax.methods.ln_tuning import LnTuning
from peftjax.methods.loha import LoHa
from peftjax.methods.lokr import LoKr
from peftjax.methods.lora.lora import Lora
from peftjax.methods.miss import Miss
from peftjax.methods.oft import Oft
from peftjax.methods.p_tuning import PTuning
from peftjax.methods.prefix import PrefixTuning
from peftjax.methods.prompt import PromptTuning
from peftjax.methods.randlora import RandLora
from peftjax.methods.trainable_tokens import TrainableTokens
from peftjax.methods.vblora import VbLora
from peftjax.methods.vera import Vera

METHODS: dict[str, type[Method]] = {
    cls.method: cls
    for cls in (
        AdaLora,
        BitFit,
        Boft,
        FourierFT,
        Full,
        Houlsby,
        Hra,
        Ia3,
        LnTuning,
        LoHa,
        LoKr,
        Lora,
        Miss,
        Oft,
        PTuning,
        ParallelAdapter,
        Pfeiffer,
        PrefixTuning,
        PromptTuning,
        RandLora,
        TrainableTokens,
        VbLora,
        Vera,
    )
}

__all__ = [
    "METHODS",
    "AdaLora",
    "BitFit",
    "Boft",
    "FourierFT",
    "Full",
    "Houlsby",
    "Hra",
    "Ia3",
    "LnTuning",
    "LoHa",
    "LoKr",
    "Lora",
    "Method",
    "Miss",
    "Oft",
    "PTuning",
    "ParallelAdapter",
    "Pfeiffer",
    "PrefixTuning",
    "PromptTuning",
    "RandLora",
    "TrainableTokens",
    "VbLora",
    "Vera",
    "from_config",
    "make_config",
    "method_defaults",
]


def method_class(name: str) -> type[Method]:
    """The method called `name`; a `UserError` with suggestions if there is none."""
    if name not in METHODS:
        raise UserError(
            f"method.name: {name!r} is not a method.{suggest(name, METHODS)} Methods: {', '.join(sorted(METHODS))}"
        )
    return METHODS[name]


def method_defaults(name: str) -> dict[str, Any]:
    """The fields of a config's `method` section for a method, with their defaults."""
    cls = method_class(name)
    return {"name": name, "start_from": ""} | {field.name: field.default for field in dataclasses.fields(cls)}


def make_config(name: str, **fields: Any) -> ConfigDict:
    """The `method` section of a config: the given fields of a method and the defaults of the others."""
    defaults = method_defaults(name)
    for field in fields:
        if field not in defaults:
            raise UserError(no_such_option(method_class(name), field))
    return ConfigDict(defaults | fields)


def from_config(section: Any) -> Method:
    """The method that a config's `method` section describes."""
    fields = dict(section.items())
    fields.pop("start_from", None)  # belongs to the run, not to the method
    return method_class(fields.pop("name"))(**fields)
