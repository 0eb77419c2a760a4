"""LoRA on a ViT that classifies flowers, from one folder of images per class.

    peftjax train --config=configs/vit_folder_lora.py --workdir=runs/flowers

The images are data/flowers/train/CLASS/NAME.jpg and data/flowers/eval/CLASS/NAME.jpg. They are also in TFDS:
--config.data.train=tfds:tf_flowers/train[:90%] --config.data.eval=tfds:tf_flowers/train[90%:]
"""

from ml_collections import ConfigDict

from peftjax.core.config import defaults
from peftjax.methods import make_config


def get_config() -> ConfigDict:
    config = defaults()
    config.model.path = "google/vit-base-patch16-224-in21k"
    config.task.kind = "image_classification"
    # the names of the folders, in TFDS's order
    config.task.labels = ("dandelion", "daisy", "tulips", "sunflowers", "roses")
    config.method = make_config("lora", rank=16, alpha=16.0, targets=("q_proj", "v_proj"), dropout=0.1)
    config.data.train = ("images:data/flowers/train",)
    config.data.eval = ("images:data/flowers/eval",)
    config.data.workers = 4  # threads that open and resize images
    config.optim.learning_rate = 2e-3
    config.optim.warmup_fraction = 0.05
    config.train.steps = 400
    config.train.batch_size = 32
    config.train.eval_every = 100
    return config
