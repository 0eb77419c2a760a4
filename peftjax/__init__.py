"""Parameter-efficient fine-tuning in JAX and Flax."""

from peftjax.io.hf_adapter import load_adapter, save_adapter
from peftjax.io.hf_model import load_model, save_model
from peftjax.methods import Full, Lora, attach, detach, merge, unmerge, use

__all__ = [
    "Full", "Lora", "attach", "detach", "load_adapter", "load_model", "merge", "save_adapter", "save_model", "unmerge",
    "use",
]  # fmt: skip
__version__ = "0.1.0"
