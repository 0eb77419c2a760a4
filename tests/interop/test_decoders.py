"""Decoders that are not plain Llamas, compared with transformers and peft: float32 logits, files, generation, adapters."""

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

import peftjax
from peftjax.decoding import generate_ids
from peftjax.io.load import load_model
from peftjax.io.save import save_model
from tests.interop import peers
from tests.interop.test_llama import our_logits, spell

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings(*peers.THEIRS)]

LENGTH, WINDOW = 24, 5
COMMON: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GPT2 = {"vocab_size": 48, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "eos_token_id": None}
GEMMA = COMMON | {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 11}
LONGROPE = {"short_factor": [1.0, 1.2], "long_factor": [1.5, 3.0]}
LINEAR = {"rope_type": "linear", "factor": 4.0}

# What transformers makes the model of, and how its config.json is then spelled otherwise, for both of us.
VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt2": (transformers.GPT2Config(**GPT2), {}),
    "gpt2-untied": (
        transformers.GPT2Config(
            **GPT2, n_inner=40, activation_function="relu", tie_word_embeddings=False, scale_attn_weights=False
        ),
        {"n_ctx": 64},
    ),
    "phi3": (transformers.Phi3Config(**COMMON, sliding_window=WINDOW), {}),
    "phi3-longrope": (
        transformers.Phi3Config(
            **COMMON,
            tie_word_embeddings=True,
            original_max_position_embeddings=16,
            rope_parameters=LONGROPE | {"rope_type": "longrope", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        ),
        {  # as the repository of Phi-4 mini has it
            "rope_parameters": None,
            "rope_scaling": LONGROPE | {"type": "longrope"},
            "rope_theta": 500.0,
            "partial_rotary_factor": 0.5,
            "full_attn_mod": 1,
            "lm_head_bias": False,
        },
    ),
    "gemma2": (
        transformers.Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
        {"layer_types": None, "hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"},
    ),
    "gemma2-uncapped": (
        transformers.Gemma2Config(
            **GEMMA,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            attention_bias=True,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
        ),
        {},
    ),
    "gemma3": (
        transformers.Gemma3TextConfig(
            **GEMMA,
            final_logit_softcapping=3.0,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={
                "full_attention": LINEAR | {"rope_theta": 900.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        ),
        {},
    ),
    "gemma3-old": (
        transformers.Gemma3TextConfig(**GEMMA, tie_word_embeddings=False),
        {
            "layer_types": None,
            "sliding_window_pattern": 2,
            "rope_parameters": None,
            "rope_scaling": LINEAR,
            "rope_theta": 900.0,
            "rope_local_base_freq": 50.0,
        },
    ),
    "olmo2": (transformers.Olmo2Config(**COMMON, attention_bias=True), {}),
    "olmo3": (
        transformers.Olmo3Config(
            **COMMON,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={
                "full_attention": LINEAR | {"rope_theta": 900.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        ),
        {},
    ),
    "olmo3-old": (
        transformers.Olmo3Config(**COMMON | {"num_hidden_layers": 4}, sliding_window=WINDOW, tie_word_embeddings=True),
        {"layer_types": None, "rope_parameters": None, "rope_scaling": LINEAR, "rope_theta": 900.0},
    ),
    "smollm3": (
        transformers.SmolLM3Config(
            **COMMON, no_rope_layers=[1, 0, 1], attention_bias=True, mlp_bias=True, tie_word_embeddings=False
        ),
        {},
    ),
    "smollm3-window": (
        transformers.SmolLM3Config(**COMMON, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=WINDOW),
        {"no_rope_layers": None, "layer_types": None},
    ),
    "granite": (
        transformers.GraniteConfig(
            **COMMON, embedding_multiplier=3.0, logits_scaling=0.5, residual_multiplier=0.4, attention_multiplier=0.3
        ),
        {},
    ),
    "ministral3": (
        transformers.Ministral3Config(
            **COMMON,
            head_dim=8,
            sliding_window=WINDOW + 9,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 500.0,
                "factor": 4.0,
                "original_max_position_embeddings": 8,
                "max_position_embeddings": 64,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
                "llama_4_scaling_beta": 0.5,
            },
        ),
        {},
    ),
    "glm4": (transformers.Glm4Config(**COMMON, head_dim=8), {}),
    "glm4-old": (
        transformers.Glm4Config(**COMMON, head_dim=16, attention_bias=False, tie_word_embeddings=True),
        {"rope_parameters": None, "rope_theta": 500.0, "partial_rotary_factor": 0.25},
    ),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model of each variant as transformers saves it, with every parameter random; made once."""
    folder = tmp_path_factory.mktemp("decoders")

    def directory(name: str) -> Path:
        if not (folder / name).exists():
            config, spelled = VARIANTS[name]
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
            zero_centered = name.startswith("gemma")
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    scale = ("norm" in key or "ln_" in key) and key.endswith("weight") and not zero_centered
                    torch.nn.init.normal_(parameter, mean=float(scale), std=0.2)
            model.save_pretrained(folder / name)
            spell(folder / name, **spelled)
        return folder / name

    return directory


def tokens(rows: int = 2, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 48, (rows, length))


def their_model(directory: Path) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def their_logits(model: Any, mask: np.ndarray | None = None) -> np.ndarray:
    with torch.no_grad():
        attention = None if mask is None else torch.tensor(mask.astype(np.int64))
        return model(torch.tensor(tokens()), attention_mask=attention).logits.numpy()


def check_like_transformers(directory: Path, saved: Path, bound: float) -> None:
    """Logits with and without padding, the model saved to `saved`, and greedy generation match transformers."""
    ours, theirs = load_model(directory), their_model(directory)
    expected = their_logits(theirs)
    assert np.abs(expected).max() > 1  # else a small difference says little
    assert np.abs(our_logits(ours, tokens()) - expected).max() < bound

    mask = np.arange(LENGTH)[None] < np.array([[LENGTH], [LENGTH - 7]])
    padded = our_logits(ours, tokens(), mask=jnp.asarray(mask))
    assert np.abs(padded - their_logits(theirs, mask))[mask].max() < bound

    save_model(ours, saved)
    np.testing.assert_array_equal(their_logits(their_model(saved)), expected)

    prompts = [row[:length].tolist() for row, length in zip(tokens(), (9, 4), strict=True)]
    for prompt, answer in zip(prompts, generate_ids(ours, prompts, max_new_tokens=6), strict=True):
        with torch.no_grad():  # of the whole text at once, without a cache
            likeliest = theirs(torch.tensor([prompt + answer])).logits.argmax(-1)[0]
        assert answer == likeliest[len(prompt) - 1 : -1].tolist()


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_files_and_generation_are_those_of_transformers(
    name: str, directories: Callable[[str], Path], tmp_path: Path
) -> None:
    check_like_transformers(directories(name), tmp_path / "saved", 2e-5)


def test_a_window_and_a_cap_change_the_logits(directories: Callable[[str], Path], tmp_path: Path) -> None:
    """So that the equality above says something of them."""
    for name, field in (("gemma2", "sliding_window"), ("gemma2", "attn_logit_softcapping"), ("phi3", "sliding_window")):
        changed = tmp_path / f"{name}-{field}"
        changed.mkdir()
        for file in directories(name).iterdir():
            (changed / file.name).write_bytes(file.read_bytes())
        spell(changed, **{field: 7})
        one, other = (our_logits(load_model(each), tokens()) for each in (directories(name), changed))
        assert np.abs(one - other).max() > 1e-2


def test_gpt2_loads_without_its_prefix_and_with_its_old_buffers(
    directories: Callable[[str], Path], tmp_path: Path
) -> None:
    """As the first GPT-2 is stored: from the model without its head, with the causal mask of every layer."""
    stored = load_file(directories("gpt2") / "model.safetensors")
    bare = {key.removeprefix("transformer."): value for key, value in stored.items()}
    bare |= {f"h.{i}.attn.bias": np.ones((1, 1, 64, 64), np.float32) for i in range(3)}
    bare |= {f"h.{i}.attn.masked_bias": np.float32([-1e4]) for i in range(3)}
    save_file(bare, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((directories("gpt2") / "config.json").read_bytes())
    np.testing.assert_array_equal(
        our_logits(load_model(tmp_path), tokens()), our_logits(load_model(directories("gpt2")), tokens())
    )


def test_gemma_rounds_the_scale_of_its_embeddings_as_transformers_does(directories: Callable[[str], Path]) -> None:
    ours = load_model(directories("gemma3"), dtype="bfloat16")
    theirs = their_model(directories("gemma3")).bfloat16()
    with torch.no_grad():
        expected = theirs.get_input_embeddings()(torch.tensor(tokens())).float().numpy()
    np.testing.assert_array_equal(np.asarray(ours.embedded(jnp.asarray(tokens())), np.float32), expected)


# Of each family a LoRA, (IA)3 or a soft prompt in peft's words; fan_in_fan_out is peft's word for GPT-2's kernels.
ADAPTERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "gpt2-lora": ("gpt2", lambda: peft.LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=True)),
    "gpt2-dora": ("gpt2", lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=["c_attn"], fan_in_fan_out=True)),
    "gpt2-ia3": (
        "gpt2",
        lambda: peft.IA3Config(
            target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
        ),
    ),
    "gpt2-prompt": ("gpt2", lambda: peft.PromptTuningConfig(num_virtual_tokens=5)),
    "gpt2-prefix": ("gpt2", lambda: peft.PrefixTuningConfig(num_virtual_tokens=5)),
    "phi3-lora": ("phi3", lambda: peft.LoraConfig(r=4, target_modules="all-linear")),
    "phi3-ia3": (
        "phi3",
        lambda: peft.IA3Config(target_modules=["qkv_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "phi3-prefix": ("phi3-longrope", lambda: peft.PrefixTuningConfig(num_virtual_tokens=5)),
    "gemma2-prompt": ("gemma2", lambda: peft.PromptTuningConfig(num_virtual_tokens=5)),
    "phi3-window-prefix": ("phi3", lambda: peft.PrefixTuningConfig(num_virtual_tokens=4)),
    "gemma2-prefix": ("gemma2-uncapped", lambda: peft.PrefixTuningConfig(num_virtual_tokens=7)),
    "gemma3-prefix": ("gemma3", lambda: peft.PrefixTuningConfig(num_virtual_tokens=3)),
    "olmo3-lora": ("olmo3", lambda: peft.LoraConfig(r=4, target_modules="all-linear")),
    "smollm3-prefix": ("smollm3-window", lambda: peft.PrefixTuningConfig(num_virtual_tokens=4)),
    "granite-prompt": ("granite", lambda: peft.PromptTuningConfig(num_virtual_tokens=5)),
    "ministral3-prompt": ("ministral3", lambda: peft.PromptTuningConfig(num_virtual_tokens=9)),
    "glm4-lora": ("glm4", lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "gate_up_proj"])),
    "gemma3-lora": ("gemma3", lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj", "embed_tokens"])),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_go_to_peft_and_back(name: str, directories: Callable[[str], Path], tmp_path: Path) -> None:
    variant, config = ADAPTERS[name]
    theirs = peers.adapted(directories(variant), config())
    theirs.save_pretrained(tmp_path / "theirs")
    expected = peers.logits(theirs)

    ours = peftjax.load_adapter(load_model(directories(variant)), tmp_path / "theirs")
    peers.assert_close(peers.logits(ours), expected)
    peers.assert_far(expected, peers.logits(peers.load_theirs(directories(variant))))

    peftjax.save_adapter(ours, tmp_path / "ours")
    np.testing.assert_array_equal(
        peers.logits(peers.load_into_theirs(directories(variant), tmp_path / "ours").eval()), expected
    )
    fields = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    if "fan_in_fan_out" in fields:
        assert fields["fan_in_fan_out"] == (variant == "gpt2")


@pytest.mark.parametrize(
    ("targets", "saved"), [(("c_attn",), ("wte",)), (("c_attn", "wte"), ()), (r".*(c_attn|wte)", ())]
)
def test_a_head_that_follows_the_embedding_of_gpt2_does_so_in_peft(
    targets: Any, saved: tuple[str, ...], directories: Callable[[str], Path], tmp_path: Path
) -> None:
    """peft ties modules named embed_tokens or lm_head only, so the file names lm_head."""
    method = peftjax.Lora(rank=4, targets=targets, modules_to_save=saved, ensure_weight_tying=True)
    model = peers.attached(directories("gpt2"), method)
    peftjax.save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(peers.load_theirs(directories("gpt2")), tmp_path / "ours").eval()
    peers.assert_close(peers.logits(theirs), peers.logits(model))
    back = peftjax.load_adapter(load_model(directories("gpt2")), tmp_path / "ours")
    np.testing.assert_array_equal(peers.logits(back), peers.logits(model))


def test_a_head_that_peft_leaves_untied_is_untied_here(directories: Callable[[str], Path], tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, target_modules=["c_attn"], modules_to_save=["wte"], ensure_weight_tying=True, fan_in_fan_out=True
    )
    theirs = peers.adapted(directories("gpt2"), config)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="ensure_weight_tying=True"):
        model = peftjax.load_adapter(load_model(directories("gpt2")), tmp_path)
    peers.assert_close(peers.logits(model), peers.logits(theirs))


def test_all_linear_of_gpt2_goes_to_peft_and_merges(directories: Callable[[str], Path], tmp_path: Path) -> None:
    model = peers.attached(directories("gpt2"), peftjax.Lora(rank=4))
    expected = peers.logits(model)
    peftjax.save_adapter(model, tmp_path / "adapter")
    peers.assert_close(peers.logits(peers.load_into_theirs(directories("gpt2"), tmp_path / "adapter").eval()), expected)
    save_model(peftjax.merge(model), tmp_path / "merged")
    peers.assert_close(peers.logits(their_model(tmp_path / "merged")), expected)
