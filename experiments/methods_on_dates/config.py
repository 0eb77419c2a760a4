"""The config of every method: the quickstart's dates on the bundled model, with fewer steps and smaller batches."""

from typing import Any

from ml_collections import ConfigDict

from peftjax.core.config import defaults

SEEDS = (0, 1, 2)
# The options of each method, and the learning rates that are tried first. The options are not tuned.
METHODS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "full": ({"name": "full"}, (1e-3, 3e-3, 1e-2)),
    "lora": ({"name": "lora", "rank": 4, "alpha": 8.0}, (1e-2, 3e-2, 1e-1)),
    "lora, DoRA": ({"name": "lora", "rank": 4, "alpha": 8.0, "dora": True}, (1e-2, 3e-2, 1e-1)),
    "lora, EVA": ({"name": "lora", "rank": 4, "alpha": 8.0, "init": "eva", "eva_batches": 8}, (1e-2, 3e-2, 1e-1)),
    "lora, PiSSA": ({"name": "lora", "rank": 4, "alpha": 8.0, "init": "pissa"}, (1e-2, 3e-2, 1e-1)),
    "adalora": (
        {
            "name": "adalora",
            "init_rank": 6,
            "target_rank": 4,
            "total_steps": 100,
            "warmup_steps": 20,
            "final_steps": 40,
        },
        (3e-2, 1e-1, 3e-1),
    ),
    "loha": ({"name": "loha", "rank": 4}, (1e-2, 3e-2, 1e-1)),
    "lokr": ({"name": "lokr", "rank": 4}, (1e-2, 3e-2, 1e-1)),
    "vera": ({"name": "vera", "rank": 64}, (3e-2, 1e-1, 3e-1)),
    "randlora": ({"name": "randlora", "rank": 16}, (1e-3, 3e-3, 1e-2)),
    "vblora": ({"name": "vblora", "rank": 4, "num_vectors": 64, "vector_length": 32}, (1e-2, 3e-2, 1e-1)),
    "fourierft": ({"name": "fourierft", "n_frequency": 500}, (3e-2, 1e-1, 3e-1)),
    "miss": ({"name": "miss", "rank": 4}, (1e-3, 3e-3, 1e-2)),
    "oft": ({"name": "oft", "block_size": 16}, (1e-2, 3e-2, 1e-1)),
    "boft": ({"name": "boft", "block_size": 4}, (1e-2, 3e-2, 1e-1)),
    "hra": ({"name": "hra", "rank": 4}, (3e-2, 1e-1, 3e-1)),
    "ia3": ({"name": "ia3", "feedforward": ("down_proj",)}, (3e-2, 1e-1, 3e-1)),
    "ln_tuning": ({"name": "ln_tuning"}, (3e-2, 1e-1, 3e-1)),
    "trainable_tokens": ({"name": "trainable_tokens", "token_indices": tuple(range(64))}, (3e-2, 1e-1, 3e-1)),
    "houlsby": ({"name": "houlsby", "reduction_factor": 8}, (1e-2, 3e-2, 1e-1)),
    "pfeiffer": ({"name": "pfeiffer", "reduction_factor": 8}, (1e-2, 3e-2, 1e-1)),
    "parallel": ({"name": "parallel", "reduction_factor": 8}, (3e-3, 1e-2, 3e-2)),
    "prompt": ({"name": "prompt", "tokens": 16}, (3e-2, 1e-1, 3e-1)),
    "p_tuning": ({"name": "p_tuning", "tokens": 16}, (1e-2, 3e-2, 1e-1)),
    "prefix": ({"name": "prefix", "tokens": 16}, (3e-2, 1e-1, 3e-1)),
}


def get_config() -> ConfigDict:
    config = defaults()
    config.model.path = "embedded"
    config.data.train = ("tfds:rewrite_dates/train",)
    config.data.eval = ("tfds:rewrite_dates/test",)  # days that never occur in training
    config.data.format = "completion"
    config.data.prompt_template = "{prompt} ->"
    config.data.completion_template = " {completion}"
    config.data.max_length = 64
    config.data.pack = True
    config.optim.schedule = "cosine"
    config.optim.warmup_fraction = 0.1
    config.train.steps = 100
    config.train.batch_size = 8
    config.train.loss_chunk = 64
    config.train.eval_every = 0  # before the first and after the last step
    config.train.eval_batches = 16
    config.train.log_every = 50
    config.checkpoint.every = 100
    config.checkpoint.keep_best = False
    return config
