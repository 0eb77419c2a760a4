"""What the large studies have in common: Llama 3.1 8B on UltraChat (Ding et al. 2023, arXiv:2305.14233). None has been run yet."""

from ml_collections import ConfigDict

from peftjax.core.config import defaults


def get_config() -> ConfigDict:
    """The config without a method."""
    config = defaults()
    config.model.path = "meta-llama/Llama-3.1-8B"
    config.model.dtype = "bfloat16"
    config.model.remat = "block"
    config.data.train = ("hf:HuggingFaceH4/ultrachat_200k/train_sft",)
    config.data.eval = ("hf:HuggingFaceH4/ultrachat_200k/test_sft",)
    config.data.format = "chat"
    config.data.max_length = 2048
    config.data.pack = True
    config.optim.schedule = "constant"
    config.train.steps = 2000
    config.train.batch_size = 32
    config.train.eval_batches = 50
    config.mesh.fsdp = -1
    return config
