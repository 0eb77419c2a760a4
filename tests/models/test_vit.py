"""ViT without torch: what its config.json and checkpoints may hold, new heads, and training with every kind of method.

Equality with transformers and peft is in tests/interop/test_vit.py.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

import peftjax
from peftjax import sharding
from peftjax.adapters import count_trainable
from peftjax.core import variables
from peftjax.io.random_model import make_quantized
from peftjax.models import from_hf_config
from peftjax.quant.int8 import Int8
from peftjax.totals import Totals
from peftjax.training.step import Objective, init_state, make_train_step
from tests import tiny

CONFIG: dict[str, Any] = tiny.VIT | {
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
CLASSIFIER = {"architectures": ["ViTForImageClassification"], "id2label": {"0": "cat", "1": "dog"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the directories of a model without a head, "base", and of one that classifies images, "classifier"."""
    path = tmp_path_factory.mktemp("vit")
    for name, fields in {"base": {}, "classifier": CLASSIFIER}.items():
        peftjax.save_model(tiny.make(from_hf_config(CONFIG | fields)), path / name)
    return path


def pixels(rows: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(rows, 8, 8, 3)), jnp.float32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["ViTForImageClasification"]}, "Did you mean 'ViTForImageClassification'"),
        ({"pooler_act": "gelu"}, "pooler_act='gelu' is not supported for model_type 'vit', only 'tanh'"),
        ({"patch_size": 0}, "patch_size=0 is neither a number above 0 nor"),
        ({"image_size": [8, 9]}, r"image_size=\[8, 9\] is not a multiple of patch_size=\[4, 4\]"),
        ({"image_size": [8, 8, 3]}, r"image_size=\[8, 8, 3\] is neither a number above 0 nor \[height, width\]"),
        ({"hidden_size": 15}, "hidden_size=15 is not a multiple of num_attention_heads=2"),
        ({"hidden_act": "mish"}, "unknown hidden_act 'mish'"),
        ({"head_dim": 4}, "head_dim=4: transformers reads this for model_type 'vit'"),
        ({"intermediate_size": None}, "'intermediate_size' is missing"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused_by_name(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf_config(CONFIG | fields)


def test_a_head_is_that_of_the_checkpoint_or_the_one_asked_for(folder: Path) -> None:
    assert peftjax.load_model(folder / "classifier").config.labels == ("cat", "dog")
    fresh = peftjax.load_model(folder / "base", head="image_classification", labels=5)
    assert fresh(pixels()).shape == (2, 5)
    base = peftjax.load_model(folder / "base")
    states = base(pixels())
    assert states.shape == (2, 1 + 4, 16)
    np.testing.assert_array_equal(fresh.hidden(pixels()), base.hidden(pixels()))
    np.testing.assert_allclose(states, base.hidden(pixels()), atol=1e-6)  # one program, which may round differently
    for asked, message in (
        ({"head": "sequence_classification", "labels": 2}, "is not one of none, image_classification"),
        ({"head": "image_classification"}, "give the number of labels of the new head"),
        ({"labels": 2}, "labels=2 needs head='image_classification'"),
    ):
        with pytest.raises(ValueError, match=message):
            peftjax.load_model(folder / "base", **asked)


def test_images_of_another_size_or_with_channels_first_are_refused(folder: Path) -> None:
    model = peftjax.load_model(folder / "base")
    for shape in ((2, 16, 16, 3), (2, 3, 8, 8), (8, 8, 3)):
        with pytest.raises(ValueError, match=r"this model needs \[B, 8, 8, 3\], height, width and channels last"):
            model(jnp.zeros(shape))


def test_the_convolution_of_the_patches_is_no_linear_layer(folder: Path, tmp_path: Path) -> None:
    quantized = nnx.eval_shape(lambda: make_quantized(from_hf_config(CONFIG), "int8", (), seed=0))
    assert isinstance(quantized.blocks.feedforward.up.kernel.get_value(), Int8)
    assert quantized.embeddings.patches.kernel.shape == (4, 4, 3, 16)
    model = peftjax.load_model(folder / "classifier")
    with pytest.raises(ValueError, match=r"'projection' matches no layer of this model. Its layers: classifier, fc1"):
        peftjax.attach(model, peftjax.LoHa(targets=("projection",)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="needs one token embedding with a slot, and this model has 0"):
        peftjax.attach(model, peftjax.PromptTuning(tokens=2), rngs=nnx.Rngs(0))
    chosen = peftjax.Lora(targets="all-linear").chosen(model)
    assert "embeddings.patches" not in [site.path for site, _ in chosen]
    saved = peftjax.Lora(rank=2, modules_to_save=("projection",))
    peftjax.save_adapter(peftjax.attach(model, saved, rngs=nnx.Rngs(0)), tmp_path / "adapter")
    kernel = load_file(tmp_path / "adapter" / "adapter_model.safetensors")[
        "base_model.model.vit.embeddings.patch_embeddings.projection.weight"
    ]
    stored = load_file(folder / "classifier" / "model.safetensors")
    np.testing.assert_array_equal(kernel, stored["vit.embeddings.patch_embeddings.projection.weight"])


def test_adapters_and_their_heads_come_back_from_their_files(folder: Path, tmp_path: Path) -> None:
    methods = {"one": peftjax.BitFit(), "two": peftjax.LnTuning(), "three": peftjax.Houlsby()}
    model = peftjax.load_model(folder / "classifier")
    before = model(pixels())
    for name, method in methods.items():
        peftjax.attach(model, method, name, rngs=nnx.Rngs(1))
    after = tiny.randomize(peftjax.use(model, tuple(methods)))(pixels())
    assert np.abs(after - before).max() > 0.1
    for name in methods:
        peftjax.save_adapter(model, tmp_path / name, name)
        peftjax.detach(model, name)
    np.testing.assert_array_equal(model(pixels()), before)
    for name in methods:
        peftjax.load_adapter(model, tmp_path / name, name)
    np.testing.assert_array_equal(peftjax.use(model, tuple(methods))(pixels()), after)


def classification_loss(model: Any, batch: Any) -> Totals:
    logits = model(batch["pixels"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return Totals(losses.sum(), jnp.float32(len(losses)), (logits.argmax(-1) == batch["labels"]).sum().astype(float))


@pytest.mark.slow
def test_training_lowers_the_loss_and_moves_the_adapter_and_the_head_alone(folder: Path) -> None:
    method = peftjax.Lora(rank=2, dropout=0.1, targets=r".*(_proj|fc[12]|projection)")
    model = peftjax.attach(peftjax.load_model(folder / "classifier"), method, rngs=nnx.Rngs(1))
    assert count_trainable(model) == 2 * (2 * (4 * 32 + 2 * 40) + 48 + 16) + 16 * 2 + 2  # LoRA of rank 2, and the head
    batch = {"pixels": np.array(pixels(8)), "labels": np.arange(8) % 2}
    before, base = classification_loss(model, batch).loss, tiny.bits(model)
    mesh = sharding.make_mesh()
    sharding.place(model, mesh)
    model.train()
    graph, leaves = variables.flat(model)
    _, trainable, frozen = variables.split_by_kind(model)
    keys = tuple(path for path, leaf in leaves.items() if isinstance(leaf, variables.DropoutKey))
    state = init_state(trainable, optax.adam(2e-2), seed=0)
    step = make_train_step(Objective(graph, classification_loss, dropout_keys=keys), optax.adam(2e-2), state)
    for _ in range(25):
        state, _ = step(state, frozen, sharding.shard_batch(batch, mesh))
    variables.update(model, state.trainable)
    model.eval()
    assert tiny.bits(model) == base
    assert classification_loss(model, batch).loss < 0.5 * before
