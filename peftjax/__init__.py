"""Parameter-efficient fine-tuning in JAX and Flax."""

from peftjax.core import huge_pages as _huge_pages  # noqa: F401  # first: it may restart the process

# isort: split
from peftjax.core import signals as _signals  # noqa: F401  # now: it handles signals while a command imports the rest

# isort: split
import sys as _sys
from types import ModuleType as _ModuleType
from typing import TYPE_CHECKING as _TYPE_CHECKING

from peftjax import losses
from peftjax.adapters import Method, attach, detach, merge, rows, unmerge, use, wrap_optimizer
from peftjax.core.errors import NotFiniteError, UserError
from peftjax.core.paths import suggest as _suggest
from peftjax.core.variables import PeftParam, trainable_mask
from peftjax.data.tokenizer import load_tokenizer
from peftjax.generation import generate
from peftjax.io.adapter_load import load_adapter
from peftjax.io.adapter_save import save_adapter
from peftjax.io.load import load_kernels, load_model
from peftjax.io.push import push_adapter
from peftjax.io.save import save_model
from peftjax.methods import (
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
    ParallelAdapter,
    Pfeiffer,
    PrefixTuning,
    PromptTuning,
    PTuning,
    RandLora,
    TrainableTokens,
    VbLora,
    Vera,
)
from peftjax.methods.lora.combine import combine
from peftjax.nn.adopt import adopt
from peftjax.sampling import Sampling
from peftjax.trainer import train
from peftjax.training import config as _config  # noqa: F401  # declares the fields for `peftjax.core.config.defaults`

__all__ = [
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
    "NotFiniteError",
    "Oft",
    "PTuning",
    "ParallelAdapter",
    "PeftParam",
    "Pfeiffer",
    "PrefixTuning",
    "PromptTuning",
    "RandLora",
    "Sampling",
    "TrainableTokens",
    "UserError",
    "VbLora",
    "Vera",
    "adopt",
    "attach",
    "combine",
    "detach",
    "generate",
    "load_adapter",
    "load_kernels",
    "load_model",
    "load_tokenizer",
    "losses",
    "merge",
    "push_adapter",
    "rows",
    "save_adapter",
    "save_model",
    "train",
    "trainable_mask",
    "unmerge",
    "use",
    "wrap_optimizer",
]
__version__ = "0.1.0"


class _Package(_ModuleType):
    """A package whose public functions are not replaced when the command of the same name is imported.

    Importing the module `peftjax.generate` sets the attribute `generate` of the package to that module, which would replace
    the function `peftjax.generate`. The module itself remains importable: `from peftjax.generate import main`.
    """

    def __setattr__(self, name: str, value: object) -> None:
        present = self.__dict__.get(name)
        if not isinstance(value, _ModuleType) or present is None or isinstance(present, _ModuleType):
            super().__setattr__(name, value)


_sys.modules[__name__].__class__ = _Package
if not _TYPE_CHECKING:  # a type checker would take it to define every name

    def __getattr__(name: str) -> object:
        raise AttributeError(f"module 'peftjax' has no attribute {name!r}.{_suggest(name, __all__)}")
