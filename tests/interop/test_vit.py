"""ViT beside transformers, and its adapters beside peft, in float32."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import peftjax
from peftjax.adapters import count_trainable
from peftjax.core import variables
from tests.interop.peers import THEIRS, assert_close, assert_far, attached, load_into_theirs, load_theirs, shake

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings(*THEIRS)]

SIZES: dict[str, Any] = {
    "image_size": [8, 12],
    "patch_size": [4, 2],  # no two sides alike, so that none can stand for another
    "num_channels": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
    "num_labels": 3,
}
CLASSIFIER = "ViTForImageClassification"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A random model of a class of transformers, as it saves it; made once."""
    folder = tmp_path_factory.mktemp("vit")

    def make(name: str, **fields: Any) -> Path:
        if not (folder / name).exists():
            torch.manual_seed(0)
            model = getattr(transformers, name)(transformers.ViTConfig(**SIZES | fields))
            shake(dict(model.named_parameters()), 0.1)  # the biases and the norms' scales too
            model.save_pretrained(folder / name)
        return folder / name

    return make


def pixels() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(2, 8, 12, 3)).astype(np.float32)


def ours(model: Any) -> np.ndarray:
    return np.asarray(model(jnp.asarray(pixels())))


def theirs(model: Any, **options: Any) -> Any:
    with torch.no_grad():
        return model(pixel_values=torch.tensor(pixels()).permute(0, 3, 1, 2), **options)


@pytest.mark.parametrize(
    ("name", "fields"), [(CLASSIFIER, {}), ("ViTModel", {"qkv_bias": False, "pooler_output_size": 5})]
)
def test_every_state_is_that_of_transformers_and_the_saved_model_is_read_back(
    name: str, fields: dict, base: Callable, tmp_path: Path
) -> None:
    path = base(name, **fields)
    model, peer = peftjax.load_model(path), load_theirs(path)
    outputs = theirs(peer, output_hidden_states=True)
    first, second, *_ = outputs.hidden_states
    x = model.embedded(jnp.asarray(pixels()))
    np.testing.assert_allclose(x, first, atol=1e-5, err_msg="embeddings")
    graph, leaves = variables.flat(model.blocks)
    block = variables.join(graph, {path: leaf.get_value()[0] for path, leaf in leaves.items()})
    np.testing.assert_allclose(block(x), second, atol=1e-5, err_msg="first block")
    if name == CLASSIFIER:
        assert outputs.logits.abs().max() > 0.5  # else a small difference says little
        np.testing.assert_allclose(ours(model), outputs.logits, atol=1e-5)
    else:
        np.testing.assert_allclose(ours(model), outputs.last_hidden_state, atol=1e-5)
        np.testing.assert_allclose(model.pooled(ours(model)[:, 0]), outputs.pooler_output, atol=1e-5)

    peftjax.save_model(model, tmp_path / "saved")
    _, info = type(peer).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info  # missing, unexpected, mismatched, errors
    saved, stored = (load_file(folder / "model.safetensors") for folder in (tmp_path / "saved", path))
    assert saved.keys() == stored.keys()
    for key, tensor in stored.items():
        np.testing.assert_array_equal(saved[key], tensor, err_msg=key)
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written == json.loads((path / "config.json").read_text()) | {"saved_by": "peftjax"}


def test_a_base_gets_a_new_head_and_a_classifier_is_a_base(base: Callable, tmp_path: Path) -> None:
    model = peftjax.load_model(
        base("ViTForMaskedImageModeling", encoder_stride=2), head="image_classification", labels=5
    )
    hidden = theirs(load_theirs(base("ViTForMaskedImageModeling")).vit).last_hidden_state
    np.testing.assert_allclose(model.hidden(jnp.asarray(pixels())), hidden, atol=1e-5)
    peftjax.save_model(model, tmp_path / "saved")
    np.testing.assert_allclose(theirs(load_theirs(tmp_path / "saved")).logits, ours(model), atol=1e-5)
    states = theirs(load_theirs(base(CLASSIFIER)).vit).last_hidden_state
    np.testing.assert_allclose(ours(peftjax.load_model(base(CLASSIFIER), head="none")), states, atol=1e-5)


IA3 = {"targets": ("k_proj", "v_proj", "fc2"), "feedforward": ("fc2",)}


@pytest.mark.parametrize(
    ("mine", "config"),
    [
        (peftjax.Lora(rank=4, alpha=8, targets="all-linear"), peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"])),
        (peftjax.Ia3(**IA3), peft.IA3Config(target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"])),
    ],
)  # fmt: skip
def test_adapters_go_both_ways_with_the_classifier_in_modules_to_save(
    mine: Any, config: Any, base: Callable, tmp_path: Path
) -> None:
    path = base(CLASSIFIER)
    before = ours(peftjax.load_model(path))
    config.modules_to_save = ["classifier"]  # as peft's own examples of image classification say it, without a task
    peer = peft.get_peft_model(load_theirs(path), config).eval()
    shake({name: p for name, p in peer.named_parameters() if p.requires_grad}, 0.1)
    peer.save_pretrained(tmp_path / "theirs")
    model = peftjax.load_adapter(peftjax.load_model(path), tmp_path / "theirs")
    assert_close(ours(model), theirs(peer).logits.numpy())
    assert_far(ours(model), before)
    assert count_trainable(model) == sum(p.numel() for p in peer.parameters() if p.requires_grad)

    model = attached(path, mine)
    peftjax.save_adapter(model, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (written["task_type"], written["modules_to_save"]) == (None, ["classifier"])
    assert_close(theirs(load_into_theirs(path, tmp_path / "ours").eval()).logits.numpy(), ours(model))
    assert_far(ours(model), before)


def test_an_adapter_without_a_classifier_leaves_it_as_it_is(base: Callable, tmp_path: Path) -> None:
    peer = peft.get_peft_model(load_theirs(base(CLASSIFIER)), peft.LoraConfig(r=4, target_modules=["q_proj"])).eval()
    shake({name: p for name, p in peer.named_parameters() if p.requires_grad}, 0.1)
    peer.save_pretrained(tmp_path / "theirs")
    model = peftjax.load_adapter(peftjax.load_model(base(CLASSIFIER)), tmp_path / "theirs")
    assert_close(ours(model), theirs(peer).logits.numpy())
    peftjax.save_adapter(model, tmp_path / "ours")  # and none is written
    assert_close(theirs(load_into_theirs(base(CLASSIFIER), tmp_path / "ours").eval()).logits.numpy(), ours(model))


# --- Names of transformers 4, and the patch embedding ---

OLDER = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "layernorm_before": "layernorm_before",
}


def to_older_names(folder: Path, **config: Any) -> None:
    """Rename the modules of an adapter that peft wrote as transformers 4 called them; `config` replaces its fields."""

    def older(key: str) -> str:
        for new, old in OLDER.items():
            key = re.sub(rf"vit\.layers\.(\d+)\.{re.escape(new)}\.", rf"vit.encoder.layer.\1.{old}.", key)
        return key

    tensors = {older(key): value for key, value in load_file(folder / "adapter_model.safetensors").items()}
    assert sum(".encoder.layer." in key for key in tensors) >= 2
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(written | config))


OLDER_FILES: dict[str, tuple[Any, dict[str, Any]]] = {
    "names": (
        peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]),
        {"target_modules": ["query", "value"]},
    ),
    "patterns": (
        peft.LoraConfig(
            r=4, target_modules=["attention.o_proj", "fc1", "fc2"], rank_pattern={"layers.1.mlp.fc1": 2},
            alpha_pattern={"fc2": 3}, layers_to_transform=[1], modules_to_save=["layers.0.layernorm_before"],
        ),
        {
            "target_modules": ["dense"], "rank_pattern": {"layer.1.intermediate.dense": 2},
            "alpha_pattern": {"1.output.dense": 3}, "modules_to_save": ["layer.0.layernorm_before"],
        },
    ),
    "regex": (
        peft.LoraConfig(r=4, target_modules=["q_proj"], exclude_modules=["layers.0.attention.q_proj"]),
        {"target_modules": r".*\.attention\.query", "exclude_modules": r".*\.0\..*"},
    ),
    "ia3": (
        peft.IA3Config(target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"]),
        {
            "target_modules": ["key", "value", "0.output.dense", "1.output.dense"],
            "feedforward_modules": ["0.output.dense", "1.output.dense"],
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OLDER_FILES)
def test_an_adapter_with_the_module_names_of_transformers_4_is_read(name: str, base: Callable, tmp_path: Path) -> None:
    config, fields = OLDER_FILES[name]
    peer = peft.get_peft_model(load_theirs(base(CLASSIFIER)), config).eval()
    shake({name: p for name, p in peer.named_parameters() if p.requires_grad}, 0.1)
    peer.save_pretrained(tmp_path / "theirs")
    to_older_names(tmp_path / "theirs", **fields)
    model = peftjax.load_adapter(peftjax.load_model(base(CLASSIFIER)), tmp_path / "theirs")
    assert_close(ours(model), theirs(peer).logits.numpy())
    assert_far(ours(model), theirs(load_theirs(base(CLASSIFIER))).logits.numpy())
    peftjax.save_adapter(model, tmp_path / "ours")  # by the names of today
    assert_close(theirs(load_into_theirs(base(CLASSIFIER), tmp_path / "ours").eval()).logits.numpy(), ours(model))


@pytest.mark.parametrize("dora", [False, True])
def test_a_lora_of_the_patch_embedding_goes_both_ways_and_merges(dora: bool, base: Callable, tmp_path: Path) -> None:
    path, targets = base(CLASSIFIER), ["projection", "q_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_dora=dora, bias="lora_only")
    peer = peft.get_peft_model(load_theirs(path), config).eval()
    shake({name: p for name, p in peer.named_parameters() if p.requires_grad}, 0.1)
    peer.save_pretrained(tmp_path / "theirs")
    model = peftjax.load_adapter(peftjax.load_model(path), tmp_path / "theirs")
    assert_close(ours(model), theirs(peer).logits.numpy())
    assert count_trainable(model) == sum(p.numel() for p in peer.parameters() if p.requires_grad)

    model = attached(path, peftjax.Lora(rank=4, alpha=8, targets=("projection",), dora=dora, dropout=0.1))
    expected = ours(model)
    assert_far(expected, ours(peftjax.load_model(path)))
    peftjax.save_adapter(model, tmp_path / "ours")
    assert_close(theirs(load_into_theirs(path, tmp_path / "ours").eval()).logits.numpy(), expected)
    np.testing.assert_allclose(ours(peftjax.merge(model)), expected, atol=1e-5)
