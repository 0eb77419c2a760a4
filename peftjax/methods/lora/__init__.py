"""LoRA and its variants: the method, its adapters, their initialization, and combining several into one."""

from peftjax.methods.lora.lora import Lora

__all__ = ["Lora"]
