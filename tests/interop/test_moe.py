"""Mixture-of-experts families compared with transformers and peft: logits in float32, files, generation, adapters."""

import json
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
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import peftjax
from peftjax.io.load import load_model
from peftjax.io.save import save_model
from peftjax.nn import moe
from tests.interop import peers
from tests.interop.test_decoders import COMMON, WINDOW, check_like_transformers, their_logits, their_model, tokens
from tests.interop.test_llama import our_logits, spell

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings(*peers.THEIRS, "ignore:The following .*_pattern keys did not match:RuntimeWarning"),
]

MIXTRAL = COMMON | {"num_local_experts": 4}
GPT_OSS = MIXTRAL | {"intermediate_size": 64}  # whole blocks of MXFP4
QWEN = COMMON | {"num_experts": 6, "moe_intermediate_size": 12, "num_experts_per_tok": 3}

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LLAMA4 = MIXTRAL | {
    "num_hidden_layers": 4, "head_dim": 8, "intermediate_size_mlp": 24, "attention_chunk_size": WINDOW + 2,
    "no_rope_layer_interval": 2, "floor_scale": 4,
}  # fmt: skip

# The config of transformers, and fields that replace those of its config.json, for both libraries.
VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixtral": (transformers.MixtralConfig(**MIXTRAL), {}),
    "mixtral-window": (transformers.MixtralConfig(**MIXTRAL, sliding_window=WINDOW, num_experts_per_tok=1), {}),
    "qwen2-moe": (transformers.Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=20), {}),
    "qwen2-moe-window": (
        transformers.Qwen2MoeConfig(
            **QWEN, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2, qkv_bias=False,
            norm_topk_prob=True, shared_expert_intermediate_size=20,
        ),
        {"layer_types": None},
    ),
    "qwen3-moe": (transformers.Qwen3MoeConfig(**QWEN, head_dim=16, norm_topk_prob=True), {}),
    "qwen3-moe-old": (  # as transformers 4 spells it
        transformers.Qwen3MoeConfig(**QWEN, head_dim=16, attention_bias=True),
        {"num_local_experts": None, "num_experts": 6, "router_aux_loss_coef": 0.01},
    ),
    "qwen2-moe-every-second": (
        transformers.Qwen2MoeConfig(
            **QWEN | {"num_hidden_layers": 5}, decoder_sparse_step=2, shared_expert_intermediate_size=20
        ),
        {},
    ),
    "qwen3-moe-some": (
        transformers.Qwen3MoeConfig(
            **QWEN | {"num_hidden_layers": 5}, head_dim=16, norm_topk_prob=True, mlp_only_layers=[0, 3], attention_bias=True
        ),
        {},
    ),
    "llama4": (transformers.Llama4TextConfig(**LLAMA4), {}),
    "llama4-dense": (
        transformers.Llama4TextConfig(
            **LLAMA4, interleave_moe_layer_step=2, num_experts_per_tok=2, attention_bias=True, use_qk_norm=False,
            attn_scale=0.5,
        ),
        {
            "moe_layers": None, "no_rope_layers": None, "layer_types": None, "rope_parameters": None,
            "rope_theta": 500.0, "rope_scaling": LLAMA3,
        },
    ),
    "gpt-oss": (
        transformers.GptOssConfig(
            **GPT_OSS, head_dim=8, num_experts_per_tok=2, sliding_window=WINDOW, swiglu_limit=1.0, swiglu_alpha=1.3
        ),
        {"rope_parameters": None, "layer_types": None, "experts_per_token": 2, "initial_context_length": 4096},
    ),
    "gpt-oss-unbiased": (
        transformers.GptOssConfig(
            **GPT_OSS, head_dim=16, attention_bias=False, tie_word_embeddings=True,
            layer_types=["full_attention"] * 3, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        ),
        {},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model of each variant with random parameters, saved by transformers; made once."""
    folder = tmp_path_factory.mktemp("moe")

    def directory(name: str) -> Path:
        if not (folder / name).exists():
            config, spelled = VARIANTS[name]
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    torch.nn.init.normal_(parameter, mean=float("norm" in key), std=0.3)
            model.save_pretrained(folder / name)
            spell(folder / name, **spelled)
        return folder / name

    return directory


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_files_and_generation_are_those_of_transformers(
    name: str, directories: Callable[[str], Path], tmp_path: Path
) -> None:
    check_like_transformers(directories(name), tmp_path / "saved", 5e-5)
    stored, saved = (load_file(path / "model.safetensors") for path in (directories(name), tmp_path / "saved"))
    assert stored.keys() == saved.keys()  # a tensor for every expert, which transformers 4 can load too


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
def test_fused_experts_load_as_those_in_tensors_of_their_own(
    name: str, directories: Callable[[str], Path], tmp_path: Path
) -> None:
    """One tensor for all experts of a layer, as a state dict of transformers 5 has them."""
    config = (directories(name) / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)
    state = {key: value.numpy() for key, value in their_model(directories(name)).state_dict().items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in state
    save_file(state, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(
        our_logits(load_model(tmp_path), tokens()), our_logits(load_model(directories(name)), tokens())
    )


def test_experts_in_mxfp4_are_decoded_exactly(directories: Callable[[str], Path], tmp_path: Path) -> None:
    """The published format of gpt-oss. NF4 is quantized from the decoded kernels."""
    stored = load_file(directories("gpt-oss") / "model.safetensors")
    rng, dense = np.random.default_rng(0), dict(stored)
    for name in [name for name in stored if name.endswith("_proj") and ".experts." in name]:
        experts, inputs, outputs = stored[name].shape
        blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
        scales = rng.integers(122, 126, blocks.shape[:3], np.uint8)
        decoded = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
        dense[name] = decoded.contiguous().float().numpy()
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        del stored[name]
    config = json.loads((directories("gpt-oss") / "config.json").read_text())
    for folder, tensors, fields in (
        ("packed", stored, {"quantization_config": {"quant_method": "mxfp4"}}),
        ("dense", dense, {}),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(config | fields))
        save_file(tensors, tmp_path / folder / "model.safetensors", {"format": "pt"})
    expected = their_logits(their_model(tmp_path / "dense"))
    packed = load_model(tmp_path / "packed")
    assert np.abs(our_logits(packed, tokens()) - expected).max() < 5e-5 * np.abs(expected).max()
    save_model(packed, tmp_path / "saved")
    np.testing.assert_array_equal(their_logits(their_model(tmp_path / "saved")), expected)
    one, other = (load_model(tmp_path / name, quantize="nf4") for name in ("packed", "dense"))
    np.testing.assert_array_equal(our_logits(one, tokens()), our_logits(other, tokens()))


def test_the_load_balancing_loss_is_that_of_transformers() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 2, 7, 5)).astype(np.float32)  # [L, B, T, E]
    mask = np.arange(7)[None] < np.array([[7], [4]])
    theirs = transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func
    by_layer = tuple(torch.tensor(layer.reshape(-1, 5)) for layer in logits)
    for kept in (None, mask):
        attention = None if kept is None else torch.tensor(kept.astype(np.int64))
        expected = theirs(by_layer, 5, 2, attention).item()
        ours = moe.load_balancing_loss(jnp.asarray(logits), 2, None if kept is None else jnp.asarray(kept))
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


# --- Adapters ---


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EXPERTS_OF_LLAMA4 = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "both": ("qwen3-moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "gate-up": ("mixtral", {"target_modules": [], "target_parameters": EXPERTS[:1], "use_rslora": True}),
    "down-and-router": ("qwen2-moe", {"target_modules": [], "target_parameters": ["down_proj", "gate.weight"]}),
    "some-layers": (
        "mixtral",
        {"target_modules": r".*\.[qv]_proj", "target_parameters": [f"model.layers.1.{name}" for name in EXPERTS]},
    ),
    "gpt-oss": (
        "gpt-oss",
        {"target_modules": ["q_proj", "o_proj"], "target_parameters": [*EXPERTS, "router.weight"]},
    ),
    "dense-layers": ("qwen3-moe-some", {"target_modules": ["o_proj", "mlp.down_proj"], "target_parameters": EXPERTS}),
    "names-of-transformers-4-dense": (
        "qwen3-moe-some",
        {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
    ),
    "every-second-layer-dense": (
        "qwen2-moe-every-second",
        {"target_modules": ["q_proj", "mlp.up_proj", "mlp.down_proj"], "rank_pattern": {"4.mlp.up_proj": 5}},
    ),
    "llama4": (
        "llama4",
        {"target_modules": ["q_proj", "shared_expert.up_proj"], "target_parameters": EXPERTS_OF_LLAMA4},
    ),
    "llama4-dense": ("llama4-dense", {"target_modules": ["o_proj", "feed_forward.up_proj"]}),
    "names-of-transformers-4": ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_go_to_peft_and_back(name: str, directories: Callable[[str], Path], tmp_path: Path) -> None:
    variant, options = ADAPTERS[name]
    theirs = peers.adapted(directories(variant), peft.LoraConfig(r=3, lora_alpha=6, **options))
    theirs.save_pretrained(tmp_path / "theirs")
    expected = peers.logits(theirs)

    ours = peftjax.load_adapter(load_model(directories(variant)), tmp_path / "theirs")
    peers.assert_close(peers.logits(ours), expected)
    peers.assert_far(expected, peers.logits(peers.load_theirs(directories(variant))))

    peftjax.save_adapter(ours, tmp_path / "ours")
    again = peers.load_into_theirs(directories(variant), tmp_path / "ours").eval()
    np.testing.assert_array_equal(peers.logits(again), expected)


@pytest.mark.parametrize("method", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_virtual_tokens_are_in_the_chunks_of_llama4_as_in_peft(
    method: Any, directories: Callable[[str], Path], tmp_path: Path
) -> None:
    theirs = peers.adapted(directories("llama4"), method(num_virtual_tokens=5))
    theirs.save_pretrained(tmp_path)
    ours = peftjax.load_adapter(load_model(directories("llama4")), tmp_path)
    peers.assert_close(peers.logits(ours), peers.logits(theirs))


def test_all_linear_with_experts_goes_to_peft_and_merges(directories: Callable[[str], Path], tmp_path: Path) -> None:
    model = peers.attached(directories("qwen3-moe"), peftjax.Lora(rank=3, dropout=0.1))
    expected = peers.logits(model)
    peftjax.save_adapter(model, tmp_path / "adapter")
    theirs = peers.load_into_theirs(directories("qwen3-moe"), tmp_path / "adapter").eval()
    peers.assert_close(peers.logits(theirs), expected)
    assert not any("mlp.gate" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    save_model(peftjax.merge(model), tmp_path / "merged")
    peers.assert_close(peers.logits(their_model(tmp_path / "merged")), expected)


@pytest.mark.parametrize("variant", ["mixtral", "qwen3-moe"])
def test_adapters_of_single_experts_load_as_in_peft(
    variant: str, directories: Callable[[str], Path], tmp_path: Path
) -> None:
    """As saved by peft with transformers 4. Both libraries convert them to adapters of all experts."""
    block, gate, up, down = ("block_sparse_moe", "w1", "w3", "w2") if variant == "mixtral" else (
        "mlp", "gate_proj", "up_proj", "down_proj"
    )  # fmt: skip
    config = VARIANTS[variant][0]
    hidden = config.intermediate_size if variant == "mixtral" else config.moe_intermediate_size
    rng, tensors = np.random.default_rng(0), {}
    for layer in range(config.num_hidden_layers):
        for expert in range(config.num_local_experts):
            for name, (width, out) in {gate: (32, hidden), up: (32, hidden), down: (hidden, 32)}.items():
                key = f"base_model.model.model.layers.{layer}.{block}.experts.{expert}.{name}"
                tensors[f"{key}.lora_A.weight"] = rng.normal(size=(2, width)).astype(np.float32) / 4
                tensors[f"{key}.lora_B.weight"] = rng.normal(size=(out, 2)).astype(np.float32) / 4
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 6,
        "target_modules": [gate, up, down],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    base = peers.load_theirs(directories(variant))
    expected = peers.logits(peft.PeftModel.from_pretrained(base, tmp_path).eval())
    ours = peftjax.load_adapter(load_model(directories(variant)), tmp_path)
    peers.assert_close(peers.logits(ours), expected)
    peers.assert_far(expected, peers.logits(peers.load_theirs(directories(variant))))
