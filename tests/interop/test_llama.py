"""Our logits against transformers', in float32 on the CPU, for every variation of the Llama family."""

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftjax.io.load import load_model
from peftjax.io.random_model import make_random
from peftjax.io.save import save_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.interop
torch.set_num_threads(1)  # its threads wait for each other in busy loops, which is slow beside other processes

LENGTH = 24
TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
MODELS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


def write(directory: Path, kind: str, **fields: Any) -> Path:
    """A tiny model of transformers whose every parameter is random, biases and norms too, as it saves it."""
    make_config, make_model = MODELS[kind]
    torch.manual_seed(0)
    model = make_model(make_config(**TINY | fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.save_pretrained(directory)
    return directory


def spell(directory: Path, **fields: Any) -> None:
    """Change config.json; a field that is given as None is taken out."""
    file = directory / "config.json"
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def their_model(directory: Path) -> Any:
    kind = json.loads((directory / "config.json").read_text())["model_type"]
    model, info = MODELS[kind][1].from_pretrained(directory, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info  # missing, unexpected, mismatched, errors
    return model.eval()


def their_logits(directory: Path, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    with torch.no_grad():
        attention = None if mask is None else torch.tensor(mask.astype(np.int64))
        return their_model(directory)(torch.tensor(tokens), attention_mask=attention).logits.numpy()


def our_logits(model: Any, tokens: np.ndarray, **inputs: Any) -> np.ndarray:
    return np.asarray(model(jnp.asarray(tokens, jnp.int32), **inputs))


def random_tokens(length: int = LENGTH, rows: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, TINY["vocab_size"], (rows, length))


def assert_same_logits(directory: Path, length: int = LENGTH, tolerance: float = 1e-5) -> np.ndarray:
    tokens = random_tokens(length)
    ours, theirs = our_logits(load_model(directory), tokens), their_logits(directory, tokens)
    assert np.abs(theirs).max() > 1  # else a small difference says little
    assert np.abs(ours - theirs).max() < tolerance
    return ours


SHAPES = {
    "grouped queries": {},
    "one key/value head for each query head": {"num_key_value_heads": 4},
    "one key/value head": {"num_key_value_heads": 1},
    "a tied head": {"tie_word_embeddings": True},
    "heads wider than hidden_size / heads": {"head_dim": 16},
    "heads narrower than hidden_size / heads": {"head_dim": 4},
    "another activation": {"hidden_act": "gelu_pytorch_tanh"},
    "another epsilon": {"rms_norm_eps": 0.1},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_those_of_transformers(tmp_path: Path, kind: str, shape: str) -> None:
    fields = SHAPES[shape]
    assert_same_logits(write(tmp_path, kind, **{"head_dim": 8} | fields if kind == "qwen3" else fields))


@pytest.mark.parametrize(
    "fields", [{"attention_bias": True}, {"mlp_bias": True}, {"attention_bias": True, "mlp_bias": True}]
)
def test_llama_with_biases(tmp_path: Path, fields: dict[str, Any]) -> None:
    assert_same_logits(write(tmp_path, "llama", **fields))


def test_qwen3_with_biases(tmp_path: Path) -> None:
    assert_same_logits(write(tmp_path, "qwen3", attention_bias=True, head_dim=8))


# --- Rotary embeddings ---

# Everything but rope_theta, as transformers 5 writes it in rope_parameters; theta is not the default, to be seen.
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn-betas": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
        "attention_factor": 1.3,
    },
    "yarn-untruncated": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 1.5,
        "beta_slow": 0.1,
        "truncate": False,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 0.8,
        "mscale_all_dim": 0.3,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.5, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": 16,
    },
    "longrope-factors": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.5, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": 16,
        "factor": 6.0,
        "attention_factor": 1.2,
    },
}
THETA = 500.0


def write_rope(directory: Path, kind: str, rope: str, spelling: str) -> Path:
    """The same rotary embedding as transformers 5 writes it, as 4 wrote it ("rope_type"), or before that ("type")."""
    parameters = ROPES[rope] | {"rope_theta": THETA}
    head_dim = {"head_dim": 8} if kind == "qwen3" else {}
    write(directory, kind, max_position_embeddings=32, rope_parameters=parameters, **head_dim)
    if spelling != "new":
        scaling: dict[str, Any] | None = dict(ROPES[rope])
        if spelling == "oldest":
            scaling["type"] = scaling.pop("rope_type")
        if rope == "default":
            scaling = None
        spell(directory, rope_parameters=None, rope_scaling=scaling, rope_theta=THETA)
    return directory


@pytest.mark.parametrize("rope", ROPES)
def test_every_rope_in_every_spelling(tmp_path: Path, rope: str) -> None:
    new = write_rope(tmp_path / "new", "llama", rope, "new")
    logits, config = assert_same_logits(new), load_model(new).config
    for spelling in ("old", "oldest"):
        same = write_rope(tmp_path / spelling, "llama", rope, spelling)
        assert dataclasses.replace(load_model(same).config, hf="") == dataclasses.replace(config, hf="")
        assert np.abs(logits - their_logits(same, random_tokens())).max() < 1e-5


@pytest.mark.parametrize("rope", ["dynamic", "yarn", "longrope", "longrope-factors"])
@pytest.mark.parametrize("length", [12, 16, 17, 32, 33, 48])
def test_ropes_that_depend_on_the_length_of_the_sequence(tmp_path: Path, rope: str, length: int) -> None:
    # original_max_position_embeddings is 16, max_position_embeddings 32
    # longrope's factor sharpens the softmax: rounding alone makes 1.1e-5 on some machines
    assert_same_logits(write_rope(tmp_path, "llama", rope, "new"), length, tolerance=2e-5)


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("rope", ["yarn", "llama3"])
def test_scaled_ropes_of_the_other_kinds(tmp_path: Path, kind: str, rope: str) -> None:
    assert_same_logits(write_rope(tmp_path, kind, rope, "new"))


def test_yarn_without_an_original_length_scales_from_max_position_embeddings(tmp_path: Path) -> None:
    assert_same_logits(
        write(tmp_path, "llama", rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": THETA})
    )


# --- Masks ---


@pytest.mark.parametrize("window", [1, 5, LENGTH - 1, LENGTH, None])
def test_mistral_with_a_sliding_window(tmp_path: Path, window: int | None) -> None:
    logits = assert_same_logits(write(tmp_path, "mistral", sliding_window=window))
    if window == 5:
        spell(tmp_path, sliding_window=6)
        assert np.abs(logits - our_logits(load_model(tmp_path), random_tokens())).max() > 1e-2


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_qwen_with_a_sliding_window_in_its_later_layers(tmp_path: Path, kind: str, first: int) -> None:
    head_dim = {"head_dim": 8} if kind == "qwen3" else {}
    write(tmp_path, kind, use_sliding_window=True, sliding_window=5, max_window_layers=first, **head_dim)
    logits = assert_same_logits(tmp_path)
    assert "layer_types" in json.loads((tmp_path / "config.json").read_text())  # as transformers 5 writes it
    spell(tmp_path, layer_types=None)  # as transformers 4 wrote it
    np.testing.assert_array_equal(assert_same_logits(tmp_path), logits)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_qwen_with_a_window_that_is_not_used(tmp_path: Path, kind: str) -> None:
    head_dim = {"head_dim": 8} if kind == "qwen3" else {}
    assert_same_logits(
        write(tmp_path, kind, use_sliding_window=False, sliding_window=5, max_window_layers=1, **head_dim)
    )


def test_qwen_with_layer_types_of_its_own(tmp_path: Path) -> None:
    types = ["full_attention", "sliding_attention", "full_attention"]
    assert_same_logits(write(tmp_path, "qwen2", use_sliding_window=True, sliding_window=5, layer_types=types))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", MODELS)
def test_padding_masks(tmp_path: Path, kind: str, side: str) -> None:
    fields = {"mistral": {"sliding_window": 5}, "qwen3": {"head_dim": 8}}.get(kind, {})
    write(tmp_path, kind, **fields)
    tokens = random_tokens(rows=3)
    real = np.arange(LENGTH)[None] < np.array([[LENGTH], [LENGTH - 7], [3]])
    mask = real if side == "right" else real[:, ::-1].copy()
    ours = our_logits(load_model(tmp_path), tokens, mask=jnp.asarray(mask))
    theirs = their_logits(tmp_path, tokens, mask)
    assert np.abs(ours - theirs)[mask].max() < 1e-5
    assert np.isfinite(ours).all()


def test_packed_segments_and_a_cache_give_the_logits_of_the_documents_alone(tmp_path: Path) -> None:
    model = load_model(write(tmp_path, "llama"))
    tokens = random_tokens(rows=1)
    lengths = (7, 12, LENGTH - 19)
    segments = np.repeat([1, 2, 3], lengths)[None]
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    packed = our_logits(model, tokens, segments=jnp.asarray(segments), positions=jnp.asarray(positions))
    parts = np.split(tokens, np.cumsum(lengths)[:-1], axis=1)
    theirs = np.concatenate([their_logits(tmp_path, part) for part in parts], axis=1)
    assert np.abs(packed - theirs).max() < 1e-5
    cache, logits = model.make_cache(1, LENGTH), []
    for start, stop in ((0, 10), (10, 11), (11, LENGTH)):
        some, cache = model(jnp.asarray(tokens[:, start:stop], jnp.int32), cache=cache)
        logits.append(np.asarray(some))
    assert np.abs(np.concatenate(logits, axis=1) - their_logits(tmp_path, tokens)).max() < 1e-5


# --- Real checkpoints, and what we write ---


@pytest.mark.parametrize("name", ["tinystories656k", "stories260k", "babyllama105"])
def test_real_checkpoints_have_the_logits_and_the_loss_of_transformers(assets: Path, name: str) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(assets / name / "tokenizer.json"))
    with gzip.open(assets / "data" / "tinystories_head" / "validation.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [next(iter(json.loads(line).values())) for line, _ in zip(lines, range(4), strict=False)]
    tokens = np.array([tokenizer.encode(text).ids[:100] for text in texts])
    theirs = their_logits(assets / name, tokens)
    ours = our_logits(load_model(assets / name), tokens)
    assert np.abs(ours - theirs).max() < 5e-5  # logits of up to 30
    with torch.no_grad():
        their_loss = their_model(assets / name)(torch.tensor(tokens), labels=torch.tensor(tokens)).loss.item()
    predicted = jax.nn.log_softmax(ours[:, :-1])
    our_loss = -np.take_along_axis(np.asarray(predicted), tokens[:, 1:, None], axis=-1).mean()
    assert abs(our_loss - their_loss) < 1e-5
    assert our_loss < 4  # a trained model: a random one is at log(vocabulary), 4.6 to 7.6


@pytest.mark.parametrize("shards", ["one file", "sharded"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_transformers_loads_what_we_save(tmp_path: Path, kind: str, tied: bool, shards: str) -> None:
    head_dim = {"head_dim": 8} if kind == "qwen3" else {}
    source = write(tmp_path / "source", kind, tie_word_embeddings=tied, **head_dim)
    options = {"max_shard_bytes": 20_000} if shards == "sharded" else {}
    save_model(load_model(source), tmp_path / "saved", source=source, **options)
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists() == (shards == "sharded")
    tokens = random_tokens()
    np.testing.assert_array_equal(their_logits(tmp_path / "saved", tokens), their_logits(source, tokens))
    assert (tmp_path / "saved" / "generation_config.json").exists()


def test_transformers_loads_bfloat16_that_we_save_in_its_own_dtype(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"model_type": "llama"}))
    ours = make_random(tmp_path, "bfloat16")
    save_model(ours, tmp_path / "saved")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    kernel = np.asarray(ours.blocks.feedforward.down.kernel.get_value()[1].T.astype(jnp.float32))
    np.testing.assert_array_equal(theirs.model.layers[1].mlp.down_proj.weight.detach().float().numpy(), kernel)


def test_what_transformers_4_wrote_loads(tmp_path: Path) -> None:
    """torch_dtype, rope_theta and rope_scaling null in config.json, and buffers of the rotary embedding stored."""
    from safetensors.numpy import load_file, save_file

    write(tmp_path, "llama", rope_parameters={"rope_type": "default", "rope_theta": THETA})
    logits = assert_same_logits(tmp_path)
    spell(tmp_path, rope_parameters=None, dtype=None, rope_theta=THETA, torch_dtype="float32", pretraining_tp=1)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_scaling": None}))
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(3)}
    save_file(load_file(tmp_path / "model.safetensors") | buffers, tmp_path / "model.safetensors", {"format": "pt"})
    np.testing.assert_array_equal(our_logits(load_model(tmp_path), random_tokens()), logits)
