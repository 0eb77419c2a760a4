"""LoRA and its variants: the method, its adapters, where they start, and combining several into one."""

from peftjax.methods.lora.lora import Lora

__all__ = ["Lora"]
