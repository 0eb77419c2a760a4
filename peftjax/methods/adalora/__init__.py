"""AdaLoRA: the method with its adapter, and the budget that prunes ranks during training."""

from peftjax.methods.adalora.adalora import AdaLora

__all__ = ["AdaLora"]
