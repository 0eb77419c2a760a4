"""Multimodal directories: the text model computes what transformers computes for text, and the rest is kept."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

import peftjax
from peftjax import methods
from peftjax.core.errors import UserError
from peftjax.models.multimodal import WHOLES
from tests import tiny
from tests.interop.peers import THEIRS, adapted, attached, load_into_theirs, load_theirs, logits, shake

pytestmark = [pytest.mark.filterwarnings(warning) for warning in THEIRS]
VOCAB = 44  # the tokens after these stand for images

TEXT = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
QWEN: dict[str, Any] = {
    "text_config": TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
    "vision_config": {
        "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32, "embed_dim": 16,
        "patch_size": 4,
    },
    "image_token_id": 47, "video_token_id": 46, "vision_start_token_id": 45, "vision_end_token_id": 44,
}  # fmt: skip
CLIP = VISION | {"model_type": "clip_vision_model"}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": TEXT | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
        "vision_config": VISION | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4, "image_token_index": 47, "boi_token_index": 46, "eoi_token_index": 45,
    },
    "internvl": {
        "text_config": TEXT | {"model_type": "qwen2"},
        "vision_config": VISION | {"model_type": "internvl_vision"},
        "image_token_id": 47,
    },
    "llama4": {
        "text_config": TEXT | {
            "num_hidden_layers": 4, "head_dim": 8, "num_local_experts": 4, "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 24, "attention_chunk_size": 5, "no_rope_layer_interval": 2, "floor_scale": 4,
        },
        "vision_config": VISION | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
        "image_token_index": 47, "boi_token_index": 46, "eoi_token_index": 45,
    },
    "llava": {"text_config": TEXT | {"model_type": "llama"}, "vision_config": CLIP, "image_token_index": 47},
    "llava_next": {"text_config": TEXT | {"model_type": "mistral"}, "vision_config": CLIP, "image_token_index": 47},
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral", "head_dim": 8, "sliding_window": None},
        "vision_config": VISION | {"model_type": "pixtral"},
        "image_token_index": 47, "tie_word_embeddings": False,
    },
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
}  # fmt: skip
PARTS = dict.fromkeys(CONFIGS, r"multi_modal_projector \(\d+ tensors\), vision_tower") | {
    "llama4": r"multi_modal_projector \(1 tensor\), vision_model",
    "llava_next": r"image_newline \(1 tensor\), multi_modal_projector", "qwen2_vl": "visual", "qwen2_5_vl": "visual",
}  # fmt: skip


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random multimodal model."""
    directory = tmp_path_factory.mktemp("bases") / request.param
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[request.param](**CONFIGS[request.param])
    model = transformers.AutoModelForImageTextToText.from_config(config)
    shake(dict(model.named_parameters()), 0.1)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def llama4_without_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 4 in transformers 5.24 reads an attribute that the output of its text model lacks."""
    output = transformers.modeling_outputs.MoeCausalLMOutputWithPast
    monkeypatch.setattr(output, "image_outputs", None, raising=False)


def load(directory: Path) -> Any:
    with pytest.warns(UserWarning, match=f"loading the text model only, without {PARTS[directory.name]}") as warned:
        model = peftjax.load_model(directory)
    assert len(warned) == 1
    return model


def test_there_is_a_case_for_every_model_type() -> None:
    assert CONFIGS.keys() == WHOLES.keys()


def test_the_text_model_equals_theirs_is_saved_into_the_whole_and_adapted_as_in_peft(
    base: Path, tmp_path: Path
) -> None:
    model = load(base)
    np.testing.assert_allclose(logits(model, VOCAB), logits(load_theirs(base), VOCAB), atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match=rf"the text model of a {base.name} model; pass source=DIR"):
        peftjax.save_model(model, tmp_path / "saved")
    tiny.randomize(model, nnx.Param, scale=0.3)
    peftjax.save_model(model, tmp_path / base.name, source=base, max_shard_bytes=20_000)
    before = load_file(base / "model.safetensors")
    after = {
        key: value
        for file in sorted((tmp_path / base.name).glob("*.safetensors"))
        for key, value in load_file(file).items()
    }
    assert after.keys() == before.keys()
    text = [key for key in before if "language_model" in key or key.startswith(("model.", "lm_head."))]
    for key, value in before.items():
        assert np.array_equal(after[key], value) == (key not in text), key
    theirs = logits(load_theirs(tmp_path / base.name), VOCAB)
    np.testing.assert_allclose(logits(model, VOCAB), theirs, atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(logits(load(tmp_path / base.name), VOCAB), logits(model, VOCAB))

    with pytest.warns(UserWarning, match="text model only"):
        model = attached(base, methods.Lora(rank=4, targets=("q_proj", "down_proj")))
    peftjax.save_adapter(model, tmp_path / "ours")
    theirs = logits(load_into_theirs(base, tmp_path / "ours"), VOCAB)
    np.testing.assert_allclose(logits(model, VOCAB), theirs, atol=1e-4, rtol=1e-4)
    language = r".*language_model.*\.(q_proj|down_proj)"
    peer = adapted(base, peft.LoraConfig(r=4, target_modules=language))
    peer.save_pretrained(tmp_path / "theirs")
    ours = peftjax.load_adapter(load(base), tmp_path / "theirs")
    np.testing.assert_allclose(logits(ours, VOCAB), logits(peer, VOCAB), atol=1e-4, rtol=1e-4)
    peer = adapted(
        base,
        peft.LoraConfig(r=4, target_modules=f"({language}|.*(vision_tower|vision_model|visual).*(q_proj|proj|fc1))"),
    )
    peer.save_pretrained(tmp_path / "all")
    model = load(base)
    part = "visual" if "qwen" in base.name else "vision_model" if base.name == "llama4" else "vision_tower"
    left_out = rf"adapters of the text model only, not of {part} \(\d+ tensors\)"
    with pytest.warns(UserWarning, match=left_out) as warned:
        peftjax.load_adapter(model, tmp_path / "all")
    assert len(warned) == 1
    np.testing.assert_allclose(logits(model, VOCAB), logits(peer, VOCAB), atol=1e-4, rtol=1e-4)


def test_the_other_names_that_transformers_reads_and_a_flat_config_mean_the_same(base: Path, tmp_path: Path) -> None:
    expected = logits(load(base), VOCAB)
    directory = tmp_path / base.name
    shutil.copytree(base, directory)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(base)
    held = {key: value.numpy() for key, value in theirs.state_dict().items()}
    text = "model.language_model."
    for change in (
        lambda key: key,  # of transformers 5
        lambda key: key.replace(text, f"{text}model."),  # of some of its versions
        lambda key: key.removeprefix("model."),  # of the class without a head
    ):
        save_file({change(key): value for key, value in held.items()}, directory / "model.safetensors")
        np.testing.assert_array_equal(logits(load(directory), VOCAB), expected)
    if base.name in ("qwen2_vl", "qwen2_5_vl"):
        config = json.loads((base / "config.json").read_text())
        flat = {key: value for key, value in config.items() if key != "text_config"} | CONFIGS[base.name]["text_config"]
        (directory / "config.json").write_text(json.dumps(flat))
        np.testing.assert_array_equal(logits(load(directory), VOCAB), expected)
