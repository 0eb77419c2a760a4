"""PEFT methods, one per file, and the registry of their names.

A file holds a method's equation, its options and its adapter. A package holds a method of several files. What methods
share is in `peftjax.adapters`.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from peftjax.adapters.method import Method as Method
from peftjax.adapters.method import no_such_option
from peftjax.core.errors import UserError
from peftjax.core.paths import suggest
from peftjax.methods.adalora import AdaLora as AdaLora
from peftjax.methods.bitfit import BitFit as BitFit
from peftjax.methods.boft import Boft as Boft
from peftjax.methods.bottleneck import Houlsby as Houlsby
from peftjax.methods.bottleneck import ParallelAdapter as ParallelAdapter
from peftjax.methods.bottleneck import Pfeiffer as Pfeiffer
from peftjax.methods.fourierft import FourierFT as FourierFT
from peftjax.methods.full import Full as Full
from peftjax.methods.hra import Hra as Hra
from peftjax.methods.ia3 import Ia3 as Ia3
from peftjax.methods.ln_tuning import LnTuning as LnTuning
from peftjax.methods.loha import LoHa as LoHa
from peftjax.methods.lokr import LoKr as LoKr
from peftjax.methods.lora.lora import Lora as Lora
from peftjax.methods.miss import Miss as Miss
from peftjax.methods.oft import Oft as Oft
from peftjax.methods.p_tuning import PTuning as PTuning
from peftjax.methods.prefix import PrefixTuning as PrefixTuning
from peftjax.methods.prompt import PromptTuning as PromptTuning
from peftjax.methods.randlora import RandLora as RandLora
from peftjax.methods.trainable_tokens import TrainableTokens as TrainableTokens
from peftjax.methods.vblora import VbLora as VbLora
from peftjax.methods.vera import Vera as Vera

METHODS: dict[str, type[Method]] = {
    cls.method: cls
    for cls in (
        AdaLora, BitFit, Boft, FourierFT, Full, Houlsby, Hra, Ia3, LnTuning, LoHa, LoKr, Lora, Miss, Oft, PTuning,
        ParallelAdapter, Pfeiffer, PrefixTuning, PromptTuning, RandLora, TrainableTokens, VbLora, Vera,
    )
}  # fmt: skip


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
