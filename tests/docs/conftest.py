"""A directory with everything that the documentation's code reads: models, adapters, an image."""

import json
import shutil
from pathlib import Path

import pytest
from flax import nnx
from PIL import Image

import peftjax
from peftjax.models import from_hf_config
from tests import tiny

PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True, "size": {"height": 8, "width": 8}, "resample": 2,
    "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip

QWEN3_MOE = tiny.CONFIG | {
    "model_type": "qwen3_moe", "head_dim": 8, "num_hidden_layers": 2,
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
}  # fmt: skip


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    tiny.directory(root / "model")
    for folder, base, seed in (("adapter", root / "model", 1), ("other", root / "model", 2), ("demo", "embedded", 3)):
        model = peftjax.attach(peftjax.load_model(base), peftjax.Lora(rank=4), rngs=nnx.Rngs(seed))
        peftjax.save_adapter(tiny.randomize(model, seed=seed), root / folder)
    peftjax.save_model(peftjax.load_model(root / "model", quantize="nf4"), root / "quantized", source=root / "model")
    peftjax.save_model(tiny.make(from_hf_config(tiny.VIT)), root / "vit")
    peftjax.save_model(tiny.make(from_hf_config(QWEN3_MOE)), root / "qwen3_moe")
    (root / "vit" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    Image.new("RGB", (10, 12), "red").save(root / "cat.jpg")
    return root


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary working directory, in which the code may write."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)
